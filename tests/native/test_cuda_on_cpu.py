"""The CUDA kernels on a CPU: their results, their races, their accesses, and planted faults.

tests/csrc/cuda_on_cpu/README.md says what that cannot show, and what covers it instead.
"""

from __future__ import annotations

import os
import platform
import re
import shutil

import pytest
from cuda_on_cpu import (
    BUILDS,
    FOUND_STATUS,
    MACHINE,
    OPERATIONS,
    ROOT,
    Mutant,
    Workshop,
    removed_barriers,
)

# A wild address may lie in no memory at all.
OVERFLOW = (
    r"(heap|global)-buffer-overflow|out of bounds for type|load of null pointer"
    r"|SEGV on unknown address"
)
UNWRITTEN = ": reads shared memory that its block has not written"
LINUX = ("Linux", "x86_64")
DEVICE_FUNCTIONS = {"block_sum", "act_on_row"}
WRONG_LOSS = r"(loss|sums|centre|grad_weight|grad_features)\[\d+\] is "
WRONG_PLACES = "found other values|left other bits"
ALL_LANES = "__shfl_xor_sync(0xffffffffu, value, step)"


def _race(function, old, new, found=": race, ", turn=0):
    return Mutant(function, old, new, "races", found, turn)


def _overflow(function, old, new, found=OVERFLOW, turn=0):
    return Mutant(function, old, new, "sanitizers", found, turn)


def _wrong(function, old, new, found=WRONG_LOSS, turn=0):
    """A fault that only results show."""
    return Mutant(function, old, new, "sanitizers", found, turn)


PLANTED = {
    "collapse": [
        *removed_barriers("collapse"),
        # Threads and blocks that write where others read or write.
        _race("rank_rows", "atomicExch(plan.out_of_range, 1)", "*plan.out_of_range = 1"),
        _race("rank_rows", "after == 0", "after >= 0"),
        _race("rank_rows", "plan.table + blockIdx.x * p.classes", "plan.table"),
        _race("scan_classes", "first + each", "first + each + 1"),
        _race("place_rows", "plan.starts[label] + earlier", "plan.starts[label]"),
        _race("join_sums", "blockIdx.x * p.columns + column", "column"),
        _race("average", "thread < step", "thread < 2 * step", f": race, |{UNWRITTEN}"),
        _race("block_sum", "threadIdx.x % 32 == 0", "threadIdx.x % 16 == 0"),
        _race("multiply", "threadIdx.x != 0", "threadIdx.x > 1"),
        _race("weight_gradients", "blockIdx.x * p.columns + column", "column"),
        _race("row_gradients", "row * p.columns + column", "row + column"),
        # Shared memory that nobody has written.
        _race("block_sum", "threadIdx.x % 32 == 0", "threadIdx.x == 0", UNWRITTEN),
        _race("average", "seen[thread] = own_seen", "seen[thread / 2] = own_seen"),
        # Threads that do not come where the others wait.
        _race(
            *("average", "__syncthreads()", "thread < step ? __syncthreads() : void(0)"),
            *("a barrier that not all threads of the block reach|wait at two barriers", 1),
        ),
        _race("block_sum", ALL_LANES, f"threadIdx.x % 2 ? {ALL_LANES} : value", ": deadlock"),
        _race(
            *("block_sum", ALL_LANES, ALL_LANES.replace("ffff", "", 1), "outside of its mask"),
        ),
        # One too many.
        _overflow("rank_rows", "row < last", "row <= last"),
        _overflow("rank_rows", "i < here", "i <= here"),
        _overflow("add_chunks", "c >= p.classes", "c > p.classes"),
        _overflow("place_rows", "row >= p.rows", "row > p.rows"),
        _overflow("join_sums", "column >= p.columns", "column > p.columns"),
        _overflow("block_sum", "warp < kSize / 32", "warp <= kSize / 32"),
        _overflow("average", "c < p.classes", "c <= p.classes"),
        _overflow("multiply", "column < p.columns", "column <= p.columns"),
        _overflow("finish", "c < p.classes", "c <= p.classes"),
        _overflow("finish", "c < p.classes", "c <= p.classes", turn=2),
        _overflow("weight_gradients", "column >= p.columns", "column > p.columns"),
        _overflow("row_gradients", "column >= p.columns", "column > p.columns"),
        # Other signs, strides and ends of sums.
        _wrong("label_of", "label < p.classes", "label <= p.classes", f"{OVERFLOW}|: SEGV"),
        _wrong("join_sums", "plan.decay != 0 && seen", "plan.decay != 0"),
        _wrong("join_sums", "plan.order[i] * p.features_stride", "plan.order[i] * p.columns"),
        _wrong("weight_at", "c * p.weight_stride + column", "c * p.columns + column"),
        _wrong("block_sum", "step /= 2", "step /= 4"),
        _wrong("finish", "(number - 1) * spread", "number * spread"),
        _wrong(
            *("weight_gradients", "factor<T>(p, 0, c) * m - factor<T>(p, 1, c) * w"),
            "factor<T>(p, 0, c) * m + factor<T>(p, 1, c) * w",
        ),
    ],
    "mask": [
        *removed_barriers("mask"),
        _race("places_kernel", "static_cast<int64_t>(gridDim.x) * blockDim.x", "blockDim.x"),
        _race(
            *("places_kernel", "static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x"),
            "static_cast<int64_t>(blockIdx.x) * blockDim.x",
        ),
        _race("places_kernel", "r += gridDim.y", "++r"),
        _overflow("places_kernel", "r < params.num_rows", "r <= params.num_rows"),
        _overflow("act_on_row", "i < row.count", "i <= row.count"),
        _wrong("act_on_row", "i += step", "i += 2 * step", WRONG_PLACES),
        _wrong(
            "act_on_row",
            "element_offset(row, indices[i])",
            "indices[i]",
            f"{WRONG_PLACES}|{OVERFLOW}",
        ),
        _overflow(
            *("places_kernel", "act_on_row<uint16_t>(row, first, step, act)"),
            *("act_on_row<uint32_t>(row, first, step, act)", "misaligned address|-buffer-overflow"),
        ),
    ],
}
PLANTS = [(operation, mutant) for operation in OPERATIONS for mutant in PLANTED[operation]]


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """The builds of every check; one folder for all processes of pytest."""
    if shutil.which("g++") is None or (platform.system(), platform.machine()) != LINUX:
        pytest.skip("needs g++ on x86-64 with Linux")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder /= "cuda_on_cpu"
    folder.mkdir(exist_ok=True)
    return Workshop(folder, PLANTED)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernels_are_right_and_without_a_finding(workshop, operation, build):
    status, output = workshop.run(operation, build, "few")
    assert status == 0, output


def _require_found(workshop, operation, mutant, seed=0):
    status, output = workshop.run(operation, mutant.build, "one", mutant=mutant, seed=seed)
    found = mutant.found
    if mutant.build == "races":
        assert status == FOUND_STATUS, output
        # The machine names the kernel that it was running.
        found = (
            found if mutant.function in DEVICE_FUNCTIONS else rf"^{mutant.function}\b.*({found})"
        )
    assert status != 0 and re.search(found, output), output


@pytest.mark.parametrize("operation, mutant", PLANTS, ids=[mutant.name for _, mutant in PLANTS])
def test_a_planted_fault_is_found(workshop, operation, mutant):
    _require_found(workshop, operation, mutant)


@pytest.mark.slow
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernels_are_right_in_all_cases_and_another_order_of_threads(workshop, operation, build):
    status, output = workshop.run(operation, build, seed=1)
    assert status == 0, output


@pytest.mark.slow
@pytest.mark.parametrize("operation, mutant", PLANTS, ids=[mutant.name for _, mutant in PLANTS])
def test_a_planted_fault_is_found_in_any_order_of_threads(workshop, operation, mutant):
    for seed in range(1, 11):
        _require_found(workshop, operation, mutant, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("build", BUILDS)
def test_the_loss_is_right_at_random_sizes(workshop, build, seed):
    status, output = workshop.run("collapse", build, "random", str(seed), seed=seed)
    assert status == 0, output


def test_what_is_not_shown_here_is_shown_by_tests_that_there_are():
    text = (MACHINE / "README.md").read_text("utf-8")
    named = re.findall(r"`((?:tests|benchmarks)/[\w/]+\.py)(?:::(\w+))?`", text)
    assert named
    for path, test in named:
        assert not test or f"def {test}(" in (ROOT / path).read_text("utf-8"), (path, test)
