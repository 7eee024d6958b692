"""Whether a window keeps a matrix's inputs and gradients until its end, or adds up its sums.

With few tokens X [T, C] and G [T, R] take less memory than fp32 sums [R, C], and at the end one
operation (`ops.select_importance`) finds the top entries in them without sums of that size. By
sizes alone, so that a job chooses the same wherever it goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fastdean.coupling.sums.accumulators import all_sums_bytes, sums_bytes
from fastdean.coupling.targets.target import Target
from fastdean.models.model_state import execution_device
from fastdean.ops._dispatch import choose

# Of the sums of targets of one input: below it the memory that holding saves is lost beside a
# batch, and a sweep over matrices of 3.5 MB took 6 to 9 % longer with their pairs held.
_SMALL_SUMS_BYTES = 16 << 20
# Of the inputs, what the operation has packed in fp32 at a time.
_PACKED_BYTES = 64 << 20
# Of candidates of each selecting thread, twice as many as are selected. A number of threads that no
# machine changes, so that the choice is the same on all.
_CANDIDATES_BYTES = 2 * 16 * 16


@dataclass(frozen=True)
class Pair:
    """What the trial saw of a target's input and of the gradient of its product.

    Attributes:
        dtype: of both.
        own_rows: whether there is one row for each token row of the batch.
        source: the same number for targets that were given one and the same tensor.
    """

    dtype: torch.dtype
    own_rows: bool
    source: int


def held_bytes(
    tokens: int, inputs: int, outputs: Sequence[int], itemsize: int, packed: int, k: int
) -> int:
    """Bytes of X [T, C], held once, and of the gradients [T, R] of all that are given it.

    With what selecting from them takes.

    Args:
        tokens: T; inputs: C; outputs: R of each matrix; itemsize: bytes of one number.
        packed: columns of what the operation packs: C, or R of a transposed weight.
        k: how many entries are kept at most of one of them.
    """
    rows = tokens * (inputs + sum(outputs)) * itemsize
    return rows + min(4 * tokens * packed, _PACKED_BYTES) + k * _CANDIDATES_BYTES


@dataclass(frozen=True)
class Holding:
    """Which targets of a data set may be held, and which of them are.

    Attributes:
        tokens: token rows of its batches.
        num_examples: of the data set.
        keep_top: share of a matrix's entries that is kept.
        pairs: parameter -> what the trial saw, of the targets that the operation takes.
        signs: whether dense sums would be two of each.
    """

    tokens: int
    num_examples: int
    keep_top: float
    pairs: Mapping[str, Pair]
    signs: bool = False

    def count(self, target: Target) -> int:
        """How many entries of a target are kept at most."""
        return int(self.keep_top * target.weight.numel())

    def held(self, targets: Sequence[Target]) -> frozenset[str]:
        """The parameters, of targets that are in a window together, that are held."""
        return frozenset(
            target.parameter
            for group in self._by_source(targets)
            if self._is_held(group)
            for target in group
        )

    def bytes(self, targets: Sequence[Target]) -> int:
        """What targets take that are in a window together."""
        groups = self._by_source(targets)
        shared = {target.parameter for group in groups for target in group}
        others = [target for target in targets if target.parameter not in shared]
        of_groups = (
            self._held_bytes(each) if self._is_held(each) else self._sums_bytes(each)
            for each in groups
        )
        return self._sums_bytes(others) + sum(of_groups)

    def _is_held(self, group: Sequence[Target]) -> bool:
        sums = self._sums_bytes(group)
        return sums >= _SMALL_SUMS_BYTES and self._held_bytes(group) < sums

    def _by_source(self, targets: Sequence[Target]) -> list[list[Target]]:
        groups: dict[tuple[int | None, int], list[Target]] = {}
        for target in targets:
            pair = self.pairs.get(target.parameter)
            if pair is not None:
                groups.setdefault((target.layer_index, pair.source), []).append(target)
        return list(groups.values())

    def _held_bytes(self, group: Sequence[Target]) -> int:
        return held_bytes(
            self.tokens,
            group[0].num_inputs,
            [target.num_outputs for target in group],
            self.pairs[group[0].parameter].dtype.itemsize,
            max(each.num_outputs if each.transposed else each.num_inputs for each in group),
            max(map(self.count, group)),
        )

    def _sums_bytes(self, targets: Sequence[Target]) -> int:
        return sum(sums_bytes(target, "weight", self.signs) for target in targets)


def least_held_bytes(targets: Sequence[Target], all_sums: Callable[[Sequence[Target]], int]) -> int:
    """What targets take at least in a window: inputs and gradients of one token, in two bytes each.

    Args:
        all_sums: bytes of the sums of targets, which stay where inputs and gradients cannot be
            kept: of experts, and of parameters that no hook scores, which may have any shape.
    """
    return sum(
        all_sums([t])
        if t.stacked or t.by_example
        else held_bytes(1, t.num_inputs, [t.num_outputs], 2, 0, 0)
        for t in targets
    )


def takes(target: Target, pair: Pair, device: torch.device, impl: str | None) -> bool:
    """Whether `select_importance` serves a target, with the sums that `accumulate` would have.

    Args:
        device: that of targets whose weights are offloaded and do not say where they compute.
    """
    where = execution_device(target.module, device)
    if where.type != "cpu":
        # Not tried on hardware; inputs that targets share are compared by value, and a GPU waits.
        return False
    try:
        of_ops = {
            choose(op, where, impl, pair.dtype).name
            for op in ("select_importance", "accumulate_importance_")
        }
    except RuntimeError:
        # One of them has no such implementation.
        return False
    # Others have sums of the weight's size too, or other last bits.
    return pair.own_rows and of_ops == {"native"}


def together_bytes(
    holding: Holding | None, granularity: str, signs: bool, sums_at_a_time: int = 1
) -> Callable[[Sequence[Target]], int]:
    """What targets of a data set take that are in a window together."""
    if holding is not None:
        return holding.bytes
    return all_sums_bytes(granularity, signs, sums_at_a_time)
