"""Where the sums of one target live while scoring runs.

`score` knows only this interface: `add_` a batch, `tensors` to reduce over ranks, `entry` at the
end. The dense accumulators below hold one fp32 number per weight or unit; an accumulator that
certifies from norms which few entries can reach the top needs nothing more than the same three
methods.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fastdean.coupling.scores import ScoreEntry
from fastdean.coupling.targets import Target
from fastdean.ops.importance import accumulate_importance_, accumulate_unit_importance_


class Accumulator(Protocol):
    def add_(self, x: Tensor, g: Tensor, segments: Tensor) -> None:
        """Take one batch: what the hook saw, [N, C], its gradient, and the rows of each example."""

    def tensors(self) -> list[Tensor]:
        """The tensors whose sum over ranks is the sum over all examples."""

    def entry(self, weight: Tensor) -> ScoreEntry:
        """The result; the accumulator is not used afterwards."""


class DenseWeightAccumulator:
    """sum_b |G_b^T X_b| in the layout of the stored weight."""

    def __init__(self, target: Target, device: torch.device, impl: str | None) -> None:
        self._transposed = target.transposed
        self._impl = impl
        self._sums = torch.zeros(
            tuple(target.module.weight.shape), dtype=torch.float32, device=device
        )

    def add_(self, x: Tensor, g: Tensor, segments: Tensor) -> None:
        if self._transposed:
            x, g = g, x
        accumulate_importance_(self._sums, x, g, segments, impl=self._impl)

    def tensors(self) -> list[Tensor]:
        return [self._sums]

    def entry(self, weight: Tensor) -> ScoreEntry:
        return ScoreEntry.dense(self._sums, weight)


class UnitAccumulator:
    """sum_b |sum_t a_t * dL/da_t| for the inputs of a down projection."""

    def __init__(self, target: Target, device: torch.device, impl: str | None) -> None:
        self._axis = target.unit_axis
        self._impl = impl
        self._sums = torch.zeros(target.num_inputs, dtype=torch.float32, device=device)

    def add_(self, x: Tensor, g: Tensor, segments: Tensor) -> None:
        accumulate_unit_importance_(self._sums, x, g, segments, impl=self._impl)

    def tensors(self) -> list[Tensor]:
        return [self._sums]

    def entry(self, weight: Tensor) -> ScoreEntry:
        return ScoreEntry.units(self._sums, weight, self._axis)


ACCUMULATORS = {"weight": DenseWeightAccumulator, "neuron": UnitAccumulator}


def accumulator_bytes(target: Target, granularity: str) -> int:
    """What the target's accumulator will hold, in bytes."""
    return 4 * (target.module.weight.numel() if granularity == "weight" else target.num_inputs)
