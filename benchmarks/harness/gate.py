"""The tests that have to pass before anything is measured, and which of them have passed before."""

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
_FILES = {path.stem: path for path in sorted((store.ROOT / "tests").rglob("test_*.py"))}


def test_files(*names: str) -> tuple[str, ...]:
    """Where each test_NAME.py lies, in whatever folder of tests/."""
    return tuple(_FILES[f"test_{name}"].relative_to(store.ROOT).as_posix() for name in names)


# Operation -> the tests before it is timed by itself.
OPERATIONS: dict[str, tuple[str, ...]] = {
    "importance": test_files("importance_op"),
    "selection": test_files("selection_op", "selection_kernel"),
    "unit_importance": test_files("importance_op"),
    "expert_importance": test_files("expert_importance_op"),
    "select_importance": test_files(
        "importance_selection_op", "expert_selection_op", "importance_selection_kernel"
    ),
    "mask": test_files("mask_op", "edits", "toggling"),
    "collapse": test_files("collapse_op"),
}
[_REPEATABLE] = test_files("repeatable")
# Followed by [OPERATION-DTYPE-triton].
REPEATS = f"{_REPEATABLE}::test_an_op_repeats_its_bits"


def score_tests(on_gpu: bool) -> tuple[str, ...]:
    """Before `fastdean.score` is timed; test_score.py runs on the CPU, a GPU runs the kernels."""
    if not on_gpu:
        return test_files("score")
    return (
        *test_files("score", "score_kernels"),
        f"{_REPEATABLE}::test_a_deterministic_run_of_score_repeats_its_bits",
        *(f"{REPEATS}[weight_sums-torch.{dtype}-triton]" for dtype in ("float32", "bfloat16")),
    )


def passes(tests: Sequence[str], on_gpu: bool) -> bool:
    """Run the tests; on a GPU none of them may skip for want of one."""
    command = [sys.executable, "-m", "pytest", *tests, "-q"]
    variables = {**os.environ, **({"FASTDEAN_REQUIRE_GPU": "1"} if on_gpu else {})}
    done = subprocess.run(command, cwd=store.ROOT, stdout=sys.stderr, env=variables)
    return done.returncode == 0


def passed_before(tests: Sequence[str], out: Path, here: Mapping[str, Any]) -> bool:
    """Whether runs that wrote to `out` have seen all of them pass, with nothing changed since."""
    rows = [row for row in store.read(out, OP) if store.is_of(row, here)]
    seen = {test for row in rows for test in row["tests"]}
    return all(is_covered(test, seen) for test in tests)


def record_passed(tests: Sequence[str], out: Path, here: Mapping[str, Any]) -> None:
    """Remember tests that passed on these sources and this machine."""
    store.append(out, Record(OP, "", "", setup={"tests": list(tests)}, environment=dict(here)))


def covered(outcomes: Mapping[str, str]) -> list[str]:
    """The fewest names (files, tests, cases) that stand for all that passed and nothing else.

    Args:
        outcomes: of every test of a run, or of a file that could not be read: "passed", "skipped"
            or anything else.
    """
    bad = [test for test, outcome in outcomes.items() if outcome not in ("passed", "skipped")]
    bad = {name for test in bad for name in _names(test)}
    passed = [test for test, outcome in outcomes.items() if outcome == "passed"]
    return list(dict.fromkeys(next((n for n in _names(t) if n not in bad), t) for t in passed))


def is_covered(test: str, seen: Collection[str]) -> bool:
    """Whether a file, a test or a case of one is among `seen`, or part of one that is."""
    return any(name in seen for name in _names(test))


def _names(test: str) -> tuple[str, str, str]:
    """Its file, its function and itself."""
    return test.partition("::")[0], test.partition("[")[0], test
