"""The sums of a model in fp16: losses are scaled, and what overflows is added at a lower scale.

Each pair of a batch and a target is added once, at a scale that leaves it finite. Batch by batch
(`ScaledSums`) nothing waits for a batch: what overflowed is left out, and found at the end. Layer
by layer (`WindowSums`) a sum lives as long as its window, so each batch is looked at before it is
added, and its gradients go on to the layers below at the scale that left them finite.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing

import torch
from torch import Tensor

from fastdean.coupling.passes.capture import Sums, capturing
from fastdean.coupling.sums.accumulators import Accumulator
from fastdean.coupling.targets.target import Target
from fastdean.coupling.workloads.loss_scale import LossScale, row_factors
from fastdean.coupling.workloads.workload import BatchLosses, Pass, Workload
from fastdean.data.batching import send
from fastdean.models.experts.products import Routing
from fastdean.models.trees import Path
from fastdean.wording.mendable import StateError

# How often the scale of a batch that overflowed is lowered.
LOWERED = 4
# Of what a layer returned, the gradients that a window takes to the layers below: by layer.
Gradients = Mapping[int, Mapping[Path, Tensor]]


class _Brought(Sums):
    """Brings pairs of scaled losses to those of the losses themselves, times the run's scale."""

    def __init__(
        self,
        accumulators: Mapping[str, Accumulator],
        sequence_first: Collection[str],
        scale: LossScale,
    ) -> None:
        super().__init__(accumulators, sequence_first)
        self.scale = scale
        self._now = scale

    def at(self, scale: LossScale, batch: BatchLosses | Pass, device: torch.device) -> None:
        """Say what the losses are multiplied by whose pairs are delivered next."""
        self._now = scale
        for_x, for_g = row_factors(batch.segments, batch.averaged, batch.rows)
        if scale == self.scale:
            # Powers of two: exact in half precision, in which the products stay.
            for_x, for_g = for_x.half(), for_g.half()
        else:
            for_g = for_g * (self.scale.factor / scale.factor)
        self._factors = send(for_x, device), send(for_g, device)

    def loss(self, batch: BatchLosses) -> Tensor:
        factors = self._now.of_losses(batch.averaged)
        return (batch.values.float() * send(factors, batch.values.device)).sum()

    def brought(self, x: Tensor, g: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of which `segments` says whose they are."""
        for_x, for_g = (factor.to(g.device) for factor in self._factors)
        if segments is not self.segments:
            width = len(x) // len(segments)
            for_x, for_g = (
                factor[:: len(factor) // len(segments)].repeat_interleave(width, 0)
                for factor in (for_x, for_g)
            )
        return _multiplied(x, g, for_x, for_g)

    def brought_routed(self, x: Tensor, g: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        for_x, for_g = (factor.to(g.device)[routing.rows] for factor in self._factors)
        return _multiplied(x, g, for_x, for_g)

    def take_scale_off(self) -> None:
        """Take the run's scale off the sums, when all pairs are added."""
        for accumulator in self.accumulators.values():
            accumulator.multiply_(1 / self.scale.factor)


class ScaledSums(_Brought):
    """Adds the pairs of scaled losses, and leaves out a gradient that is not finite."""

    def __init__(
        self,
        accumulators: Mapping[str, Accumulator],
        sequence_first: Collection[str],
        scale: LossScale,
    ) -> None:
        super().__init__(accumulators, sequence_first, scale)
        self._wanted: Collection[str] = accumulators.keys()
        self._finite: dict[str, Tensor] = {}
        self._finite_by_batch: list[Tensor] = []

    def backward(self, batch: BatchLosses) -> None:
        self._run(batch, self.scale)
        device = batch.values.device
        flags = [self._finite[name].to(device) for name in self.accumulators]
        self._finite_by_batch.append(torch.stack(flags))

    def _run(self, batch: BatchLosses, scale: LossScale) -> None:
        self.at(scale, batch, batch.values.device)
        self._finite = {}
        super().backward(batch)

    def add(self, target: Target, x: Tensor, g: Tensor, segments: Tensor) -> None:
        if target.key in self._wanted:
            x, g = self.brought(x, self._noting(target, g), segments)
            super().add(target, x, g, segments)

    def add_routed(self, target: Target, x: Tensor, g: Tensor, routing: Routing) -> None:
        if target.key in self._wanted:
            x, g = self.brought_routed(x, self._noting(target, g), routing)
            super().add_routed(target, x, g, routing)

    def _noting(self, target: Target, g: Tensor) -> Tensor:
        """A gradient, or zeros if it is not finite, which is noted."""
        finite = self._finite[target.key] = g.isfinite().all()
        return torch.where(finite, g, 0)

    def again(self, batch: BatchLosses, scale: LossScale, wanted: Collection[str]) -> set[str]:
        """Add a batch to these parameters at another scale; which of them it left out."""
        self._wanted, self._counts_tokens = wanted, False
        self._run(batch, scale)
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


class WindowSums(_Brought):
    """Adds the pairs of a batch of scaled losses once all of them are known to be finite.

    Args:
        scale: that its sums have; best that of most of its batches.
        device: of the batches.
    """

    def __init__(
        self,
        accumulators: Mapping[str, Accumulator],
        sequence_first: Collection[str],
        scale: LossScale,
        device: torch.device,
    ) -> None:
        super().__init__(accumulators, sequence_first, scale)
        self._device = device
        # Of a batch: what adds its pairs; and by what it is the gradient of, whether it is finite.
        self._pairs: list[Callable[[], None]] = []
        self._finite: dict[str, Tensor] = {}

    def settled(
        self, batch: Pass, exponent: int, run: Callable[[int], Gradients], fit: bool = False
    ) -> tuple[Gradients, int]:
        """Add a batch, at less and less of a scale until it is finite.

        Args:
            exponent: of the scale to begin with.
            run: called with an exponent: the backward pass at that scale, in which the hooks
                deliver the pairs. Returns the gradients that go to the layers below.
            fit: begin again at the scale that fits these gradients.
        Returns:
            What `run` returned last, and the exponent that it was called with.
        Raises:
            RuntimeError: a gradient is not finite at any scale.
        """
        scale, lowered = LossScale(exponent), 0
        while True:
            self._pairs, self._finite = [], {}
            self.at(scale, batch, self._device)
            below = run(scale.exponent)
            gradients = [tensor for of_layer in below.values() for tensor in of_layer.values()]
            if gradients:
                flags = [gradient.isfinite().all().to(self._device) for gradient in gradients]
                self._finite["the layers below"] = torch.stack(flags).all()
            if infinite := _infinite(self._finite):
                if lowered == LOWERED:
                    raise never_finite_error(batch.examples[0], infinite[0])
                scale, lowered = scale.lower(), lowered + 1
                continue
            if not fit:
                break
            largest = max((float(gradient.abs().max()) for gradient in gradients), default=0.0)
            scale, fit = scale.fitted(largest), False
        for add in self._pairs:
            add()
        self._pairs = []
        return below, scale.exponent

    # Copies, also where nothing is multiplied: backward passes may write into their gradients.
    def add(self, target: Target, x: Tensor, g: Tensor, segments: Tensor) -> None:
        self._finite[target.key] = g.isfinite().all()
        x, g = self.brought(x, g, segments)
        add = super().add
        self._pairs.append(lambda: add(target, x, g, segments))

    def add_routed(self, target: Target, x: Tensor, g: Tensor, routing: Routing) -> None:
        self._finite[target.key] = g.isfinite().all()
        x, g = self.brought_routed(x, g, routing)
        add = super().add_routed
        self._pairs.append(lambda: add(target, x, g, routing))


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
        for _ in range(LOWERED):
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
            raise never_finite_error(example, min(wanted))
    sums.take_scale_off()


def never_finite_error(example: int, where: str) -> StateError:
    return StateError(
        f"gradients must be finite in float16, got others in the batch of example {example} for "
        f"{where}, whatever the loss is multiplied by; load the model in bfloat16 or float32"
    )


def _infinite(finite: Mapping[str, Tensor]) -> list[str]:
    """Which of these are not, read from their devices at once."""
    if not finite:
        return []
    device = next(iter(finite.values())).device
    flags = torch.stack([flag.to(device) for flag in finite.values()]).tolist()
    return [name for name, whole in zip(finite, flags, strict=True) if not whole]


def _multiplied(x: Tensor, g: Tensor, for_x: Tensor, for_g: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(for_g.dtype, g.dtype)
    return x.to(dtype) * for_x, g.to(dtype) * for_g
