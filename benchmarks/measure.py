"""Seconds, bytes and rates of this machine.

Memory is what a run adds to the process while it lasts: its peak less what was held before, the
model included. On CUDA torch's allocator keeps that count. On Linux the kernel does: writing 5 to
/proc/self/clear_refs sets the peak of the resident set (VmHWM) back to its present size, so the
peak is exact and costs no sampling thread that would disturb the time. What earlier runs freed is
returned to the system first, so that it can neither hide growth nor add to it. Elsewhere memory is
not measured (None).
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cases import Implementation, MatrixShape
from timing import synchronize, time_calls

from fastdean.data import Example

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_LEAST_SECONDS = 0.2
_GPU_SECONDS = 0.05
_COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}


@dataclass(frozen=True)
class Sample:
    seconds: float
    peak_bytes: int | None


def interleaved(
    implementations: Sequence[Implementation],
    examples: Sequence[Example],
    repeats: int,
    device: torch.device,
    report: Callable[[str], None],
) -> dict[str, list[Sample]]:
    """Time A B C A B C: a machine that slows down or speeds up does so for all of them.

    Seconds are those of the whole job, `Implementation.scale` applied.
    """
    samples: dict[str, list[Sample]] = {each.name: [] for each in implementations}
    for repeat in range(repeats):
        for each in implementations:
            sample = timed(lambda run=each.run: run(examples), device)
            sample = Sample(sample.seconds * each.scale, sample.peak_bytes)
            samples[each.name].append(sample)
            report(f"  {repeat + 1}/{repeats}  {each.name:<10} {sample.seconds:9.2f} s")
    return samples


def timed(call: Callable[[], Any], device: torch.device) -> Sample:
    """One call, with everything it started on the device finished."""
    held = _start_of_memory(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    seconds = time.perf_counter() - start
    peak = _peak_of_memory(device)
    del result
    return Sample(seconds, None if held is None or peak is None else max(0, peak - held))


def _start_of_memory(device: torch.device) -> int | None:
    """Forget earlier peaks; the bytes held now."""
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    _return_freed_memory()
    try:
        _CLEAR.write_text("5")
    except OSError:
        return None
    return _status_bytes("VmRSS")


def _peak_of_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM")


def _return_freed_memory() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def _status_bytes(field: str) -> int | None:
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def matrix_rate(shapes: Sequence[MatrixShape], dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second on the products of a model, each as often as it occurs.

    The fastest of several repeats counts: the floor must not contain the machine's noise.
    """
    operations, seconds = 0, 0.0
    for shape in shapes:
        x = torch.randn(shape.rows, shape.inputs, device=device).to(dtype)
        g = torch.randn(shape.rows, shape.outputs, device=device).to(dtype)
        w = torch.randn(shape.outputs, shape.inputs, device=device).to(dtype)
        for number, left, right in (
            (shape.forward, x, w.T),
            (shape.input_gradient, g, w),
            (shape.weight_gradient, g.T, x),
        ):
            if number:
                each = _fastest(lambda a=left, b=right: torch.mm(a, b), device)
                seconds += number * each
        operations += shape.products * shape.operations_each
    return operations / seconds


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy too large for any cache."""
    size = _COPY_BYTES[device.type]
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _fastest(lambda: target.copy_(source), device)


def _fastest(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of several calls; on a CPU of two, or of as many as fit into
    `_LEAST_SECONDS`."""
    if device.type == "cuda":
        return time_calls([call], device, seconds=_GPU_SECONDS).fastest
    best, total, calls = float("inf"), 0.0, 0
    while calls < 2 or total < _LEAST_SECONDS:
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        best, total, calls = min(best, seconds), total + seconds, calls + 1
    return best


@dataclass(frozen=True)
class Floor:
    """What no run beats: its products at the machine's rate, its bytes at the bandwidth.

    Attributes:
        matrix_rate: operations per second.
        copy_bandwidth: bytes per second.
    """

    operations: int
    bytes: int
    matrix_rate: float
    copy_bandwidth: float

    @property
    def seconds(self) -> float:
        return max(self.operations / self.matrix_rate, self.bytes / self.copy_bandwidth)
