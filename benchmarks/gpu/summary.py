"""The page that is read first: what passed, what failed, what was measured, what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.gpu.aims import Figure
from benchmarks.gpu.outcomes import CUT, FAILED, PASSED, REFUSAL, SKIPPED, Outcome
from benchmarks.gpu.plan import Part


def rendered(
    state: str,
    facts: Mapping[str, str],
    parts: Sequence[Part],
    outcomes: Mapping[str, Outcome],
    running: Mapping[str, float],
    figures: Sequence[Figure],
    forms: Mapping[str, str],
    *,
    rehearsal: bool,
) -> str:
    """Args:
    state: where the run stands, in one line.
    running: the parts on their way, with their seconds so far.
    forms: form -> what it lacks to be a checked one; "" if nothing.
    """
    lines = ["# The first minutes on a GPU", ""]
    if rehearsal:
        lines += ["**A rehearsal on a CPU: nothing ran on a GPU, no figure is one of it.**", ""]
    lines += [state, "", ", ".join(f"{name} {value}" for name, value in facts.items()), ""]
    lines += ["## Figures against their aims", "", "| aim | | figure |", "|---|---|---|"]
    word = {True: "met", False: "NOT MET", None: "missing"}
    lines += [f"| {_cell(each.aim)} | {word[each.met]} | {_cell(each.text)} |" for each in figures]
    lines += ["", "## Forms", ""]
    sound = "passed its tests on a CPU, which proves nothing" if rehearsal else "passed all checks"
    lines += [f"- {name}: {lack or sound}" for name, lack in forms.items()]
    lines += ["", "## Parts", "", "| part | | seconds | tests | |", "|---|---|---|---|---|"]
    lines += [_row(part.name, outcomes.get(part.name), running) for part in parts]
    for status, title in (
        (FAILED, "Failed"),
        (CUT, "Cut"),
        (REFUSAL, "Refused"),
        (SKIPPED, "Not started"),
    ):
        named = [part.name for part in parts if _status(part.name, outcomes, running) == status]
        if named:
            lines += ["", f"## {title}", ""]
        for name in named:
            lines.append(f"- {name}: {outcomes[name].reason}")
            lines += [f"  - `{line.replace('`', chr(39))}`" for line in outcomes[name].lines]
    return "\n".join(lines) + "\n"


def _status(name: str, outcomes: Mapping[str, Outcome], running: Mapping[str, float]) -> str | None:
    return outcomes[name].status if name in outcomes and name not in running else None


def _row(name: str, outcome: Outcome | None, running: Mapping[str, float]) -> str:
    if name in running:
        return f"| {name} | running | {running[name]:.0f} | | |"
    if outcome is None:
        return f"| {name} | not yet | | | |"
    counts = outcome.tests
    tests = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))
    why = "" if outcome.status == PASSED else _cell(outcome.reason)
    return f"| {name} | {outcome.status} | {outcome.seconds:.0f} | {tests} | {why} |"


def _cell(text: str) -> str:
    return text.replace("|", "/")
