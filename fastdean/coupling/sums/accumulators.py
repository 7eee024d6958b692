"""The sums of one target while scoring runs: one fp32 number per weight or unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from fastdean.coupling.results.score_entry import ScoreEntry
from fastdean.coupling.sums.signed_sums import add_signed_, add_signed_units_
from fastdean.coupling.targets.target import Target
from fastdean.ops.importance import (
    accumulate_expert_importance_,
    accumulate_importance_,
    accumulate_unit_importance_,
)
from fastdean.wording.numbers import require_real


class Accumulator(Protocol):
    def add_(self, x: Tensor, g: Tensor, segments: Tensor) -> None:
        """Take one batch: what the hook saw, [N, C], its gradient, and the rows of each example."""

    def tensors(self) -> list[Tensor]:
        """The tensors whose sum over ranks is the sum over all examples: sums, then signed ones."""

    def multiply_(self, factor: float) -> None:
        """Multiply what was added so far; nothing is added afterwards."""

    def entry(self, weight: Tensor) -> ScoreEntry:
        """The result; the accumulator is not used afterwards."""


class DenseWeightAccumulator:
    """sum_b |G_b^T X_b| in the layout of the stored weight; with `signs` sum_b G_b^T X_b too."""

    def __init__(
        self, target: Target, device: torch.device, impl: str | None, signs: bool = False
    ) -> None:
        self._transposed = target.transposed
        self._impl = impl
        self._sums = _zeros(target.summed_shape, device)
        self._signed = _zeros(target.summed_shape, device) if signs else None

    def add_(self, x: Tensor, g: Tensor, segments: Tensor) -> None:
        if self._transposed:
            x, g = g, x
        accumulate_importance_(self._sums, x, g, segments, impl=self._impl)
        if self._signed is not None:
            add_signed_(self._signed, x, g, segments)

    def tensors(self) -> list[Tensor]:
        return _present(self._sums, self._signed)

    def multiply_(self, factor: float) -> None:
        _multiply_(self.tensors(), factor)

    def entry(self, weight: Tensor) -> ScoreEntry:
        return ScoreEntry.of(self._sums, weight, signed=self._signed)


class ExpertAccumulator:
    """sum_b |G_b^T X_b| of each expert, in the layout of the stacked weights; `signs` as above."""

    def __init__(
        self, target: Target, device: torch.device, impl: str | None, signs: bool = False
    ) -> None:
        self._transposed = target.transposed
        self._impl = impl
        self._sums = _zeros(target.summed_shape, device)
        self._signed = _zeros(target.summed_shape, device) if signs else None
        # Tokens that each expert was given; whole numbers, and no sum that a loss scale is taken
        # off.
        self.routed = torch.zeros(target.summed_shape[0], dtype=torch.int64, device=device)

    def count_(self, segments: Tensor, experts: Tensor) -> None:
        """Count the tokens of a batch, as `add_` is given them."""
        tokens = segments[:, 1] - segments[:, 0]
        routed = self.routed
        routed.index_add_(0, experts.to(routed.device), tokens.to(routed.device))

    def add_(self, x: Tensor, g: Tensor, segments: Tensor, experts: Tensor | None = None) -> None:
        """Take one batch; `segments` are of an example at one expert, `experts` says which."""
        assert experts is not None  # Of a stacked weight.
        if self._transposed:
            x, g = g, x
        accumulate_expert_importance_(self._sums, x, g, segments, experts, impl=self._impl)
        if self._signed is not None:
            for expert in experts.unique_consecutive().tolist():
                add_signed_(self._signed[expert], x, g, segments[experts == expert].cpu())

    def tensors(self) -> list[Tensor]:
        return _present(self._sums, self._signed)

    def multiply_(self, factor: float) -> None:
        _multiply_(self.tensors(), factor)

    def entry(self, weight: Tensor) -> ScoreEntry:
        entry = ScoreEntry.of(self._sums, weight, signed=self._signed, stacked=True)
        return replace(entry, routed=tuple(self.routed.tolist()))


class UnitAccumulator:
    """sum_b |sum_t a_t * dL/da_t| for the inputs of a down projection; `signs` as for weights."""

    def __init__(
        self, target: Target, device: torch.device, impl: str | None, signs: bool = False
    ) -> None:
        self._axis = target.unit_axis
        self._impl = impl
        self._sums = _zeros((target.num_inputs,), device)
        self._signed = _zeros((target.num_inputs,), device) if signs else None

    def add_(self, x: Tensor, g: Tensor, segments: Tensor) -> None:
        accumulate_unit_importance_(self._sums, x, g, segments, impl=self._impl)
        if self._signed is not None:
            add_signed_units_(self._signed, x, g, segments)

    def tensors(self) -> list[Tensor]:
        return _present(self._sums, self._signed)

    def multiply_(self, factor: float) -> None:
        _multiply_(self.tensors(), factor)

    def entry(self, weight: Tensor) -> ScoreEntry:
        return ScoreEntry.of(self._sums, weight, self._axis, signed=self._signed)


ACCUMULATORS: dict[str, Callable[[Target, torch.device, str | None, bool], Accumulator]] = {
    "weight": DenseWeightAccumulator,
    "unit": UnitAccumulator,
}


def accumulators_of(
    targets: Sequence[Target],
    granularity: str,
    device: torch.device,
    impl: str | None,
    signs: bool = False,
    held: Mapping[str, Accumulator] | None = None,
) -> dict[str, Accumulator]:
    """An accumulator for each target, by its key, where the target computes.

    Args:
        device: that of targets whose weights are offloaded and do not say where they compute.
        signs: keep signed sums too.
        held: those of targets that need no sums (`held_pairs.py`).
    """
    held = held or {}

    def kind(target: Target) -> Callable[[Target, torch.device, str | None, bool], Accumulator]:
        return ExpertAccumulator if target.stacked else ACCUMULATORS[granularity]

    return {
        target.key: held[target.parameter]
        if target.parameter in held
        else kind(target)(target, target.device(device), impl, signs)
        for target in targets
    }


def sums_bytes(target: Target, granularity: str, signs: bool = False) -> int:
    """What the sums of a target take; with `signs` twice as much.

    Of a parameter that is scored by example with one gradient of it.
    """
    if target.by_example:
        weight = target.weight
        return weight.numel() * (4 * (2 if signs else 1) + weight.element_size())
    numbers = prod(target.summed_shape) if granularity == "weight" else target.num_inputs
    return 4 * numbers * (2 if signs else 1)


def _zeros(shape: Sequence[int], device: torch.device) -> Tensor:
    return torch.zeros(tuple(shape), dtype=torch.float32, device=device)


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _multiply_(tensors: Sequence[Tensor], factor: float) -> None:
    for tensor in tensors:
        tensor.mul_(factor)


def split_by_memory(
    targets: Sequence[Target],
    size: Callable[[Sequence[Target]], int],
    memory_budget: int | None,
) -> list[list[Target]]:
    """The targets in groups whose sums fit into `memory_budget` bytes; None: all in one.

    The experts of a stacked weight may be in several groups, a part of them in each.

    Args:
        size: what targets take that are summed together, in bytes.
    Raises:
        TypeError: `memory_budget` is no number.
        ValueError: the sums of one target, or of one expert, do not fit.
    """
    if memory_budget is None:
        return [list(targets)]
    require_real("memory_budget", memory_budget, "a number of bytes")
    groups: list[list[Target]] = []

    def fit(target: Target) -> bool:
        return size([target]) <= memory_budget

    pieces = [piece for whole in targets for piece in whole.pieces(fit)]
    largest = max(pieces, key=lambda piece: size([piece]), default=None)
    if largest is not None and not fit(largest):
        raise ValueError(
            "memory_budget must hold the sums of at least one matrix, "
            f"{size([largest]):,} bytes for {largest.parameter}, got {memory_budget:,}; raise it "
            "or leave it out"
        )
    for target in pieces:
        if not groups or size([*groups[-1], target]) > memory_budget:
            groups.append([])
        groups[-1].append(target)
    return groups


def all_sums_bytes(
    granularity: str, signs: bool = False, at_a_time: int = 1
) -> Callable[[Sequence[Target]], int]:
    """What the sums of several targets take.

    Args:
        at_a_time: how many sums of a target live at a time (`block_sums.py`).
    """
    return lambda targets: (
        at_a_time * sum(sums_bytes(target, granularity, signs) for target in targets)
    )
