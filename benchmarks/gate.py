"""The tests that have to pass before anything is measured."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import records
from records import Environment

PASSED, SKIPPED = "passed", "skipped"


@dataclass(frozen=True)
class GateRecord:
    """Tests that passed on these sources and this machine."""

    op: str
    tests: tuple[str, ...]


def passes(tests: Sequence[str], on_gpu: bool) -> bool:
    """Run the tests; on a GPU none of them may skip for want of one."""
    command = [sys.executable, "-m", "pytest", *tests, "-q", "-x"]
    variables = {**os.environ, **({"FASTDEAN_REQUIRE_GPU": "1"} if on_gpu else {})}
    done = subprocess.run(command, cwd=records.ROOT, stdout=sys.stderr, env=variables)
    return done.returncode == 0


def passed_before(tests: Sequence[str], out: Path, environment: Environment) -> bool:
    """Whether an earlier run that wrote to `out` has seen all of them pass, nothing changed."""
    return any(
        set(tests) <= set(row["tests"])
        and all(row[key] == vars(environment)[key] for key in ("device", "sources", "torch"))
        for row in records.read(out, "gate")
    )


def remember(tests: Sequence[str], out: Path, environment: Environment) -> None:
    records.append(out, "gate", environment, GateRecord("gate", tuple(tests)))
