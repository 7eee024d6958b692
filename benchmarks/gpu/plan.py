"""What `make gpu-first` runs, as data: stages in the order of their worth; `first.py` runs them.

The parts of a stage run beside each other; the next stage starts when all of them have ended.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness import gate
from benchmarks.harness.gate import OPERATIONS, REPEATS, score_tests, test_files

TESTS, SANITIZER, RECORDS, TOOL = "tests", "sanitizer", "records", "tool"
TARGETS = ("first", "check", "sanitize", "bench")


@dataclass(frozen=True)
class Part:
    """A process with a limit of its own.

    Attributes:
        kind: TESTS (pytest), SANITIZER (pytest under compute-sanitizer), RECORDS (`python -m
            benchmarks`) or TOOL.
        command: what follows `python`.
        limit: seconds after which it is ended.
        least: seconds below which it is not worth starting.
        needs: parts, of an earlier stage, that have to have passed.
        needs_tests: files or tests that have to have passed, in whatever part.
        native: whether it takes the compiled extension, and so differs without one.
        workers: its processes.
    """

    name: str
    kind: str
    command: tuple[str, ...]
    limit: float
    least: float = 15
    needs: tuple[str, ...] = ("machine",)
    needs_tests: tuple[str, ...] = ()
    native: bool = True
    workers: int = 1


Stage = Sequence[Part]
_TOOLS = ("memcheck", "racecheck")

# Name -> processes, and the files; Triton's kernels do not wait for the extension.
_TRITON = {
    "importance": (4, "importance_op"),
    "selection": (3, "selection_op", "selection_kernel"),
    "experts": (2, "expert_importance_op"),
    "fused": (2, "importance_selection_op", "expert_selection_op", "importance_selection_kernel"),
}
_NATIVE = {
    "collapse": (2, "collapse_op"),
    "masks": (2, "mask_op", "edits", "toggling"),
    "repeatable": (2, "repeatable"),
    "score": (
        3,
        "score",
        "fp32_products",
        "score_kernels",
        "score_losses",
        "score_state",
        "varlen",
    ),
}
# Nothing that is measured or sanitized rests on these.
_OTHER = {
    "host": (1, "no_host_in_the_loop"),
    "other": (2, "token_blocks", "coupling", "distributed", "ahead"),
}
# What is sanitized of an operation, awkward strides and lengths and sizes that no tile divides:
# the file, and its tests.
_SANITIZED = {
    "collapse": (
        "collapse_op",
        "test_cuda_is_within_the_budget_and_repeats_bit_for_bit",
        "test_on_cuda_labels_out_of_range_show_as_a_loss_of_nan",
    ),
    "masks": (
        "mask_op",
        "test_cuda_clears_what_the_cpu_clears",
        "test_cuda_gathers_and_writes_what_the_cpu_does",
    ),
    "importance": (
        "importance_op",
        "test_strides_do_not_matter",
        "test_numbers_and_lengths_of_examples",
        "test_a_long_example_beside_a_short_one",
    ),
    "selection": ("repeatable", "test_an_op_repeats_its_bits[selection-torch.bfloat16-triton]"),
    "experts": ("expert_importance_op", "test_every_expert_gets_its_own_examples"),
    "fused": (
        "importance_selection_kernel",
        "test_the_tiles_with_the_largest_entries_are_computed_again",
        "test_where_all_tiles_reach_the_bound_sums_are_made_after_all",
    ),
    "units": ("repeatable", "test_an_op_repeats_its_bits[unit_sums-torch.bfloat16-triton]"),
}
# Operation -> seconds after which nothing new is measured of it.
_MEASURED = {
    "importance": 40,
    "selection": 20,
    "mask": 20,
    "collapse": 35,
    "unit_importance": 10,
    "expert_importance": 15,
    "select_importance": 10,
}
_SCORE = ("score", "--dtype", "bf16", "--random-model")
_SCORE_7B = (*_SCORE, "qwen2-7b", "--examples", "128", "--profile")
_TOY = (*_SCORE, "toy", "--examples", "4")


def stages(target: str, out: Path, work: Path, *, rehearsal: bool) -> list[Stage]:
    """The target's stages, with those they rest on."""
    rehearse = ("--rehearsal",) if rehearsal else ()
    machine = ("-m", "benchmarks.gpu.prerequisites", *rehearse)
    build = ("-m", "benchmarks.gpu.build_extension", str(work / "extension"))
    native = _NATIVE | (_OTHER if target in ("first", "check") else {})
    found: list[Stage] = [
        [Part("machine", TOOL, machine, 90, needs=(), native=False)],
        [Part("build", TOOL, build, 240, native=False), *_tests(_TRITON, rehearsal, native=False)],
        _tests(native, rehearsal),
    ]
    if target in ("first", "sanitize"):
        tool = ("-m", "benchmarks.gpu.sanitized")
        found.append([Part("sanitizer", TOOL, tool, 60, native=False)])
        found.append([_sanitized(name, tool) for name in _SANITIZED for tool in _TOOLS])
    if target in ("first", "bench"):
        found += [[part] for part in _measured(out, rehearsal, more=target == "bench")]
    return found


def _pytest(*more: str) -> tuple[str, ...]:
    plugins = ("-p", "no:cacheprovider", "-p", "benchmarks.gpu.watched_tests")
    return ("-q", "--tb=short", "--durations=5", *plugins, "-o", "faulthandler_timeout=60", *more)


def _tests(groups: dict[str, tuple], rehearsal: bool, *, native: bool = True) -> list[Part]:
    parts = []
    for name, (workers, *files) in groups.items():
        options = ["-p", "benchmarks.gpu.interpreted"] if rehearsal else []
        workers = min(workers, os.cpu_count() or 1)
        if workers > 1 and importlib.util.find_spec("xdist") is not None:
            options += ["-p", "xdist.plugin", "-n", str(workers)]
        command = ("-m", "pytest", *_pytest(*options, *test_files(*files)))
        parts.append(Part(f"tests-{name}", TESTS, command, 150, native=native, workers=workers))
    return parts


def _sanitized(name: str, tool: str) -> Part:
    file, *tests = _SANITIZED[name]
    [path] = test_files(file)
    named = (f"{path}::{test}" for test in tests)
    command = ("-m", "benchmarks.gpu.sanitized", tool, *_pytest("-k", "not reference", *named))
    return Part(f"{tool}-{name}", SANITIZER, command, 150, needs=("machine", "sanitizer", "build"))


def _measured(out: Path, rehearsal: bool, *, more: bool) -> list[Part]:
    """`more`: further than the first ten minutes reach."""
    both = ("--impl", "loop", "--impl", "fastdean")
    # Name, seconds, least, and what is asked of `python -m benchmarks` on a GPU and here.
    asked = [
        (op, seconds, 25, ("kernels", "--op", op), ("kernels", "--toy", "--op", op))
        for op, seconds in _MEASURED.items()
    ]
    asked += [("score", 170, 60, (*_SCORE_7B, "--repeats", "2", *both), (*_TOY, *both))]
    if more:
        sweep, toy = (("sweep", "--random-model", name) for name in ("qwen2-7b", "toy"))
        asked += [("all-of-score", 355, 120, (*_SCORE_7B, "--vmap"), (*_TOY, "--vmap"))]
        asked += [("sweep", 355, 60, sweep, (*toy, "--repeats", "1"))]
    shared = ["--device", *(("cpu", "--rehearsal") if rehearsal else ("cuda",))]
    shared += ["--out", str(out / "results"), "--resume", "--tested", "--seconds"]
    parts = []
    for name, seconds, least, there, here in asked:
        command = ("-m", "benchmarks", *(here if rehearsal else there), *shared, str(seconds))
        needs = OPERATIONS.get(name) or score_tests(on_gpu=True)
        part = Part(f"records-{name}", RECORDS, command, seconds + 45, least, needs_tests=needs)
        parts.append(part)
    return parts


class Form(NamedTuple):
    """An implementation of an operation, and what has to have passed before it is a checked one.

    Attributes:
        name: operation and implementation.
        op: the results file in which it may turn out slower than the reference.
        sanitized: parts that have to have found nothing.
        repeats: what test_repeatable.py calls it; "" where its own tests hold that it repeats.
    """

    name: str
    op: str
    sanitized: tuple[str, ...]
    repeats: str = ""

    @property
    def tests(self) -> tuple[str, ...]:
        dtypes = ("float32", "bfloat16", "float16") if self.repeats else ()
        repeated = (f"{REPEATS}[{self.repeats}-torch.{dtype}-triton]" for dtype in dtypes)
        return (*gate.OPERATIONS[self.op], *repeated)

    @property
    def impl(self) -> str:
        return self.name.partition(":")[2]


FORMS = tuple(
    Form(name, op, tuple(f"{tool}-{sanitized}" for tool in _TOOLS), *repeats)
    for name, op, sanitized, *repeats in (
        ("collapse_alignment:native", "collapse", "collapse"),
        ("collapse_alignment_backward:native", "collapse", "collapse"),
        ("gather_at:native", "mask", "masks"),
        ("write_at_:native", "mask", "masks"),
        ("zero_at_:native", "mask", "masks"),
        ("accumulate_importance_:triton", "importance", "importance", "weight_sums"),
        ("select_top:triton", "selection", "selection", "selection"),
        ("accumulate_unit_importance_:triton", "unit_importance", "units", "unit_sums"),
        ("accumulate_expert_importance_:triton", "expert_importance", "experts", "expert_sums"),
        ("select_importance:triton", "select_importance", "fused", "fused_selection"),
    )
)
