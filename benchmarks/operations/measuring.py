"""One contender on one case: checked on inputs of its own, then timed on several sets in turn."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from timing import Timing, synchronize, time_calls

from operations.case import Contender, OpCase

# Of the inputs together, so that a call finds nothing of them in the cache.
_TIMES_THE_CACHE = 4
_MIN_SETS, _MAX_SETS = 2, 16
_CPU_CACHE_BYTES = 32 << 20
# Of the free memory, so that the allocator has room to move.
_SHARE_OF_FREE = 0.8


def number_of_sets(input_bytes: int, device: torch.device) -> int:
    cache = _CPU_CACHE_BYTES
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(_MAX_SETS, max(_MIN_SETS, math.ceil(_TIMES_THE_CACHE * cache / input_bytes)))


def too_large(contender: Contender, device: torch.device) -> str:
    """Why a contender's temporary memory does not fit; "" if it does, or nobody can tell."""
    if device.type != "cuda":
        return ""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    if contender.needs_bytes <= _SHARE_OF_FREE * free:
        return ""
    return f"takes {contender.needs_bytes / 1e9:.1f} GB besides its inputs, {free / 1e9:.1f} free"


def check(case: OpCase, contender: Contender, generator: torch.Generator) -> float:
    """The error of one call on fresh inputs, with NaN in all memory that it allocates.

    Raises:
        RuntimeError: the error is above the contender's tolerance, or NaN.
    """
    inputs = case.inputs(generator)
    expected = case.expected(inputs)
    operands = contender.prepare(inputs)
    # A change of the mode that poisons would have torch.compile compile twice, to no purpose.
    with nullcontext() if contender.compiled else poisoned_allocations():
        result = contender.run(operands)
    error = case.error(result, expected)
    if not error <= contender.tolerance:
        raise RuntimeError(
            f"{contender.name} must compute {case.op} to {contender.tolerance:g}, got an error of "
            f"{error:.3g} on {case.name}; there is nothing to time before it does"
        )
    return error


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Inside, what torch allocates without a value holds NaN, or the largest integer."""
    mode = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        torch.utils.deterministic.fill_uninitialized_memory = True
        # The filling is part of the deterministic mode, whose other warnings are of no concern.
        torch.set_deterministic_debug_mode("warn")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.set_deterministic_debug_mode(mode)


def timed(
    contender: Contender, sets: list, device: torch.device, seconds: float
) -> tuple[Timing, int | None]:
    """(timing, peak memory of a call besides its operands, None on a CPU)."""
    operands = [contender.prepare(inputs) for inputs in sets]
    peak = _peak_bytes(contender, operands[0], device)
    calls = [lambda each=each: contender.run(each) for each in operands]
    return time_calls(calls, device, seconds=seconds, capturable=contender.capturable), peak


def _peak_bytes(contender: Contender, operands: object, device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    contender.run(operands)  # compiling and libraries' own workspaces are not its memory
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    contender.run(operands)
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - held
