"""How exactly torch multiplies fp32 matrices: the caller's choice for a model, not for a check.

`torch.set_float32_matmul_precision("high")` lets a GPU round the factors to 10 bits (TF32), and
"medium" a CPU with bf16 matrix units to 7.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

FULL = "ieee"
# The distance of 1 to the next number that a factor may be.
_STEPS = {"tf32": 2.0**-10, "bf16": 2.0**-7}


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
