"""What this machine can do, measured in the run that needs it, and the floor that is made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.clock import elapsed, time_calls

_LEAST_SECONDS = 0.2
_GPU_SECONDS = 0.05
_COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
_MATRIX_SIZE = {"cpu": 512, "cuda": 8192}
_MATRIX_SECONDS = 0.1


# How many weights of one shape take part in one kind of product: (kind, outputs, inputs, rows) ->
# their number, with `rows` tokens.
Products = Mapping[tuple[str, int, int, int], int]
FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = "x W^T", "g W", "g^T x"


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


def matrix_rate(products: Products, dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second on the products of a model, each as often as it occurs.

    The fastest of several repeats counts: the floor must not contain the machine's noise.
    """

    def random(*size: int) -> Tensor:
        return torch.randn(*size, device=device).to(dtype)

    operations, seconds = 0, 0.0
    for (kind, outputs, inputs, rows), number in products.items():
        if kind == FORWARD:
            left, right = random(rows, inputs), random(outputs, inputs).T
        elif kind == INPUT_GRADIENT:
            left, right = random(rows, outputs), random(outputs, inputs)
        else:
            left, right = random(rows, outputs).T, random(rows, inputs)
        seconds += number * _fastest(lambda a=left, b=right: torch.mm(a, b), device)
        operations += number * 2 * rows * outputs * inputs
    return operations / seconds


def _fastest(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of several calls."""
    if device.type == "cuda":
        return time_calls([call], device, seconds=_GPU_SECONDS).fastest
    seconds: list[float] = []
    while len(seconds) < 2 or sum(seconds) < _LEAST_SECONDS:
        seconds.append(elapsed(call, device))
    return min(seconds)
