"""The second paper's table from the records of `reproduce`, and the tests over seeds.

A test is of the difference between two arms, seed by seed; where a column has a neutral value, of
the difference between their distances to it. All tests of the table are one family: p-values are
Holm's, intervals Bonferroni's, and a verdict follows the rule of all verdicts here (sign flips,
eight seeds). Beside it stands Student's paired t test, which five seeds can pass, and which
assumes normal differences.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from benchmarks.harness import store, tables
from benchmarks.harness.store import Record
from benchmarks.harness.tables import NOT_MEASURED
from experiments.debias.settings import (
    FIGURES,
    GLUE_HEAD,
    NLI_HEAD,
    PUBLISHED,
    SEEDS,
    SHIFT,
    WARMUP,
)
from experiments.debias.subject import ARMS
from fastdean.evaluation import Family, holm, mean_interval
from fastdean.files.provenance import public_source
from fastdean.wording import markdown
from fastdean.wording.verdicts import (
    CLOSER,
    FARTHER,
    FEWEST,
    HIGHER,
    LEVEL,
    LOWER,
    direction,
    reworded,
)

BASE, NONE, WORDS = "base", "none", "words"
NAMES = {
    BASE: "before training",
    NONE: "without the term",
    WORDS: "gender words",
    "random": "random words",
    "frequency": "words as frequent",
}
# What the term does, and whether it is the words that do it.
AGAINST = (NONE, "random", "frequency")
_GLUE = "GLUE "

# arm -> seed -> value; before training seed 0 alone, but for trained heads.
Values = dict[str, dict[int, float]]


class Column(NamedTuple):
    unit: str
    neutral: float | None
    values: Values

    def title(self, name: str) -> str:
        told = f"{name}, {self.unit}" if self.unit else name
        return told if self.neutral is None else f"{told} (neutral: {self.neutral:g})"

    def differences(self, other: str) -> list[float]:
        """Of the words' arm to another, for each seed that both have."""
        ours, theirs = (
            {
                seed: value if self.neutral is None else abs(value - self.neutral)
                for seed, value in self.values.get(arm, {}).items()
            }
            for arm in (WORDS, other)
        )
        return [ours[seed] - theirs[seed] for seed in sorted(ours) if seed in theirs]


def columns_of(rows: Sequence[Record]) -> dict[str, Column]:
    """Every column with what was measured, and behind the tasks of GLUE their mean."""
    found: dict[str, Column] = {}
    for row in store.latest(rows, ("contender", "seed", "measure")):
        for name, value in row["figures"].items():
            column = found.setdefault(name, Column(row["units"][name], row["neutral"][name], {}))
            if value is not None:
                column.values.setdefault(row.contender, {})[row["seed"]] = value
    tasks = [column for name, column in found.items() if name.startswith(_GLUE)]
    if len(tasks) > 1:
        mean: Values = {}
        for arm in (BASE, *ARMS):
            seeds = set.intersection(*({*each.values.get(arm, {})} for each in tasks))
            mean[arm] = {seed: fmean(each.values[arm][seed] for each in tasks) for seed in seeds}
        found[f"{_GLUE}mean of {len(tasks)}"] = Column("%", None, mean)
    return found


def tests_of(columns: Mapping[str, Column]) -> tuple[Family, dict[tuple[str, str], dict[str, Any]]]:
    """The family, and of each (column, other arm) what came out."""
    family = Family(len(columns) * len(AGAINST))
    pairs = {
        (name, other): found
        for name, column in columns.items()
        for other in AGAINST
        if (found := column.differences(other))
    }
    confidence = family.confidence_of_each
    intervals = {key: mean_interval(found, confidence=confidence) for key, found in pairs.items()}
    judged = family.judged(intervals)
    t_values = {key: p for key, found in pairs.items() if (p := _paired_t(found)) is not None}
    adjusted = dict(zip(t_values, holm([*t_values.values()], family.tests), strict=True))
    for key, entry in judged.items():
        entry["seeds"] = len(pairs[key])
        entry["p_t"], entry["p_t_holm"] = t_values.get(key), adjusted.get(key)
        neutral, p = columns[key[0]].neutral, entry["p_t_holm"]
        lower, higher = (LOWER, HIGHER) if neutral is None else (CLOSER, FARTHER)
        entry["verdict"] = reworded(entry["verdict"], lower, higher)
        told = lower if entry["mean"] < 0 else higher
        # Of fewer seeds nobody can see whether their differences are anywhere near normal.
        by_t = p is not None and p <= LEVEL and entry["seeds"] >= SEEDS.value
        entry["by_t"] = told if by_t else None
    return family, judged


def _paired_t(differences: Sequence[float]) -> float | None:
    """The two-sided p-value of Student's paired t test; None without a spread to judge by."""
    from scipy.special import stdtr

    n = len(differences)
    spread = stdev(differences) if n > 1 else 0.0
    if spread == 0.0:
        return None
    return 2.0 * float(stdtr(n - 1, -abs(fmean(differences)) / (spread / math.sqrt(n))))


def seeds_for_a_verdict(tests: int) -> int:
    """The fewest whose sign flips can reach the level in a family of so many tests."""
    return max(FEWEST, 1 + math.ceil(math.log2(tests / LEVEL)))


def case(settings: Mapping[str, Any]) -> str:
    odd = settings["not the paper's"]
    kept = f"the paper's settings but for {', '.join(odd)}" if odd else "the paper's settings"
    return f"{settings['model']}, {settings['method']}, {kept}"


def as_json(rows: Sequence[Record]) -> str:
    columns, settings = columns_of(rows), rows[-1]["settings"]
    family, judged = tests_of(columns)
    described = {
        name: {
            "unit": column.unit,
            "neutral": column.neutral,
            "paper": FIGURES.get((settings["method"], name)),
            "arms": {
                arm: [{"seed": seed, "value": value} for seed, value in found.items()]
                for arm, found in column.values.items()
            },
        }
        for name, column in columns.items()
    }
    results = {
        "settings": settings,
        "sources of the settings": _sources(settings),
        "columns": described,
        "family": family.to_dict(),
        "tests": [{"column": c, "words against": o, **found} for (c, o), found in judged.items()],
        "made by": tables.provenance_lines(rows),
    }
    return json.dumps(results, indent=1, allow_nan=False)


def as_markdown(rows: Sequence[Record]) -> str:
    columns, settings = columns_of(rows), rows[-1]["settings"]
    family, judged = tests_of(columns)
    arms = (BASE, *ARMS)
    shown = [
        [
            column.title(name),
            *(_mean(column, arm) for arm in arms),
            FIGURES.get((settings["method"], name), ""),
        ]
        for name, column in columns.items()
    ]
    tested = [
        [
            name,
            NAMES[other],
            _interval(found),
            *("none" if p is None else f"{p:.2g}" for p in (found["p_t_holm"], found["p_holm"])),
            found["verdict"],
        ]
        for (name, other), found in judged.items()
    ]
    against = ["column", "against", "difference", "p, paired t", "p, sign flips", "verdict"]
    parts = [
        f"# {markdown.text(rows[-1].case)}",
        markdown.text(_summary(judged)),
        "\n".join(markdown.table(["column", *(NAMES[arm] for arm in arms), "the paper"], shown)),
        "Means over seeds (their number). Before training only heads depend on the seed.",
        "## Gender words against the other arms, seed by seed",
        "\n".join(markdown.table(against, tested)),
        f"{family.tests} tests are one family: p-values are Holm's, intervals simultaneous "
        "(Bonferroni, Student's t). Where a column has a neutral value, the difference is that of "
        "the distances to it. A verdict takes both the interval and sign flips at p <= 0.05, and "
        f"so {seeds_for_a_verdict(family.tests)} seeds in this table. Paired t tests claim "
        f"something from {SEEDS.value} seeds on, and assume normal differences.",
        "## Settings and their sources",
        "\n".join(markdown.table(["setting", "value", "source"], _sources(settings))),
        "Departures: " + "; ".join((*PUBLISHED[settings["method"]].departures, *_DEPARTURES)) + ".",
        *tables.provenance_lines(rows),
    ]
    return "\n\n".join(parts)


_DEPARTURES = (
    "rows held out of the training's own measure collapse and fluency",
    "StereoSet (within sentences) and CrowS-Pairs on gender, scored as docs/methods.md says",
    "WinoBias by likelihood, in place of a coreference system trained on OntoNotes: other figures",
    "the last checkpoint counts, no best one is chosen",
    "Bias-in-Bios is not measured",
)


def _summary(judged: Mapping[Any, Mapping[str, Any]]) -> str:
    """What may be said of the term on the gender words against none."""
    against_none = {name: found for (name, other), found in judged.items() if other == NONE}
    said = [f"{n}: {f['verdict']}" for n, f in against_none.items() if direction(f["verdict"])]
    by_t = [f"{name}: {found['by_t']}" for name, found in against_none.items() if found["by_t"]]
    return (
        "The term on the gender words, against none. Verdicts of a change: "
        f"{'; '.join(said) or 'none'}. By paired t tests alone, which assume normal differences: "
        f"{'; '.join(by_t) or 'none'}."
    )


def _sources(settings: Mapping[str, Any]) -> list[list[str]]:
    published = {**vars(PUBLISHED[settings["method"]]), "shift": SHIFT, "warmup": WARMUP}
    published |= {"head of Bias-NLI": NLI_HEAD, "heads of GLUE": GLUE_HEAD}
    del published["departures"]
    used = {**settings, "data": settings["data"][:-1]}
    found = []
    if "steps" in settings:
        del published["epochs"]
    for name, entry in published.items():
        value = entry.value
        if name == "data":
            value = used["data"] if value is None else list(map(public_source, value))
        is_own = used.get(name, value) != value
        source = "given on the command line" if is_own else entry.source
        shown = used.get(name, value)
        found.append([name, ", ".join(shown) if name == "data" else str(shown), source])
    if (commit := settings.get("revision of the model")) is not None:
        found.append(["revision of the model", commit, "what the hub id stood for"])
    given = [name for name in settings["not the paper's"] if name not in published]
    return [*found, *([name, str(settings[name]), "given on the command line"] for name in given)]


def _mean(column: Column, arm: str) -> str:
    found = list(column.values.get(arm, {}).values())
    if not found:
        return NOT_MEASURED
    return f"{fmean(found):.4g} ({len(found)})"


def _interval(found: Mapping[str, Any]) -> str:
    if found["low"] is None:
        return f"{found['mean']:+.4g}"
    if found["low"] == found["high"]:
        # As if it were certain: differences that are all alike have no spread to judge by.
        return f"{found['mean']:+.4g} (alike in all {found['seeds']} seeds)"
    return f"{found['mean']:+.4g} [{found['low']:+.4g}, {found['high']:+.4g}]"
