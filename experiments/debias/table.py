"""What each arm came to, against the base and against "none"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from benchmarks.harness import store, tables
from benchmarks.harness.store import Record
from benchmarks.harness.tables import NOT_MEASURED, Cells, Table
from fastdean.evaluation import mean_interval
from fastdean.evaluation.intervals import student_quantile
from fastdean.wording.verdicts import FEWEST, is_withheld

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
ONE_STATE = ("device", "case", "contender", "strength", "seed", "step")
ONE_EXPERIMENT = ("device", "case")

Arm = tuple[str, float]


def _lines(run: Sequence[Record]) -> tuple[Cells, list[Cells]]:
    """A block for each figure."""
    base = next((row for row in run if row.contender == BASE), None)
    arms = _ends(run)
    header = ["figure", "arm", "at the end, mean", "change from the base"]
    lines = [line for name in run[-1]["figures"] for line in _block(name, base, arms)]
    return [*header, "against no regulariser, seed by seed"], lines


def _notes(run: Sequence[Record]) -> list[str]:
    arms = _ends(run)
    notes = [_about(run), _about_intervals(arms), *map(_about_arm, arms.values())]
    return [" ".join(filter(None, notes)), "", *tables.provenance_lines(run)]


# A resumed run has several dates: the latest of each training, not of each run.
TABLE = Table("python -m experiments.debias run", ONE_STATE, ONE_EXPERIMENT, _lines, _notes)


def _ends(run: Iterable[Record]) -> dict[Arm, list[Record]]:
    """(arm, strength) -> its last steps, in the order in which arms are named above."""
    ends = [row for row in run if row.contender != BASE and row["step"] == row["steps"]]
    ends.sort(key=lambda row: (list(NAMES).index(row.contender), row["strength"]))
    arms = store.grouped(ends, ("contender", "strength"))
    return {(rows[0].contender, rows[0]["strength"]): rows for rows in arms}


def label(arm: Arm) -> str:
    """An arm in words."""
    name, strength = arm
    return NAMES[name] if name in (BASE, NONE) else f"{NAMES[name]}, strength {strength:g}"


def _block(name: str, base: Record | None, arms: Mapping[Arm, Sequence[Record]]) -> list[Cells]:
    """The lines of one figure, which its title begins."""
    before = None if base is None else base["figures"].get(name)
    values: dict[Arm, dict[int, float]] = {arm: {} for arm in arms}
    for arm, row in ((arm, row) for arm, rows in arms.items() for row in rows):
        if row["figures"].get(name) is not None:
            values[arm][row["seed"]] = row["figures"][name]
    without = values.get((NONE, 0.0), {})
    lines = [] if base is None else [["", NAMES[BASE], _number(before), "", ""]]
    for arm, found in values.items():
        paired = [found[seed] - without[seed] for seed in found if seed in without]
        changes = [] if before is None else [value - before for value in found.values()]
        mean = fmean(found.values()) if found else None
        against_none = "" if arm[0] == NONE else _change(paired)
        lines.append(["", label(arm), _number(mean), _change(changes), against_none])
    first = base or next(iter(arms.values()))[0]
    unit, neutral = first["units"].get(name), first["neutral"].get(name)
    title = f"{name}, {unit}" if unit else name
    lines[0][0] = title if neutral is None else f"{title} (neutral: {neutral:g})"
    return lines


def _number(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.4g}"


def _change(differences: Sequence[float]) -> str:
    if not differences:
        return NOT_MEASURED
    found = mean_interval(differences)
    if found.n < 2:
        return f"{found.mean:+.4g} (one seed: no interval)"
    verdict = found.verdict()
    said = "" if is_withheld(verdict) else f", {verdict}"
    return f"{found.mean:+.4g} [{found.low:+.4g}, {found.high:+.4g}]{said}"


def _about(run: Sequence[Record]) -> str:
    row = run[-1]
    return (
        f"{row.case}. Trained on {row['trained_rows']} rows and their swapped copies; collapse "
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
    wide = ", which with so few seeds is wide" if counts[0] <= _FEW_SEEDS else ""
    none = ": there is none here" if counts[-1] < FEWEST else ""
    return (
        f"Brackets: 95 % interval of the mean over {seeds} seeds, Student's t, {factors} standard "
        f"errors to each side{wide}. A verdict takes {FEWEST} seeds, an interval without 0 and a "
        f"sign-flip test that agrees{none}. No correction for the number of comparisons."
    )


def _about_arm(rows: Sequence[Record]) -> str:
    times = [row["step_s"] for row in rows if row["step_s"] is not None]
    said = [f"{fmean(times):.2f} s a step"] if times else []
    if rows[0].contender != NONE:
        said.append(f"{_range(rows, 'classes')} classes")
        said.append(f"{_range(rows, 'labelled')} tokens of the training text")
    name = label((rows[0].contender, rows[0]["strength"]))
    return f"{name[0].upper()}{name[1:]}: {', '.join(said)}."


def _range(rows: Sequence[Record], key: str) -> str:
    least, most = min(row[key] for row in rows), max(row[key] for row in rows)
    return str(least) if least == most else f"{least} to {most}"
