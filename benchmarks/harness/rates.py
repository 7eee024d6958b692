"""What this machine can do, measured in the run that needs it, and the floor that is made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness.clock import elapsed, time_calls

_LEAST_SECONDS = 0.2
_GPU_SECONDS = 0.05
_COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
_MATRIX_SIZE = {"cpu": 512, "cuda": 8192}
_MATRIX_SECONDS = 0.1


@dataclass(frozen=True)
class MatrixShape:
    """The products of all weights of one shape, [outputs, inputs], with `rows` tokens: how many of
    them take part in x W^T (forward), in g W and in g^T x."""

    outputs: int
    inputs: int
    rows: int
    forward: int
    input_gradient: int
    weight_gradient: int

    @property
    def operations_each(self) -> int:
        return 2 * self.rows * self.outputs * self.inputs

    @property
    def products(self) -> int:
        return self.forward + self.input_gradient + self.weight_gradient


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy too large for any cache."""
    size = _COPY_BYTES[device.type]
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _fastest(lambda: target.copy_(source), device)


def large_product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large square product of random numbers."""
    size = _MATRIX_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    timing = time_calls([lambda: torch.mm(left, right, out=out)], device, seconds=_MATRIX_SECONDS)
    return 2 * size**3 / timing.fastest


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
                seconds += number * _fastest(lambda a=left, b=right: torch.mm(a, b), device)
        operations += shape.products * shape.operations_each
    return operations / seconds


def _fastest(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of several calls."""
    if device.type == "cuda":
        return time_calls([call], device, seconds=_GPU_SECONDS).fastest
    seconds: list[float] = []
    while len(seconds) < 2 or sum(seconds) < _LEAST_SECONDS:
        seconds.append(elapsed(call, device))
    return min(seconds)
