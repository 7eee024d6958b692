"""How exactly torch multiplies fp32 matrices: the caller's choice for a model, not for a check.

`torch.set_float32_matmul_precision("high")` lets a GPU round the factors to 10 bits (TF32), and
"medium" a CPU with bf16 matrix units to 7.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

FULL = "ieee"
# The distance of 1 to the next number that a factor may be.
_STEPS = {"tf32": 2.0**-10, "bf16": 2.0**-7}
# Dtypes that `torch.autocast` casts to its own.
_CAST = {torch.float32, torch.float16, torch.bfloat16}


_LOCK = threading.RLock()
# The process has one precision: the first block to begin, on any thread, notes the caller's, and
# the last to end gives it back.
_blocks: set[object] = set()
_callers: list[Callable[[], None]] = []


@contextmanager
def full_fp32_products() -> Iterator[None]:
    """No TF32 and no bf16 inside, whatever the caller allows the model's own products."""
    block = object()

    def restore() -> None:
        with _LOCK:
            _blocks.discard(block)
            if not _blocks and _callers:
                _callers[0]()
                _callers.clear()

    # Twice: an interrupt of the first time leaves the second.
    try:
        try:
            with _LOCK:
                if not _callers:
                    _callers.append(_given_back())
                _blocks.add(block)
                # Before the others: where they disagree with it, torch refuses to tell a model.
                if _older_switch() is not None:
                    torch.set_float32_matmul_precision("highest")
                for backend in _backends():
                    backend.fp32_precision = FULL
            yield
        finally:
            restore()
    finally:
        restore()


def _given_back() -> Callable[[], None]:
    """Gives the caller's precision back, as it is now."""
    backends = _backends()
    allowed = [backend.fp32_precision for backend in backends]
    older = _older_switch()

    def give_back() -> None:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for backend, precision in zip(backends, allowed, strict=True):
            # What comes from `torch.backends.fp32_precision` goes on to follow it.
            backend.fp32_precision = "none"
            if precision not in _STEPS or backend.fp32_precision != precision:
                backend.fp32_precision = precision

    return give_back


def _older_switch() -> str | None:
    """None where nothing is rounded, or the caller has set a newer one that disagrees with it."""
    if not any(backend.fp32_precision in _STEPS for backend in _backends()):
        return None
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What `torch.autocast` casts products there to; None: it is off."""
    # Of other devices, such as "meta", torch has no autocast.
    if device.type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def reduced_products(parameters: Iterable[Tensor], device: torch.device) -> set[str]:
    """How products with these parameters are rounded, as the caller lets them be.

    Args:
        device: where a parameter computes that lies nowhere now.
    Returns:
        Of "tf32", "bf16", and "autocast to bfloat16" and the like inside of `torch.autocast`.
    """
    kinds = {(device if each.is_meta else each.device, each.dtype) for each in parameters}
    return {_products(place, dtype) for place, dtype in kinds} - {FULL}


def product_epsilon(device: torch.device, dtype: torch.dtype) -> float:
    """Of the factors of products of such matrices there, as `torch.finfo(dtype).eps`."""
    own = torch.finfo(dtype).eps
    cast = autocast_dtype(device)
    if cast is not None and dtype in _CAST:
        return max(own, torch.finfo(cast).eps)
    return max(own, _STEPS.get(_products(device, dtype), own))


def _products(device: torch.device, dtype: torch.dtype) -> str:
    cast = autocast_dtype(device)
    if cast is not None and dtype in _CAST - {cast}:
        return f"autocast to {str(cast).removeprefix('torch.')}"
    cuda, onednn = _backends()
    allowed = (cuda if device.type == "cuda" else onednn).fp32_precision
    return allowed if dtype == torch.float32 and allowed in _STEPS else FULL


def _backends() -> tuple[Any, Any]:
    """On CUDA and on a CPU."""
    # An object of a class that has `matmul`, which type checkers take for a module.
    onednn: Any = torch.backends.mkldnn
    return torch.backends.cuda.matmul, onednn.matmul
