"""The tests that have to pass before anything is measured, and which of them have been seen to."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import store
from benchmarks.harness.store import Record

OP = "gate"


def passes(tests: Sequence[str], on_gpu: bool) -> bool:
    """Run the tests; on a GPU none of them may skip for want of one."""
    command = [sys.executable, "-m", "pytest", *tests, "-q"]
    variables = {**os.environ, **({"FASTDEAN_REQUIRE_GPU": "1"} if on_gpu else {})}
    done = subprocess.run(command, cwd=store.ROOT, stdout=sys.stderr, env=variables)
    return done.returncode == 0


def test_files(*names: str) -> tuple[str, ...]:
    """Where each test_NAME.py lies, whatever folder of tests/ that is; ValueError without it."""
    found = []
    for name in names:
        [path] = (store.ROOT / "tests").rglob(f"test_{name}.py")
        found.append(path.relative_to(store.ROOT).as_posix())
    return tuple(found)


def passed_before(tests: Sequence[str], out: Path, here: Mapping[str, Any]) -> bool:
    """Whether earlier runs that wrote to `out` have seen all of them pass, nothing changed."""
    rows = [row for row in store.read(out, OP) if store.is_of(row, here)]
    seen = {test for row in rows for test in row["tests"]}
    return all(is_covered(test, seen) for test in tests)


def seen_to_pass(tests: Sequence[str], here: Mapping[str, Any]) -> Record:
    """Tests that passed on these sources and this machine, to be remembered."""
    return Record(OP, "", "", setup={"tests": list(tests)}, environment=dict(here))


def covered(outcomes: Mapping[str, str]) -> list[str]:
    """The fewest names that stand for all that passed, and for nothing that did not.

    Args:
        outcomes: of every test of a run, or of a file that could not be read: "passed", "skipped"
            or anything else.
    """
    found: dict[str, None] = {}
    for test, outcome in outcomes.items():
        if outcome != "passed":
            continue
        for level in (_file, _function, str):
            name = level(test)
            alike = {each for other, each in outcomes.items() if level(other) == name}
            if alike <= {"passed", "skipped"}:
                found[name] = None
                break
    return list(found)


def is_covered(test: str, seen: Collection[str]) -> bool:
    """Whether a file, a test or a case of one is among `seen`, or part of what is."""
    return any(each in seen for each in (test, _function(test), _file(test)))


def _file(test: str) -> str:
    return test.partition("::")[0]


def _function(test: str) -> str:
    return test.partition("[")[0]
