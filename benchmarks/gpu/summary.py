"""The page that is read first: what passed, what failed, what was measured, what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.gpu.aims import Figure
from benchmarks.gpu.outcomes import CUT, FAILED, REFUSAL, SKIPPED, Outcome
from benchmarks.harness.tables import markdown

_TITLES = {FAILED: "Failed", CUT: "Cut", REFUSAL: "Refused", SKIPPED: "Not started"}
_MET = {True: "met", False: "NOT MET", None: "missing"}


def rendered(
    state: str,
    facts: Mapping[str, str],
    parts: Sequence[str],
    outcomes: Mapping[str, Outcome],
    running: Mapping[str, float],
    figures: Sequence[Figure],
    forms: Mapping[str, str],
    *,
    rehearsal: bool,
) -> str:
    """Args:
    state: where the run stands, in one line.
    parts: their names, in order.
    running: the parts that run, with their seconds so far.
    forms: form -> what it lacks to be a checked one; "" if nothing.
    """
    lines = ["# The first minutes on a GPU", ""]
    if rehearsal:
        lines += ["**A rehearsal on a CPU: nothing ran on a GPU, no figure is one of it.**", ""]
    lines += [state, "", ", ".join(f"{name} {value}" for name, value in facts.items()), ""]
    met = [[each.aim, _MET[each.met], each.text] for each in figures]
    lines += ["## Figures against their aims", "", *_table(["aim", "", "figure"], met)]
    sound = "passed its tests on a CPU, which proves nothing" if rehearsal else "passed all checks"
    lines += ["", "## Forms", "", *(f"- {name}: {lack or sound}" for name, lack in forms.items())]
    rows = []
    for name in parts:
        outcome = outcomes.get(name)
        if name in running:
            rows.append([name, "running", f"{running[name]:.0f}", "", ""])
        elif outcome is None:
            rows.append([name, "not yet", "", "", ""])
        else:
            tests = ", ".join(f"{number} {kind}" for kind, number in sorted(outcome.tests.items()))
            seconds = f"{outcome.seconds:.0f}"
            rows.append([name, outcome.status, seconds, tests, outcome.reason])
    lines += ["", "## Parts", "", *_table(["part", "", "seconds", "tests", ""], rows)]
    ended = {name: outcomes[name] for name in parts if name in outcomes and name not in running}
    for status, title in _TITLES.items():
        named = {name: each for name, each in ended.items() if each.status == status}
        lines += ["", f"## {title}", ""] if named else []
        for name, outcome in named.items():
            lines.append(f"- {name}: {outcome.reason}")
            lines += [f"  - `{line.replace('`', chr(39))}`" for line in outcome.lines]
    return "\n".join(lines) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return markdown(header, [[cell.replace("|", "/") for cell in row] for row in rows])
