"""What this machine can do: copies and one large product, measured in the run that needs them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from measure import copy_bandwidth
from timing import time_calls

_MATRIX_SIZE = {"cpu": 512, "cuda": 8192}
_SECONDS = 0.1


@dataclass(frozen=True)
class Rates:
    """What floors and shares are made of.

    Attributes:
        copy_bandwidth: bytes per second, read and written, of a copy too large for any cache.
        matrix_rate: operations per second of a large square product of random numbers.
    """

    copy_bandwidth: float
    matrix_rate: float


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The fastest of several repeats counts: a floor must not contain the machine's noise."""
    return Rates(copy_bandwidth(device), _matrix_rate(device, dtype))


def _matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    size = _MATRIX_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    timing = time_calls([lambda: torch.mm(left, right, out=out)], device, seconds=_SECONDS)
    return 2 * size**3 / timing.fastest
