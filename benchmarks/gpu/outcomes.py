"""What became of a part: by its status, what its tests noted, and what it said."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.plan import RECORDS, SANITIZER, TESTS, Part
from benchmarks.gpu.sanitized import FOUND, REFUSED
from benchmarks.harness.gate import covered

# CUT: ended before its end; SKIPPED: not started; REFUSAL: it cannot run here.
PASSED, FAILED, CUT, SKIPPED, REFUSAL = "passed", "failed", "cut", "skipped", "refused"
_MOST_LINES, _MOST_LETTERS = 5, 200


@dataclass(frozen=True)
class Outcome:
    """Attributes:
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
    status: of the process, negative for a signal; None where it was cut.
    cut_by: by what; "" where it ended by itself.
    """
    said = log.read_text("utf-8", "replace").splitlines() if log.is_file() else []
    noted = _noted(notes)
    ended = {test: outcome for test, (outcome, _) in noted.items()}
    tests = dict(Counter(outcome for outcome in ended.values() if outcome != "started"))
    lines = [f"{test}: {why}" for test, (outcome, why) in noted.items() if outcome == "failed"]
    if cut_by:
        verdict, reason = CUT, cut_by
        running = [test for test, outcome in ended.items() if outcome == "started"]
        lines = [*lines, *(f"was running: {test}" for test in running)] or said[-1:]
    else:
        verdict, reason = _verdict(part, status, said, tests)
        if verdict != PASSED and (not lines or status == FOUND):
            lines = _telling_lines(part, said)
    # Of a run that was cut nobody knows which tests it had still to come to.
    whole = part.kind == TESTS and not cut_by and status in (0, 1)
    lines = [_clean(line) for line in lines[:_MOST_LINES]]
    passed = covered(ended) if whole else []
    return Outcome(verdict, round(seconds, 1), _clean(reason), lines, tests, passed, stamp)


def _verdict(
    part: Part, status: int, said: Sequence[str], tests: Mapping[str, int]
) -> tuple[str, str]:
    if status == REFUSED and part.kind not in (TESTS, RECORDS):
        return REFUSAL, next((line for line in said if line.startswith("refused: ")), "refused")
    if status == FOUND and part.kind == SANITIZER:
        return FAILED, "the sanitizer found something"
    if status < 0:
        return FAILED, f"killed by signal {-status}"
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
    """Test -> (how it ended, or "started"; why). A failure is never taken back."""
    noted: dict[str, tuple[str, str]] = {}
    for line in notes.read_text("utf-8", "replace").splitlines() if notes.is_file() else []:
        try:
            note = json.loads(line)
            test, outcome, why = (str(note[name]) for name in ("test", "outcome", "why"))
        except (ValueError, KeyError, TypeError):
            continue  # cut off
        if noted.get(test, ("",))[0] != "failed":
            noted[test] = (outcome, why)
    return noted


def _telling_lines(part: Part, said: Sequence[str]) -> list[str]:
    """The lines of an output that say what went wrong; the last ones where none does."""
    mark = r"^=========.*\w" if part.kind == SANITIZER else r"error|not measured: |refused: "
    marked = [line for line in said if re.search(mark, line, re.IGNORECASE)]
    return marked or list(said[-_MOST_LINES:])


def _clean(line: str) -> str:
    """One short line that can be read, whatever was printed."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in line.strip())
    return shown if len(shown) <= _MOST_LETTERS else f"{shown[:_MOST_LETTERS]}..."
