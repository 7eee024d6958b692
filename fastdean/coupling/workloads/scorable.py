"""A data set that is ready to be scored: its batches, and which of the targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastdean.coupling.sums.holding import Holding, Pair
from fastdean.coupling.targets.target import Target
from fastdean.coupling.workloads.loss_scale import LossScale
from fastdean.coupling.workloads.workload import Workload


@dataclass(frozen=True)
class Scorable:
    """The targets that can be scored, and the batches over which.

    Attributes:
        targets: those that can be scored.
        left_out: name -> why each of the others cannot be.
        sequence_first: parameters of the targets that see [T, B, ...] where the batch is [B, T].
        work: the workload, with every example alone where `alone` says so.
        alone: name of a target for which no two examples may share a batch, or None.
        scale: what the losses are multiplied by; None for models that do not compute in fp16.
        conclusive: False where a loss or a gradient of the trial was not finite.
        largest: the largest absolute gradient of a product in the trial.
        tried: the workload of one batch that the whole model ran last in the trial.
        pairs: parameter -> what the trial saw of its pairs.
        holding: of which targets a window may keep inputs and gradients; None: of none.
        unhooked: targets that hooks cannot score and that may be scored by example in their place.
    """

    targets: list[Target]
    work: Workload
    scale: LossScale | None
    left_out: dict[str, str] = field(default_factory=dict)
    sequence_first: frozenset[str] = frozenset()
    alone: str | None = None
    conclusive: bool = True
    largest: float = 0.0
    tried: Workload | None = None
    pairs: Mapping[str, Pair] = field(default_factory=dict)
    holding: Holding | None = None
    unhooked: list[Target] = field(default_factory=list)

    @property
    def by_example(self) -> bool:
        """Whether its targets are parameters that are scored by example (`by_example.py`)."""
        return any(target.by_example for target in self.targets)
