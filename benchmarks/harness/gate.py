"""The tests that have to pass before anything is measured."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import records
from covered import is_covered
from records import Environment

PASSED, SKIPPED = "passed", "skipped"


@dataclass(frozen=True)
class GateRecord:
    """Tests that passed on these sources and this machine."""

    op: str
    tests: tuple[str, ...]


def passes(tests: Sequence[str], on_gpu: bool) -> bool:
    """Run the tests; on a GPU none of them may skip for want of one."""
    command = [sys.executable, "-m", "pytest", *tests, "-q"]
    variables = {**os.environ, **({"FASTDEAN_REQUIRE_GPU": "1"} if on_gpu else {})}
    done = subprocess.run(command, cwd=records.ROOT, stdout=sys.stderr, env=variables)
    return done.returncode == 0


def passed_before(tests: Sequence[str], out: Path, environment: Environment) -> bool:
    """Whether earlier runs that wrote to `out` have seen all of them pass, nothing changed."""
    seen = {
        test
        for row in records.read(out, "gate")
        if all(row.get(key) == vars(environment)[key] for key in records.SAME_CODE)
        for test in row["tests"]
    }
    return all(is_covered(test, seen) for test in tests)


def remember(tests: Sequence[str], out: Path, environment: Environment) -> None:
    records.append(out, "gate", environment, GateRecord("gate", tuple(tests)))
