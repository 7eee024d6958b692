"""Editing the weights of a model in place, and taking the edits back in order, bit for bit.

Every edit is all or nothing. The masks that are active on a model are remembered, the latest last,
in a dictionary of this module. Two threads may edit two models, not one.

Every edit finds the parameters and compares their values anew: tens of milliseconds for a whole
model, and no state that a `.to()`, a reload or a replaced layer could make stale.

Of a model that FSDP2 shards over ranks, each rank edits the places that it has. All ranks call the
same edits; what is to be done follows from the values on all of them, and one that refuses ends the
edit on all.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from fastdean.masks.entries import MaskEntry, same_bits, shared_positions, suppressed
from fastdean.masks.weights import Part, Weights
from fastdean.models.model_state import require_module, unwrap
from fastdean.wording.log import logger
from fastdean.wording.mendable import StateError


class Mask(Protocol):
    """What an edit needs of a mask; it also compares masks by `==` and prints them by `repr`."""

    @property
    def entries(self) -> Mapping[str, MaskEntry]: ...

    @property
    def scale(self) -> float: ...


@dataclass(frozen=True, eq=False)
class Application:
    """An active mask.

    Attributes:
        parts: what it wrote over what.
        wrote: False where the model held the masked values from the start.
    """

    mask: Mask
    parts: list[Part]
    wrote: bool


# The active masks of each model, the latest last. Parameters are named and never held, so that a
# model can go, and `.to()` and reloading are seen.
_ACTIVE: weakref.WeakKeyDictionary[nn.Module, list[Application]] = weakref.WeakKeyDictionary()
# The models of another dtype than their mask's, of which the user has been warned.
_WARNED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def apply_(model: nn.Module, mask: Mask, *, impl: str | None = None) -> Application | None:
    """Write original * scale over the masked weights, in place.

    Returns:
        The record of it, or None if the mask was active already.
    Raises:
        TypeError, ValueError, RuntimeError: as `NeuronMask.apply_`; nothing is written then.
    """
    root, stack = _open(model)
    weights = Weights(root)
    with weights.ranks.failing_together():
        _forget_undone(stack, weights)
        targets = _targets(mask, weights)
        current = weights.read(targets)
        base = _beneath(targets, current, stack, weights)
        if _find(stack, mask) is not None:
            return None
        written = [part.written for part in targets]
        if not _all_same(base, [part.previous for part in targets], weights):
            if not (_all_same(base, written, weights) and _all_same(current, written, weights)):
                raise ValueError(_other_values(targets, base))
            application = Application(mask, targets, wrote=False)
            stack.append(application)
            _warn_if_rounded(root, mask, targets)
            return application
        weights.require_writable(targets)
        parts = [replace(part, previous=now) for part, now in zip(targets, current, strict=True)]
        application = Application(mask, parts, wrote=True)

        def write() -> None:
            if mask.scale == 0.0:
                weights.zero_(parts, impl)
            else:
                weights.write_(parts, written, impl)

        _all_or_nothing(write, stack, [*stack, application], parts, current, weights)
        _warn_if_rounded(root, mask, parts)
        return application


def restore_(model: nn.Module, mask: Mask) -> None:
    """Write back what the masked weights were before `apply_`, in place.

    A mask that is not known to be active is restored where the model holds its masked values and
    no other mask is active.

    Raises:
        TypeError, ValueError, RuntimeError: as `NeuronMask.restore_`; nothing is written then.
    """
    root, stack = _open(model)
    weights = Weights(root)
    with weights.ranks.failing_together():
        _forget_undone(stack, weights)
        active = _find(stack, mask)
        if active is None:
            active = Application(mask, _targets(mask, weights), wrote=False)
            if _holds([(part, part.previous) for part in active.parts], weights):
                return
        _undo(stack, active, weights)


@contextmanager
def applied(model: nn.Module, mask: Mask, *, impl: str | None = None) -> Iterator[nn.Module]:
    """`apply_` on entry; on exit, also after an exception, undo what was written on entry."""
    root, stack = _open(model)
    before, entered = list(stack), []
    # What ended the block on one rank, others may not know of: each then undoes its own places.
    alone = True
    # Undone twice: an interrupt of the first time leaves the second.
    try:
        try:
            entered.append(apply_(model, mask, impl=impl))
            yield model
            alone = False
        finally:
            _leave(root, stack, mask, before, entered, alone=alone)
    except StateError:
        # Of the block, after which all is undone, or that it could not be undone.
        raise
    except BaseException:
        _leave(root, stack, mask, before, entered, alone=True)
        raise


def _leave(
    root: nn.Module,
    stack: list[Application],
    mask: Mask,
    before: Sequence[Application],
    entered: Sequence[Application | None],
    *,
    alone: bool,
) -> None:
    """Undo the mask in `entered`; if an interrupt lost it, the one recorded since `before`.

    Args:
        alone: without the other ranks of a sharded model.
    """
    found = entered or [each for each in stack if each.mask is mask and each not in before]
    application = found[0] if found else None
    if application not in stack:
        return
    weights = Weights(root, alone=alone)
    with weights.ranks.failing_together():
        _forget_undone(stack, weights)
        if application in stack and application.wrote:
            _undo(stack, application, weights)
        elif application in stack:
            stack.remove(application)


def _open(model: nn.Module) -> tuple[nn.Module, list[Application]]:
    """The model below its wrappers, and its active masks."""
    require_module(model)
    root = unwrap(model)
    return root, _ACTIVE.setdefault(root, [])


def _find(stack: Sequence[Application], mask: Mask) -> Application | None:
    return next((active for active in stack if active.mask == mask), None)


def _forget_undone(stack: list[Application], weights: Weights) -> None:
    """Forget the latest masks if the weights already hold the values from before them.

    Loading a clean state dict over an edited model has that effect. If the weights still hold what
    the masks wrote, nothing was loaded: a mask may write the very values from before an earlier
    one.
    """
    for active in stack:
        # They may be from before the model was sharded over ranks.
        active.parts[:] = map(weights.own, active.parts)
    written = [(part, part.written) for active in reversed(stack) for part in active.parts]
    if _holds(written, weights):
        return
    for depth in range(len(stack)):
        before = [(part, part.previous) for active in stack[depth:] for part in active.parts]
        if _holds(before, weights):
            del stack[depth:]
            return


def _holds(states: Sequence[tuple[Part, Tensor]], weights: Weights) -> bool:
    """Whether the model holds these values; where parts overlap, the first one counts.

    The same on all ranks of a sharded model.
    """
    return weights.ranks.all(_holds_here(states, weights))


def _holds_here(states: Sequence[tuple[Part, Tensor]], weights: Weights) -> bool:
    seen: dict[tuple, Tensor] = {}
    now = weights.read([part for part, _ in states])
    for (part, values), current in zip(states, now, strict=True):
        memory, elements = weights.elements(part)
        if memory in seen:
            first = ~torch.isin(elements, seen[memory])
            current, values = current[first], values[first]
            elements = torch.cat([seen[memory], elements])
        if not bool(same_bits(current, values).all()):
            return False
        seen[memory] = elements
    return True


def _targets(mask: Mask, weights: Weights) -> list[Part]:
    """What to write where, one part per tensor in memory, however many names it has."""
    merged: dict[tuple, tuple[str, MaskEntry]] = {}
    for name, entry in mask.entries.items():
        # The same model in another dtype holds the originals rounded to it.
        place = weights.place(name, entry.shape, weights.dtype_of(name, entry.dtype))
        if place in merged:
            first_name, first = merged[place]
            first.require_same_originals(entry, name)
            merged[place] = (first_name, first.union(entry))
        else:
            merged[place] = (name, entry)
    parts = []
    for name, entry in merged.values():
        dtype = weights.dtype_of(name, entry.dtype)
        written = suppressed(entry.original, mask.scale, dtype)
        part = Part(name, entry.shape, entry.index, entry.original.to(dtype), written)
        parts.append(weights.own(part))
    return parts


def _warn_if_rounded(root: nn.Module, mask: Mask, parts: Sequence[Part]) -> None:
    """Warn once per model: a mask is applied once for every evaluation."""
    for part in parts:
        own, found = mask.entries[part.name].dtype, part.previous.dtype
        if own != found and root not in _WARNED:
            _WARNED.add(root)
            logger.warning(
                "the mask was made in %s and the model is in %s: every original rounds to the "
                "weight found there, and that is what is restored",
                str(own).removeprefix("torch."),
                str(found).removeprefix("torch."),
            )


def _beneath(
    targets: Sequence[Part],
    current: Sequence[Tensor],
    stack: Sequence[Application],
    weights: Weights,
) -> list[Tensor]:
    """The values at the targets without the active masks, [M] each."""
    base = [values.clone() for values in current]
    wanted: dict[tuple, list[tuple[int, Tensor]]] = {}
    for position, part in enumerate(targets):
        memory, elements = weights.elements(part)
        wanted.setdefault(memory, []).append((position, elements))
    for active in reversed(stack):
        # Two parts of one mask may hold the same element: both are compared with the model.
        above, base = base, [values.clone() for values in base]
        for part in active.parts:
            memory, elements = weights.elements(part)
            elements, order = elements.sort()
            for position, targeted in wanted.get(memory, ()):
                here, there = shared_positions(targeted, elements)
                there = order[there]
                _check_unchanged(part.name, above[position][here], part.written[there])
                base[position][here] = part.previous[there]
    return base


def _undo(stack: list[Application], active: Application, weights: Weights) -> None:
    """Write the values from before `active`, which is the latest mask or was never recorded."""
    if stack and stack[-1] is not active:
        raise StateError(
            f"masks must be restored in reverse order, got {active.mask!r} while "
            f"{stack[-1].mask!r} was applied later; restore that one first"
        )
    # Before the first rank writes, all have looked.
    with weights.ranks.failing_together():
        current = weights.read(active.parts)
        for part, values in zip(active.parts, current, strict=True):
            _check_unchanged(part.name, values, part.written)
        weights.require_writable(active.parts)

    def write() -> None:
        weights.write_(active.parts, [part.previous for part in active.parts])

    _all_or_nothing(write, stack, stack[:-1], active.parts, current, weights)


def _all_or_nothing(
    write: Callable[[], None],
    stack: list[Application],
    afterwards: list[Application],
    parts: Sequence[Part],
    current: Sequence[Tensor],
    weights: Weights,
) -> None:
    """Call `write` and record it; if an exception cuts that short, undo both.

    Args:
        afterwards: the stack after the edit.
        current: the values of the parts now; a write that never began is left alone.
    """
    before = list(stack)
    # No context manager: an interrupt as a block ends would undo the write and not the record.
    try:
        with weights.ranks.failing_together():
            write()
        stack[:] = afterwards
    except BaseException:
        stack[:] = before
        if not _all_same_here(weights.read(parts), current):
            weights.write_(parts, current)
        raise


def _all_same(left: Sequence[Tensor], right: Sequence[Tensor], weights: Weights) -> bool:
    """Whether these are the same bits, on all ranks of a sharded model."""
    return weights.ranks.all(_all_same_here(left, right))


def _all_same_here(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return all(bool(same_bits(a, b).all()) for a, b in zip(left, right, strict=True))


def _check_unchanged(name: str, values: Tensor, written: Tensor) -> None:
    changed = int((~same_bits(values, written)).sum())
    if changed:
        raise StateError(
            f"model must hold what the mask wrote, got {changed} of {values.numel()} masked "
            f"weights of {name!r} changed since (training, loading or another edit); "
            "nothing was written, reload the model"
        )


def _other_values(targets: Sequence[Part], base: Sequence[Tensor]) -> str:
    others = [
        (part, int((~same_bits(values, part.previous)).sum()))
        for part, values in zip(targets, base, strict=True)
    ]
    others = [(part, count) for part, count in others if count]
    if not others:
        return (
            "model must hold the mask's original values, got others on another rank; it is another "
            "model, or its weights were changed"
        )
    part, count = others[0]
    return (
        f"model must hold the mask's original values, got others at {count} of "
        f"{part.index.numel()} masked weights of {part.name!r} (in {len(others)} of {len(targets)} "
        "matrices); it is another model, or its weights were changed"
    )
