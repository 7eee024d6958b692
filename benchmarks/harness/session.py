"""Seconds, bytes and rates of this machine.

Memory is what a run adds to the process while it lasts: its peak less what was held before, the
model included. On CUDA torch's allocator keeps that count, on Linux the kernel (`resident`).
Elsewhere memory is not measured (None).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import resident
import torch
from cases import Implementation, MatrixShape
from timing import synchronize, time_calls

from fastdean.data import Example

_LEAST_SECONDS = 0.2
_GPU_SECONDS = 0.05
_COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}


@dataclass(frozen=True)
class Sample:
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Problem:
    """Why there is no measurement.

    Attributes:
        reason: for people.
        failed: whether it is a mistake; not having the memory is not one.
    """

    reason: str
    failed: bool


@dataclass(frozen=True)
class Outcome:
    """All samples of an implementation, or why there are none."""

    implementation: Implementation
    samples: tuple[Sample, ...]
    problem: Problem | None = None


def attempt(call: Callable[[], Any], device: torch.device) -> tuple[Any, Problem | None]:
    """(result, None), or (None, problem): what one of several cannot do, others may."""
    try:
        return call(), None
    except torch.OutOfMemoryError:
        problem = Problem("out of memory", failed=False)
    # A transform of a model's code may end in any exception there is.
    except Exception as error:
        first_line, *_ = str(error).splitlines() or [""]
        problem = Problem(f"{type(error).__name__}: {first_line}", failed=True)
    # Only here, past the handler, is what the frames of the call held free.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None, problem


def interleaved(
    implementations: Sequence[Implementation],
    examples: Sequence[Example],
    repeats: int,
    device: torch.device,
    report: Callable[[str], None],
) -> Iterator[Outcome]:
    """Time A B C A B C: a machine that slows down or speeds up does so for all of them.

    Yields each as soon as it is done: after its last turn, or at its first error, which the others
    survive. Seconds are those of the whole job, `Implementation.scale` applied.
    """
    samples: dict[str, list[Sample]] = {each.name: [] for each in implementations}
    for repeat in range(repeats):
        for each in implementations:
            if each.name not in samples:
                continue
            sample, problem = attempt(
                lambda run=each.run: timed(lambda: run(examples), device), device
            )
            if problem is not None:
                del samples[each.name]
                yield Outcome(each, (), problem)
                continue
            sample = Sample(sample.seconds * each.scale, sample.peak_bytes)
            samples[each.name].append(sample)
            report(f"  {repeat + 1}/{repeats}  {each.name:<10} {sample.seconds:9.2f} s")
            if repeat + 1 == repeats:
                yield Outcome(each, tuple(samples[each.name]))


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
    if device.type != "cuda":
        return resident.forget_peak()
    gc.collect()
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak_of_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident.peak_bytes()


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
