"""The sums of a model in fp16: losses are scaled, and what overflows is added at a lower scale.

Each pair of a batch and a target is added once, at the first scale that leaves it finite.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import closing

import torch
from torch import Tensor

from fastdean.coupling.accumulators import Accumulator
from fastdean.coupling.capture import Sums, capturing
from fastdean.coupling.loss_scale import LossScale, row_factors
from fastdean.coupling.targets import Target
from fastdean.coupling.workloads import BatchLosses, Workload
from fastdean.data.batching import send
from fastdean.models.expert_products import Routing
from fastdean.wording.mendable import StateError

# How often the scale of a batch that overflowed is lowered.
_LOWERED = 4


class ScaledSums(Sums):
    """Adds the pairs of scaled losses, and leaves out a gradient that is not finite."""

    def __init__(
        self,
        accumulators: Mapping[str, Accumulator],
        sequence_first: Collection[str],
        scale: LossScale,
    ) -> None:
        super().__init__(accumulators, sequence_first)
        self.scale = scale
        self._lowered: LossScale | None = None
        self._wanted: Collection[str] = accumulators.keys()
        self._finite: dict[str, Tensor] = {}
        self._finite_by_batch: list[Tensor] = []

    def backward(self, batch: BatchLosses) -> None:
        device = batch.values.device
        for_x, for_g = row_factors(batch.segments, batch.averaged, batch.rows)
        if self._lowered is None:
            # Powers of two: exact in half precision, in which the products stay.
            for_x, for_g = for_x.half(), for_g.half()
        else:
            for_g = for_g * (self.scale.factor / self._lowered.factor)
        self._factors = send(for_x, device), send(for_g, device)
        self._finite = {}
        super().backward(batch)
        if self._lowered is None:
            flags = [self._finite[name].to(device) for name in self.accumulators]
            self._finite_by_batch.append(torch.stack(flags))

    def loss(self, batch: BatchLosses) -> Tensor:
        factors = (self._lowered or self.scale).of_losses(batch.averaged)
        return (batch.values.float() * send(factors, batch.values.device)).sum()

    def add(self, target: Target, x: Tensor, g: Tensor, segments: Tensor) -> None:
        if target.key not in self._wanted:
            return
        finite = g.isfinite().all()
        self._finite[target.key] = finite
        for_x, for_g = (factor.to(g.device) for factor in self._factors)
        if segments is not self.segments:
            width = len(x) // len(segments)
            for_x, for_g = (
                factor[:: len(factor) // len(segments)].repeat_interleave(width, 0)
                for factor in (for_x, for_g)
            )
        dtype = torch.promote_types(for_g.dtype, g.dtype)
        x, g = x.to(dtype) * for_x, torch.where(finite, g, 0).to(dtype) * for_g
        super().add(target, x, g, segments)

    def add_routed(self, target: Target, x: Tensor, g: Tensor, routing: Routing) -> None:
        if target.key not in self._wanted:
            return
        finite = g.isfinite().all()
        self._finite[target.key] = finite
        for_x, for_g = (factor.to(g.device)[routing.rows] for factor in self._factors)
        dtype = torch.promote_types(for_g.dtype, g.dtype)
        x, g = x.to(dtype) * for_x, torch.where(finite, g, 0).to(dtype) * for_g
        super().add_routed(target, x, g, routing)

    def again(self, batch: BatchLosses, scale: LossScale, wanted: Collection[str]) -> set[str]:
        """Add a batch to these parameters at another scale; which of them it left out."""
        self._lowered, self._wanted, self._counts_tokens = scale, wanted, False
        self.backward(batch)
        return {name for name, finite in self._finite.items() if not bool(finite)}

    def left_out(self) -> dict[int, set[str]]:
        """Number of a batch -> the keys of what it left out, read from the device at once."""
        flags = torch.stack(self._finite_by_batch).tolist() if self._finite_by_batch else []
        return {
            number: {
                name for name, whole in zip(self.accumulators, batch, strict=True) if not whole
            }
            for number, batch in enumerate(flags)
            if not all(batch)
        }


def add_what_overflowed(
    sums: ScaledSums,
    work: Workload,
    targets: Sequence[Target],
    granularity: str,
    device: torch.device,
) -> None:
    """Do batches again, with less and less of a scale, for what they left out.

    Then the scale is taken off the sums.

    Raises:
        RuntimeError: a gradient is not finite at any scale.
    """
    for number, wanted in sums.left_out().items():
        scale = sums.scale
        for _ in range(_LOWERED):
            scale = scale.lower()
            with (
                capturing(targets, granularity, sums.receive),
                closing(work.only([number]).losses(device)) as batches,
            ):
                batch = next(batches)
                example = batch.examples[0]
                wanted = sums.again(batch, scale, wanted)
                del batch
            if not wanted:
                break
        else:
            raise StateError(
                f"gradients must be finite in float16, got others in the batch of example "
                f"{example} for {min(wanted)}, whatever the loss is multiplied by; load the model "
                "in bfloat16 or float32"
            )
    for accumulator in sums.accumulators.values():
        for tensor in accumulator.tensors():
            tensor.mul_(1 / sums.scale.factor)
