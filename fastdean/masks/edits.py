"""Editing the weights of a model in place, and taking the edits back in order, bit for bit.

Every edit is all or nothing. The masks that are active on a model are remembered, the latest last,
in a dictionary of this module; it is not thread-safe.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from fastdean import ops
from fastdean.masks.entries import (
    EDITABLE_DTYPES,
    MaskEntry,
    same_bits,
    shared_positions,
    suppressed,
)
from fastdean.model_state import unwrap

# Name components that a wrapper adds and that no checkpoint has.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


class Mask(Protocol):
    """What an edit asks of a mask; masks are told apart by `==` and named in errors by `repr`."""

    @property
    def entries(self) -> Mapping[str, MaskEntry]: ...

    @property
    def scale(self) -> float: ...


@dataclass(frozen=True, eq=False)
class _Part:
    """One parameter of an edit: where, what stands there without it, and what with it."""

    name: str
    shape: tuple[int, ...]
    index: Tensor
    previous: Tensor
    written: Tensor


@dataclass(frozen=True, eq=False)
class Application:
    """An active mask. `wrote` is False where the model held the masked values from the start."""

    mask: Mask
    parts: list[_Part]
    wrote: bool


# model -> its active masks, the latest last. Records name parameters and never hold them, so that
# a model can go, and `.to()` and reloading are seen.
_ACTIVE: weakref.WeakKeyDictionary[nn.Module, list[Application]] = weakref.WeakKeyDictionary()


def apply_(model: nn.Module, mask: Mask, *, impl: str | None = None) -> Application | None:
    """Write original * scale over the masked weights, in place.

    Returns:
        The record of it, or None if the mask was active already.
    Raises:
        TypeError, ValueError, RuntimeError: as `NeuronMask.apply_`; nothing is written then.
    """
    stack, weights = _open(model)
    targets = _targets(mask, weights)
    current = weights.read(targets)
    base = _beneath(targets, current, stack, weights)
    if _find(stack, mask) is not None:
        return None
    written = [part.written for part in targets]
    if not _all_same(base, [part.previous for part in targets]):
        if not (_all_same(base, written) and _all_same(current, written)):
            raise ValueError(_other_values(targets, base))
        application = Application(mask, targets, wrote=False)
        stack.append(application)
        return application
    parts = [replace(part, previous=now) for part, now in zip(targets, current, strict=True)]
    application = Application(mask, parts, wrote=True)
    with _all_or_nothing(parts, current, weights):
        if mask.scale == 0.0:
            weights.zero_(parts, impl)
        else:
            weights.write_(parts, written)
        stack.append(application)
    return application


def restore_(model: nn.Module, mask: Mask) -> None:
    """Write back what the masked weights were before `apply_`, in place.

    A mask that is not known to be active is restored where the model holds its masked values and
    no other mask is active.

    Raises:
        TypeError, ValueError, RuntimeError: as `NeuronMask.restore_`; nothing is written then.
    """
    stack, weights = _open(model)
    active = _find(stack, mask)
    if active is None:
        active = Application(mask, _targets(mask, weights), wrote=False)
        if _holds([(part, part.previous) for part in active.parts], weights):
            return
    _undo(stack, active, weights)


@contextmanager
def applied(model: nn.Module, mask: Mask, *, impl: str | None = None) -> Iterator[nn.Module]:
    """`apply_` on entry; on exit, also after an exception, undo what was written on entry."""
    application = apply_(model, mask, impl=impl)
    try:
        yield model
    finally:
        if application is not None:
            stack, weights = _open(model)
            if application in stack and application.wrote:
                _undo(stack, application, weights)
            elif application in stack:
                stack.remove(application)


class _Weights:
    """The parameters of a model under the names of its checkpoint, read and written at parts."""

    def __init__(self, root: nn.Module) -> None:
        # Tied parameters under all their names.
        self._parameters = {
            ".".join(part for part in name.split(".") if part not in _WRAPPERS): parameter
            for name, parameter in root.named_parameters(remove_duplicate=False)
        }

    def place(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple:
        """Equal for two parameters exactly if they are the same elements in the same order.

        A storage compares by identity, and holding it keeps its identity from being reused.
        """
        parameter = self._checked(name, shape, dtype)
        return (
            parameter.untyped_storage(),
            parameter.storage_offset(),
            parameter.shape,
            parameter.stride(),
        )

    def read(self, parts: Sequence[_Part]) -> list[Tensor]:
        """The values of the parts now, [M] each, on the CPU."""
        values = ops.gather_at(self._tensors(parts), [part.index for part in parts])
        return [value.cpu() for value in values]

    def write_(self, parts: Sequence[_Part], values: Sequence[Tensor]) -> None:
        ops.write_at_(self._tensors(parts), [part.index for part in parts], values)

    def zero_(self, parts: Sequence[_Part], impl: str | None) -> None:
        ops.zero_at_(self._tensors(parts), [part.index for part in parts], impl=impl)

    def _tensors(self, parts: Sequence[_Part]) -> list[nn.Parameter]:
        return [self._checked(part.name, part.shape, part.written.dtype) for part in parts]

    def _checked(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
        if name not in self._parameters:
            raise ValueError(
                f"model must have a parameter {name!r}, got none of that name; "
                "load the model that the mask was made on"
            )
        parameter = self._parameters[name]
        if parameter.device.type == "meta":
            raise ValueError(
                f"model must hold {name!r} in memory, got a meta tensor (offloaded); "
                "load it without offloading, or use patch_checkpoint"
            )
        # A quantised subclass may report a floating dtype; only plain tensors have values to write.
        if parameter.dtype not in EDITABLE_DTYPES or type(parameter.data) is not Tensor:
            raise ValueError(
                f"model must hold {name!r} as plain floating-point values, got "
                f"{type(parameter.data).__name__} of {parameter.dtype} (quantised or sharded); "
                "load it without quantisation"
            )
        if tuple(parameter.shape) != shape:
            raise ValueError(
                f"model must have {name!r} of shape {list(shape)}, got {list(parameter.shape)}; "
                "load the model that the mask was made on"
            )
        if parameter.dtype != dtype:
            raise ValueError(
                f"model must have {name!r} in the mask's dtype {dtype}, got {parameter.dtype}; "
                f"load it with dtype={dtype}, or convert it back"
            )
        return parameter


def _open(model: nn.Module) -> tuple[list[Application], _Weights]:
    """The model's active masks, brought up to date, and its weights."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    root = unwrap(model)
    stack, weights = _ACTIVE.setdefault(root, []), _Weights(root)
    _forget_undone(stack, weights)
    return stack, weights


def _find(stack: Sequence[Application], mask: Mask) -> Application | None:
    return next((active for active in stack if active.mask == mask), None)


def _forget_undone(stack: list[Application], weights: _Weights) -> None:
    """Forget the latest masks whose weights hold what restoring them would leave.

    This is what reloading a clean state dict over an edited model leads to. Where the weights are
    as the masks wrote them nothing was reloaded: a mask may itself write what stood there before
    an earlier one.
    """
    written = [(part, part.written) for active in reversed(stack) for part in active.parts]
    if _holds(written, weights):
        return
    for depth in range(len(stack)):
        before = [(part, part.previous) for active in stack[depth:] for part in active.parts]
        if _holds(before, weights):
            del stack[depth:]
            return


def _holds(states: Sequence[tuple[_Part, Tensor]], weights: _Weights) -> bool:
    """Whether the model holds these values; where parts overlap, the first of them counts."""
    seen: dict[tuple, Tensor] = {}
    now = weights.read([part for part, _ in states])
    for (part, values), current in zip(states, now, strict=True):
        place = weights.place(part.name, part.shape, part.written.dtype)
        before = seen.get(place, part.index[:0])
        first = ~torch.isin(part.index, before)
        if not bool(same_bits(current[first], values[first]).all()):
            return False
        seen[place] = torch.cat([before, part.index])
    return True


def _targets(mask: Mask, weights: _Weights) -> list[_Part]:
    """What to write where, one part per tensor in memory, however many names it has."""
    merged: dict[tuple, tuple[str, MaskEntry]] = {}
    for name, entry in mask.entries.items():
        place = weights.place(name, entry.shape, entry.dtype)
        if place in merged:
            first_name, first = merged[place]
            first.require_same_originals(entry, name)
            merged[place] = (first_name, first.union(entry))
        else:
            merged[place] = (name, entry)
    return [
        _Part(
            name, entry.shape, entry.index, entry.original, suppressed(entry.original, mask.scale)
        )
        for name, entry in merged.values()
    ]


def _beneath(
    targets: Sequence[_Part],
    current: Sequence[Tensor],
    stack: Sequence[Application],
    weights: _Weights,
) -> list[Tensor]:
    """The values at the targets with every active mask thought away, [M] each."""
    base = {
        weights.place(part.name, part.shape, part.written.dtype): (part, values.clone())
        for part, values in zip(targets, current, strict=True)
    }
    for active in reversed(stack):
        for part in active.parts:
            place = weights.place(part.name, part.shape, part.written.dtype)
            if place not in base:
                continue
            target, values = base[place]
            here, there = shared_positions(target.index, part.index)
            _check_unchanged(part.name, values[here], part.written[there])
            values[here] = part.previous[there]
    return [values for _, values in base.values()]


def _undo(stack: list[Application], active: Application, weights: _Weights) -> None:
    """Write what stood there before `active`, which is the latest or was never recorded."""
    if stack and stack[-1] is not active:
        raise RuntimeError(
            f"masks must be restored in reverse order, got {active.mask!r} while "
            f"{stack[-1].mask!r} was applied later; restore that one first"
        )
    current = weights.read(active.parts)
    for part, values in zip(active.parts, current, strict=True):
        _check_unchanged(part.name, values, part.written)
    with _all_or_nothing(active.parts, current, weights):
        weights.write_(active.parts, [part.previous for part in active.parts])
        del stack[-1:]


@contextmanager
def _all_or_nothing(
    parts: Sequence[_Part], current: Sequence[Tensor], weights: _Weights
) -> Iterator[None]:
    """Put `current` back if the block is cut short; a write that never began is left alone."""
    try:
        yield
    except BaseException:
        if not _all_same(weights.read(parts), current):
            weights.write_(parts, current)
        raise


def _all_same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return all(bool(same_bits(a, b).all()) for a, b in zip(left, right, strict=True))


def _check_unchanged(name: str, values: Tensor, written: Tensor) -> None:
    changed = int((~same_bits(values, written)).sum())
    if changed:
        raise RuntimeError(
            f"model must hold what the mask wrote, got {changed} of {values.numel()} masked "
            f"weights of {name!r} changed since (training, loading or another edit); "
            "nothing was written, reload the model"
        )


def _other_values(targets: Sequence[_Part], base: Sequence[Tensor]) -> str:
    others = [
        (part, int((~same_bits(values, part.previous)).sum()))
        for part, values in zip(targets, base, strict=True)
    ]
    others = [(part, count) for part, count in others if count]
    part, count = others[0]
    return (
        f"model must hold the mask's original values, got others at {count} of "
        f"{part.index.numel()} masked weights of {part.name!r} (in {len(others)} of {len(targets)} "
        "matrices); it is another model, or its weights were changed"
    )
