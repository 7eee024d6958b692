"""One contender on one case: checked on inputs of its own, then timed on several sets in turn."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.harness.cases import Case, Contender
from benchmarks.harness.clock import EVENTS, Spread, elapsed, synchronize, time_calls
from benchmarks.harness.memory import Held
from benchmarks.harness.profile import device_seconds
from fastdean.kernels import on_device

# Of the inputs together, so that a call finds nothing of them in the cache.
_TIMES_THE_CACHE = 4
_MIN_SETS, _MAX_SETS = 2, 16
_CPU_CACHE_BYTES = 32 << 20
# A call this long has pushed its own inputs out of the cache: two sets do, and more take minutes.
_LONG_CALL_S = 0.25
_HOST_CALLS, _HOST_SECONDS = 20, 0.1


def input_sets(case: Case, generator: torch.Generator) -> list[Any]:
    """As many sets of inputs as are several times as large as the cache."""
    device, cache = generator.device, _CPU_CACHE_BYTES
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    first = case.inputs(generator)
    wanted = math.ceil(_TIMES_THE_CACHE * cache / _size(first))
    more = min(_MAX_SETS, max(_MIN_SETS, wanted)) - 1
    return [first, *(case.inputs(generator) for _ in range(more))]


def _size(inputs: Any) -> int:
    """Bytes of the tensors, which lie in it or in its lists."""
    values = [v for each in vars(inputs).values() for v in (each if type(each) is list else [each])]
    return sum(each.nbytes for each in values if isinstance(each, torch.Tensor))


def check(case: Case, contender: Contender, generator: torch.Generator) -> float:
    """The error of one call on fresh inputs."""
    inputs = case.inputs(generator)
    expected = case.expected(inputs)
    error = case.error(contender.run(contender.prepare(inputs)), expected)
    if not error <= contender.tolerance:
        raise RuntimeError(
            f"{contender.name} must compute {case.op} to {contender.tolerance:g}, got an error of "
            f"{error:.3g} on {case.name}; there is nothing to time before it does"
        )
    return error


def measured(
    contender: Contender, sets: list, device: torch.device, seconds: float
) -> tuple[Spread, dict[str, Any]]:
    """(seconds of a call, metrics), of one call after the other for about `seconds` in all.

    Metrics:
        sets: of inputs, on which the calls took turns.
        peak_bytes: memory besides its operands; None on a CPU.
        device_s: seconds for which the device is busy, where the timing holds the host's gaps
            between launches too; None where it does not, or the profiler cannot tell.
        host_s: seconds until a call is back at the host, with the device idle before and nothing
            waited for after; the median of several calls. None on a CPU.
    """
    operands = [contender.prepare(inputs) for inputs in sets]
    calls = [lambda each=each: contender.run(each) for each in operands]
    on_gpu = device.type == "cuda"
    peak = _peak_bytes(calls[0], device) if on_gpu else None
    if len(calls) > _MIN_SETS and elapsed(calls[0], device) > _LONG_CALL_S:
        del operands[_MIN_SETS:], calls[_MIN_SETS:]
    timing = time_calls(calls, device, seconds=seconds, capturable=contender.capturable)
    busy = None
    if timing.timed_by == EVENTS:  # last, so that the profiler is in nobody's time
        with on_device(device):
            total = device_seconds(lambda: [call() for call in calls], device)
        busy = None if total is None else total / len(calls)
    return timing.seconds, {
        "sets": len(calls),
        "rounds": timing.rounds,
        "timed_by": timing.timed_by,
        "peak_bytes": peak,
        "device_s": busy,
        "host_s": _host_seconds(calls, device) if on_gpu else None,
    }


def _host_seconds(calls: Sequence[Callable[[], Any]], device: torch.device) -> float:
    seconds, end = [], time.perf_counter() + _HOST_SECONDS
    for call in itertools.islice(itertools.cycle(calls), _HOST_CALLS):
        synchronize(device)
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
        if start > end:
            break
    synchronize(device)
    return statistics.median(seconds)


def _peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    call()  # compiling and libraries' own workspaces are not its memory
    held = Held(device)
    call()
    synchronize(device)
    return held.added_bytes()
