"""The sums of one target while scoring runs: one fp32 number per weight or unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from fastdean.coupling.scores import ScoreEntry
from fastdean.coupling.targets import Target
from fastdean.ops.importance import (
    accumulate_expert_importance_,
    accumulate_importance_,
    accumulate_unit_importance_,
)
from fastdean.wording.numbers import require_real


class Accumulator(Protocol):
    def add_(self, x: Tensor, g: Tensor, segments: Tensor, experts: Tensor | None = None) -> None:
        """Take one batch: what the hook saw, [N, C], its gradient, and the rows of each example.

        Of stacked weights, the rows of each example at one expert, and which expert that is.
        """

    def tensors(self) -> list[Tensor]:
        """The tensors whose sum over ranks is the sum over all examples."""

    def entry(self, weight: Tensor) -> ScoreEntry:
        """The result; the accumulator is not used afterwards."""


class DenseWeightAccumulator:
    """sum_b |G_b^T X_b| in the layout of the stored weight."""

    def __init__(self, target: Target, device: torch.device, impl: str | None) -> None:
        self._transposed = target.transposed
        self._impl = impl
        shape = tuple(target.weight.shape)
        self._sums = torch.zeros(shape, dtype=torch.float32, device=device)

    def add_(self, x: Tensor, g: Tensor, segments: Tensor, experts: Tensor | None = None) -> None:
        if self._transposed:
            x, g = g, x
        accumulate_importance_(self._sums, x, g, segments, impl=self._impl)

    def tensors(self) -> list[Tensor]:
        return [self._sums]

    def entry(self, weight: Tensor) -> ScoreEntry:
        return ScoreEntry.of(self._sums, weight)


class ExpertAccumulator:
    """sum_b |G_b^T X_b| of each expert, in the layout of the stacked weights."""

    def __init__(self, target: Target, device: torch.device, impl: str | None) -> None:
        self._transposed = target.transposed
        self._impl = impl
        self._sums = torch.zeros(target.summed_shape, dtype=torch.float32, device=device)

    def add_(self, x: Tensor, g: Tensor, segments: Tensor, experts: Tensor | None = None) -> None:
        assert experts is not None  # Of a stacked weight.
        if self._transposed:
            x, g = g, x
        accumulate_expert_importance_(self._sums, x, g, segments, experts, impl=self._impl)

    def tensors(self) -> list[Tensor]:
        return [self._sums]

    def entry(self, weight: Tensor) -> ScoreEntry:
        return ScoreEntry.of(self._sums, weight)


class UnitAccumulator:
    """sum_b |sum_t a_t * dL/da_t| for the inputs of a down projection."""

    def __init__(self, target: Target, device: torch.device, impl: str | None) -> None:
        self._axis = target.unit_axis
        self._impl = impl
        self._sums = torch.zeros(target.num_inputs, dtype=torch.float32, device=device)

    def add_(self, x: Tensor, g: Tensor, segments: Tensor, experts: Tensor | None = None) -> None:
        accumulate_unit_importance_(self._sums, x, g, segments, impl=self._impl)

    def tensors(self) -> list[Tensor]:
        return [self._sums]

    def entry(self, weight: Tensor) -> ScoreEntry:
        return ScoreEntry.of(self._sums, weight, self._axis)


ACCUMULATORS: dict[str, Callable[[Target, torch.device, str | None], Accumulator]] = {
    "weight": DenseWeightAccumulator,
    "unit": UnitAccumulator,
}


def accumulators_of(
    targets: Sequence[Target], granularity: str, device: torch.device, impl: str | None
) -> dict[str, Accumulator]:
    """An accumulator for each target, by its key, where the target computes.

    Args:
        device: that of targets whose weights are offloaded and do not say where they compute.
    """

    def kind(target: Target) -> Callable[[Target, torch.device, str | None], Accumulator]:
        return ExpertAccumulator if target.stacked else ACCUMULATORS[granularity]

    return {target.key: kind(target)(target, target.device(device), impl) for target in targets}


def sums_bytes(target: Target, granularity: str) -> int:
    """What the sums of a target take."""
    return 4 * (prod(target.summed_shape) if granularity == "weight" else target.num_inputs)


def split_by_memory(
    targets: Sequence[Target], granularity: str, memory_budget: int | None
) -> list[list[Target]]:
    """The targets in groups whose sums fit into `memory_budget` bytes; None: all in one.

    The experts of a stacked weight may be in several groups, a part of them in each.

    Raises:
        TypeError: `memory_budget` is no number.
        ValueError: the sums of one target, or of one expert, do not fit.
    """
    if memory_budget is None:
        return [list(targets)]
    require_real("memory_budget", memory_budget, "a number of bytes")
    groups: list[list[Target]] = []
    used = 0

    def fit(target: Target) -> bool:
        return sums_bytes(target, granularity) <= memory_budget

    for target in (piece for whole in targets for piece in whole.pieces(fit)):
        size = sums_bytes(target, granularity)
        if not size <= memory_budget:
            raise ValueError(
                f"memory_budget must hold the sums of at least one matrix, {size:,} bytes for "
                f"{target.parameter}, got {memory_budget:,}; raise it or leave it out"
            )
        if not groups or used + size > memory_budget:
            groups.append([])
            used = 0
        groups[-1].append(target)
        used += size
    return groups
