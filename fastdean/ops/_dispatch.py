"""Which implementation of an operation runs, and why.

`_TABLE` lists the implementations of every operation, the preferred one first. Two strings decide:
what an implementation *refuses* it cannot do, what it *declines* it does only when asked by name.

An `impl` argument names one implementation for one call, so anything but running it is an error.
The environment variable FASTDEAN_IMPL is a default for every operation at once: one that has no
such implementation falls back, and `explain` says so; one that has it and cannot run it raises.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastdean import kernels, native
from fastdean.ops import checked, reference
from fastdean.wording.mendable import StateError

IMPLEMENTATIONS = ("reference", "triton", "native")
ENVIRONMENT_VARIABLE = "FASTDEAN_IMPL"

_KIND_OF_KERNEL = {
    "reference": "reference",
    "triton": "Triton kernel",
    "native": "compiled kernel",
}


@dataclass(frozen=True)
class Choice:
    """The callable that runs, its implementation's name, and why that one."""

    callable: Callable[..., Any]
    name: str
    reason: str


@dataclass(frozen=True)
class Explanation:
    """A row of `fastdean info`: `chosen` is "" if the operation would raise, with the reason."""

    op: str
    chosen: str
    reason: str
    others: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Implementation:
    """Both functions answer "" where there is nothing against it."""

    name: str
    refuses: Callable[[torch.device, torch.dtype | None], str] = lambda device, dtype: ""
    declines: Callable[[str, torch.device], str] = lambda op, device: ""

    def load(self, op: str) -> Callable[..., Any]:
        if self.name == "triton":
            return getattr(importlib.import_module(_TRITON_HOME[op]), op)
        return getattr({"reference": reference, "native": native}[self.name], op)


def _native_accumulation_refuses(device: torch.device, dtype: torch.dtype | None) -> str:
    if device.type != "cpu":
        return f"the compiled accumulation runs on the CPU, not on {device.type}"
    if dtype == torch.float64:
        return "the compiled accumulation takes fp32, bf16 and fp16, not torch.float64"
    return native.refusal(device)


def _native_selection_refuses(device: torch.device, dtype: torch.dtype | None) -> str:
    if device.type != "cpu":
        return f"the compiled selection runs on the CPU, not on {device.type}"
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return f"the compiled selection takes fp32, bf16, fp16 and fp64 weights, not {dtype}"
    return native.refusal(device)


def _native_bit_sums_refuse(device: torch.device, dtype: torch.dtype | None) -> str:
    if device.type != "cpu":
        return f"the compiled sums of bits run on the CPU, not on {device.type}"
    return native.refusal(device)


def _slow_on_a_cpu(op: str, device: torch.device) -> str:
    return "interpreted kernels are slow; ask for it by name" if device.type == "cpu" else ""


def _unchecked(op: str, device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    objection = checked.objection(op, "native", device)
    return objection and f"{objection}; ask for it by name"


_REFERENCE = _Implementation("reference")
_TRITON = _Implementation(
    "triton", lambda device, dtype: kernels.refusal(device, dtype), _slow_on_a_cpu
)
_NATIVE = _Implementation("native", lambda device, dtype: native.refusal(device), _unchecked)
_NATIVE_ACCUMULATION = _Implementation("native", _native_accumulation_refuses)
_NATIVE_SELECTION = _Implementation("native", _native_selection_refuses)
_NATIVE_FUSED = _Implementation("native", _native_accumulation_refuses)
_NATIVE_BIT_SUMS = _Implementation("native", _native_bit_sums_refuse)
ONLY_ON_CPU = (_NATIVE_ACCUMULATION, _NATIVE_SELECTION, _NATIVE_FUSED, _NATIVE_BIT_SUMS)

_TRITON_HOME = {
    "accumulate_importance_": "fastdean.kernels.importance",
    "accumulate_expert_importance_": "fastdean.kernels.importance",
    "accumulate_unit_importance_": "fastdean.kernels.unit_importance",
    "select_top": "fastdean.kernels.selection",
    "select_importance": "fastdean.kernels.importance_selection",
}

_TABLE: dict[str, tuple[_Implementation, ...]] = {
    "accumulate_importance_": (_TRITON, _NATIVE_ACCUMULATION, _REFERENCE),
    "accumulate_expert_importance_": (_TRITON, _NATIVE_ACCUMULATION, _REFERENCE),
    "accumulate_unit_importance_": (_TRITON, _REFERENCE),
    "select_top": (_TRITON, _NATIVE_SELECTION, _REFERENCE),
    "select_importance": (_TRITON, _NATIVE_FUSED, _REFERENCE),
    "select_expert_importance": (_NATIVE_FUSED, _REFERENCE),
    "bit_sums": (_NATIVE_BIT_SUMS, _REFERENCE),
    "gather_at": (_NATIVE, _REFERENCE),
    "write_at_": (_NATIVE, _REFERENCE),
    "zero_at_": (_NATIVE, _REFERENCE),
    "collapse_alignment": (_NATIVE, _REFERENCE),
    "collapse_alignment_backward": (_NATIVE, _REFERENCE),
}


def choose(
    op: str,
    device: torch.device | str,
    impl: str | None = None,
    dtype: torch.dtype | None = None,
) -> Choice:
    """The implementation of `op` that runs on tensors of `device` and `dtype`.

    Args:
        op: name of an operation of `fastdean.ops`.
        device: where the tensors lie.
        impl: one of `IMPLEMENTATIONS`, or None for FASTDEAN_IMPL and then the preferred one.
        dtype: of the tensors, where an implementation may not take every dtype.
    Raises: ValueError for an unknown name; RuntimeError if the named implementation does not exist
        for `op` or cannot run on `device`, or if the compiled extension is broken.
    """
    entry, reason = _select(op, torch.device(device), impl, dtype)
    return Choice(entry.load(op), entry.name, reason)


def explain(device: torch.device | str) -> list[Explanation]:
    """What `choose` takes for every operation on `device`, and why not the others.

    Loads no implementation, and never raises for the state of the machine: what would raise is
    reported as the reason.
    """
    return [_explain(op, torch.device(device)) for op in _TABLE]


def _select(
    op: str, device: torch.device, impl: str | None, dtype: torch.dtype | None
) -> tuple[_Implementation, str]:
    """The implementation and the reason it was taken; raises as `choose` does."""
    if impl is not None:
        _check_name(impl, "impl")
        return _named(op, device, dtype, impl, f"impl={impl!r}")
    preferred = os.environ.get(ENVIRONMENT_VARIABLE)
    if not preferred:
        return _first_able(op, device, dtype)
    _check_name(preferred, ENVIRONMENT_VARIABLE)
    if _entry(op, preferred):
        return _named(op, device, dtype, preferred, f"{ENVIRONMENT_VARIABLE}={preferred}")
    fallback, _ = _first_able(op, device, dtype)
    return fallback, f"{ENVIRONMENT_VARIABLE}={preferred}, but {_absence_message(op, preferred)}"


def _entry(op: str, impl: str | None) -> _Implementation | None:
    return next((entry for entry in _TABLE[op] if entry.name == impl), None)


def _check_name(impl: str, argument: str) -> None:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(
            f"{argument} must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}; "
            "leave it out to let the device decide"
        )


def _absence_message(op: str, impl: str) -> str:
    return f"there is no {_KIND_OF_KERNEL[impl]} for {op} in this version"


def _named(
    op: str, device: torch.device, dtype: torch.dtype | None, impl: str, asked_by: str
) -> tuple[_Implementation, str]:
    entry = _entry(op, impl)
    if entry is None:
        available = ", ".join(each.name for each in _TABLE[op])
        raise StateError(
            f"{asked_by} must name an implementation that exists, got {impl!r}: "
            f"{_absence_message(op, impl)}; use one of {available}"
        )
    refusal = entry.refuses(device, dtype)
    if refusal:
        raise StateError(
            f"{asked_by} must be able to run {op} on {device.type}, got a refusal: {refusal}; "
            "leave it out to let the device decide"
        )
    return entry, f"asked for by {asked_by}"


def _first_able(
    op: str, device: torch.device, dtype: torch.dtype | None
) -> tuple[_Implementation, str]:
    passed_over: list[str] = []
    for entry in _TABLE[op]:
        objection = entry.refuses(device, dtype) or entry.declines(op, device)
        if not objection:
            return entry, "; ".join(passed_over) or f"preferred on {device.type}"
        passed_over.append(f"not {entry.name}: {objection}")
    raise AssertionError(f"{op} has no implementation that runs everywhere")


def _explain(op: str, device: torch.device) -> Explanation:
    try:
        entry, reason = _select(op, device, None, None)
        chosen = entry.name
    except (RuntimeError, ValueError) as error:
        chosen, reason = "", str(error)
    others = tuple((impl, _why_not(op, device, impl)) for impl in IMPLEMENTATIONS if impl != chosen)
    return Explanation(op, chosen, reason, others)


def _why_not(op: str, device: torch.device, impl: str) -> str:
    entry = _entry(op, impl)
    if entry is None:
        return _absence_message(op, impl)
    try:
        return entry.refuses(device, None) or entry.declines(op, device) or _outranked_message(op)
    except RuntimeError as error:
        return str(error)


def _outranked_message(op: str) -> str:
    """Why an implementation of `op` that could run does not."""
    asked = os.environ.get(ENVIRONMENT_VARIABLE)
    falls_back = asked in IMPLEMENTATIONS and not _entry(op, asked)
    if not asked or falls_back:
        return "another one is preferred"
    return f"{ENVIRONMENT_VARIABLE}={asked} asks for another one"
