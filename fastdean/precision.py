"""How exactly torch multiplies fp32 matrices: the caller's choice for a model, not for a check.

`torch.set_float32_matmul_precision("high")` lets a GPU round the factors to 10 bits (TF32), and
"medium" a CPU with bf16 matrix units to 7.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

FULL = "ieee"
# The distance of 1 to the next number that a factor may be.
_STEPS = {"tf32": 2.0**-10, "bf16": 2.0**-7}


@contextmanager
def full_fp32_products() -> Iterator[None]:
    """No TF32 and no bf16 inside, whatever the caller allows the model's own products."""
    backends = _backends()
    allowed = [backend.fp32_precision for backend in backends]

    def restore() -> None:
        for backend, precision in zip(backends, allowed, strict=True):
            backend.fp32_precision = precision

    # Twice: an interrupt of the first time leaves the second.
    try:
        try:
            for backend in backends:
                backend.fp32_precision = FULL
            yield
        finally:
            restore()
    finally:
        restore()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What `torch.autocast` casts products there to; None: it is off."""
    # Of other devices, such as "meta", torch has no autocast.
    if device.type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def fp32_products(device: torch.device) -> str:
    """What products of fp32 matrices are there, as the caller lets them be.

    Returns:
        "ieee", "tf32" or "bf16"; "autocast to bfloat16" and the like inside of `torch.autocast`.
    """
    cast = autocast_dtype(device)
    if cast is not None:
        return f"autocast to {str(cast).removeprefix('torch.')}"
    cuda, onednn = _backends()
    allowed = (cuda if device.type == "cuda" else onednn).fp32_precision
    return FULL if allowed == "none" else allowed


def product_epsilon(device: torch.device, dtype: torch.dtype) -> float:
    """Of the factors of products of such matrices there, as `torch.finfo(dtype).eps`."""
    own = torch.finfo(dtype).eps
    if dtype != torch.float32:
        return own
    cast = autocast_dtype(device)
    if cast is not None:
        return max(own, torch.finfo(cast).eps)
    return _STEPS.get(fp32_products(device), own)


def _backends() -> tuple[Any, Any]:
    """On CUDA and on a CPU."""
    # An object of a class that has `matmul`, which type checkers take for a module.
    onednn: Any = torch.backends.mkldnn
    return torch.backends.cuda.matmul, onednn.matmul
