"""The table of `run.py debias`: what each arm came to, against the base and against "none"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

import records
from records import Record

from fastdean.evaluation import mean_interval
from fastdean.evaluation.intervals import student_quantile
from fastdean.verdicts import FEWEST, is_withheld

BASE, NONE = "base", "none"
NAMES = {
    BASE: "the model before training",
    NONE: "no regulariser",
    "words": "gender words",
    "random": "random words",
    "frequency": "frequency-matched words",
}
# Below so many degrees of freedom an interval is much wider than with many seeds: 2.6 against 2.0.
_FEW_SEEDS = 6

# What tells a state of one training from all others.
ONE_STATE = ("device", "case", "arm", "strength", "seed", "step")

Arm = tuple[str, float]


def debias_table(rows: Iterable[Record]) -> str:
    """One markdown table per device and experiment, with a block for each figure."""
    # A resumed run has several dates: the latest of each training, not of each run.
    chosen = records.latest(rows, ONE_STATE)
    return "\n\n".join(_table(run) for run in records.grouped(chosen, ("device", "case")))


def _table(run: Sequence[Record]) -> str:
    base = next((row for row in run if row["arm"] == BASE), None)
    ends = [row for row in run if row["arm"] != BASE and row["step"] == row["steps"]]
    arms = by_arm(ends)
    lines = [
        "| figure | arm | at the end, mean | change from the base | against no regulariser, seed "
        "by seed |",
        "|---|---|---|---|---|",
    ]
    for name in run[-1]["figures"]:
        lines += _block(name, base, arms)
    notes = [_about(run), _about_intervals(arms), *map(_about_arm, arms.values())]
    made = dict.fromkeys(records.provenance_line(row) for row in run)
    return "\n".join([*lines, "", " ".join(filter(None, notes)), "", *made])


def by_arm(rows: Iterable[Record]) -> dict[Arm, list[Record]]:
    """(arm, strength) -> its rows, in the order in which arms are named above."""
    found: dict[Arm, list[Record]] = {}
    for row in rows:
        found.setdefault((row["arm"], row["strength"]), []).append(row)
    return dict(sorted(found.items(), key=lambda item: (list(NAMES).index(item[0][0]), item[0][1])))


def label(arm: Arm) -> str:
    """An arm in words."""
    name, strength = arm
    return NAMES[name] if name in (BASE, NONE) else f"{NAMES[name]}, strength {strength:g}"


def _block(name: str, base: Record | None, arms: Mapping[Arm, Sequence[Record]]) -> list[str]:
    """The lines of one figure."""
    before = None if base is None else base["figures"].get(name)
    values = {arm: _values(rows, name) for arm, rows in arms.items()}
    without = values.get((NONE, 0.0), {})
    lines = []
    if base is not None:
        lines.append(f"| {_title(name, base)} | {NAMES[BASE]} | {_number(before)} | | |")
    for arm, found in values.items():
        paired = [found[seed] - without[seed] for seed in found if seed in without]
        changes = [] if before is None else [value - before for value in found.values()]
        mean = fmean(found.values()) if found else None
        cells = [
            "" if base is not None else _title(name, arms[arm][0]),
            label(arm),
            _number(mean),
            _change(changes),
            "" if arm[0] == NONE else _change(paired),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _values(rows: Sequence[Record], name: str) -> dict[int, float]:
    """Seed -> value, where there is one."""
    found = {row["seed"]: row["figures"].get(name) for row in rows}
    return {seed: value for seed, value in found.items() if value is not None}


def _title(name: str, row: Record) -> str:
    unit, neutral = row["units"].get(name), row["neutral"].get(name)
    said = f", {unit}" if unit else ""
    return name + said + ("" if neutral is None else f" (neutral: {neutral:g})")


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def _change(differences: Sequence[float]) -> str:
    if not differences:
        return "not measured"
    found = mean_interval(differences)
    if found.n < 2:
        return f"{found.mean:+.4g} (one seed: no interval)"
    verdict = found.verdict()
    said = "" if is_withheld(verdict) else f", {verdict}"
    return f"{found.mean:+.4g} [{found.low:+.4g}, {found.high:+.4g}]{said}"


def _about(run: Sequence[Record]) -> str:
    row = run[-1]
    return (
        f"{row['case']}. Trained on {row['trained_rows']} rows and their swapped copies; collapse "
        f"of the gender words and fluency on {row['held_out_rows']} other rows "
        f"({row['held_out_tokens']} tokens)."
    )


def _about_intervals(arms: Mapping[Arm, Sequence[Record]]) -> str:
    counts = sorted({len(rows) for rows in arms.values()})
    if not counts:
        return ""
    seeds = " or ".join(map(str, counts))
    if counts[-1] < 2:
        return f"{seeds} seed: no intervals."
    factors = " or ".join(f"{student_quantile(n - 1):.2f}" for n in counts if n > 1)
    wide = ""
    if counts[0] <= _FEW_SEEDS:
        wide = ", which with so few seeds is wide"
    none = ": there is none here" if counts[-1] < FEWEST else ""
    return (
        f"Brackets: 95 % interval of the mean over {seeds} seeds, Student's t, {factors} standard "
        f"errors to each side{wide}. A verdict takes {FEWEST} seeds, an interval without 0 and a "
        f"sign-flip test that agrees{none}. No correction for the number of comparisons."
    )


def _about_arm(rows: Sequence[Record]) -> str:
    first = rows[0]
    times = [row["step_s"] for row in rows if row["step_s"] is not None]
    said = [f"{label((first['arm'], first['strength']))}: "]
    if times:
        said.append(f"{fmean(times):.2f} s a step")
    if first["arm"] != NONE:
        said.append(f"{', ' if times else ''}{_range(rows, 'classes')} classes, ")
        said.append(f"{_range(rows, 'labelled')} tokens of the training text")
    text = "".join(said)
    return f"{text[0].upper()}{text[1:]}."


def _range(rows: Sequence[Record], key: str) -> str:
    least, most = min(row[key] for row in rows), max(row[key] for row in rows)
    return str(least) if least == most else f"{least} to {most}"
