"""What became of a part: by its status, what its tests noted, and what it said."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.plan import RECORDS, SANITIZER, TESTS, Part
from benchmarks.gpu.sanitized import FOUND, REFUSED
from benchmarks.harness.gate import covered

PASSED, FAILED, CUT, SKIPPED, REFUSAL = "passed", "failed", "cut", "skipped", "refused"
_MOST_LINES, _MOST_LETTERS = 5, 200


@dataclass(frozen=True)
class Outcome:
    """Attributes:
    status: PASSED, FAILED, CUT (ended before its end, by its limit or that of all parts), SKIPPED
        (not started) or REFUSAL (cannot run here).
    reason: why it did not pass, in one line.
    lines: of its failures, the first ones.
    tests: how many of them passed, failed, were skipped.
    covered: names that stand for the tests that passed.
    stamp: what it was run with.
    """

    status: str
    seconds: float = 0.0
    reason: str = ""
    lines: list[str] = field(default_factory=list)
    tests: dict[str, int] = field(default_factory=dict)
    covered: list[str] = field(default_factory=list)
    stamp: str = ""


def judged(
    part: Part, status: int | None, seconds: float, log: Path, notes: Path, cut_by: str, stamp: str
) -> Outcome:
    """Args:
    status: of the process, negative for a signal.
    cut_by: what ended it before its end; "" where it ended by itself.
    """
    said = log.read_text("utf-8", "replace").splitlines() if log.is_file() else []
    found = _noted(notes)
    tests = dict(Counter(outcome for outcome, _ in found.values()))
    tests.pop("started", None)
    lines = [f"{test}: {why}" for test, (outcome, why) in found.items() if outcome == "failed"]
    verdict, reason = _verdict(part, status, said, tests)
    if cut_by:
        verdict, reason = CUT, cut_by
        at = [test for test, (outcome, _) in found.items() if outcome == "started"]
        lines = [*lines, *(f"was running: {test}" for test in at)] or said[-1:]
    elif verdict != PASSED and (not lines or status == FOUND):
        lines = _telling(part, said)
    whole = {} if cut_by else {test: outcome for test, (outcome, _) in found.items()}
    return Outcome(
        verdict,
        round(seconds, 1),
        _clean(reason),
        [_clean(line) for line in lines[:_MOST_LINES]],
        tests,
        # Of a run that was cut nobody knows which tests it had still to come to.
        covered(whole) if part.kind == TESTS and status in (0, 1) else [],
        stamp,
    )


def _verdict(
    part: Part, status: int | None, said: Sequence[str], tests: dict[str, int]
) -> tuple[str, str]:
    if status == REFUSED and part.kind not in (TESTS, RECORDS):
        return REFUSAL, next((line for line in said if line.startswith("refused: ")), "refused")
    if status == FOUND and part.kind == SANITIZER:
        return FAILED, f"{part.tool} found something"
    if status is None or status < 0:
        return FAILED, f"killed by signal {-(status or 0)}"
    if tests.get("failed"):
        return FAILED, f"{tests['failed']} of {sum(tests.values())} tests failed"
    if status:
        return FAILED, f"ended with status {status}"
    if part.kind in (TESTS, SANITIZER) and not tests.get("passed"):
        return FAILED, "ended without a test that passed"
    used_up = [line for line in said if "the time is used up" in line]
    if part.kind == RECORDS and used_up:
        return CUT, used_up[-1]
    return PASSED, ""


def _noted(notes: Path) -> dict[str, tuple[str, str]]:
    """Test -> (how it ended, or "started", and why); a failure is never taken back."""
    found: dict[str, tuple[str, str]] = {}
    lines = notes.read_text("utf-8", "replace").splitlines() if notes.is_file() else []
    for line in lines:
        try:
            note = json.loads(line)
            test, outcome, why = (str(note[name]) for name in ("test", "outcome", "why"))
        except (ValueError, KeyError, TypeError):
            continue  # cut off, or no note at all
        if found.get(test, ("",))[0] != "failed":
            found[test] = (outcome, why)
    return found


def _telling(part: Part, said: Sequence[str]) -> list[str]:
    """The lines of an output that say what went wrong; the last ones where none does."""
    mark = r"^=========.*\w" if part.kind == SANITIZER else r"error|not measured: |refused: "
    marked = [line for line in said if re.search(mark, line, re.IGNORECASE)]
    return marked or list(said[-_MOST_LINES:])


def _clean(line: str) -> str:
    """One short line that can be read, whatever was printed."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in line.strip())
    return shown if len(shown) <= _MOST_LETTERS else f"{shown[:_MOST_LETTERS]}..."
