"""The page that is read first: what passed, what failed, what was measured, what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.gpu.aims import Figure
from benchmarks.gpu.outcomes import CUT, FAILED, REFUSAL, SKIPPED, Outcome

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
    lines += ["## Figures against their aims", "", "| aim | | figure |", "|---|---|---|"]
    lines += [_row(each.aim, _MET[each.met], each.text) for each in figures]
    sound = "passed its tests on a CPU, which proves nothing" if rehearsal else "passed all checks"
    lines += ["", "## Forms", "", *(f"- {name}: {lack or sound}" for name, lack in forms.items())]
    lines += ["", "## Parts", "", "| part | | seconds | tests | |", "|---|---|---|---|---|"]
    for name in parts:
        outcome = outcomes.get(name)
        if name in running:
            lines.append(_row(name, "running", f"{running[name]:.0f}", "", ""))
        elif outcome is None:
            lines.append(_row(name, "not yet", "", "", ""))
        else:
            tests = ", ".join(f"{number} {kind}" for kind, number in sorted(outcome.tests.items()))
            seconds = f"{outcome.seconds:.0f}"
            lines.append(_row(name, outcome.status, seconds, tests, outcome.reason))
    ended = {name: outcomes[name] for name in parts if name in outcomes and name not in running}
    for status, title in _TITLES.items():
        named = {name: each for name, each in ended.items() if each.status == status}
        lines += ["", f"## {title}", ""] if named else []
        for name, outcome in named.items():
            lines.append(f"- {name}: {outcome.reason}")
            lines += [f"  - `{line.replace('`', chr(39))}`" for line in outcome.lines]
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    shown = (cell.replace("|", "/") for cell in cells)
    return f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in shown)}|"
