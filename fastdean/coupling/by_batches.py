"""The sums of `score()` taken batch by batch: each one through the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch

from fastdean.coupling.accumulators import Accumulator, accumulators_of
from fastdean.coupling.by_example import run_examples
from fastdean.coupling.capture import Sums, capturing
from fastdean.coupling.loss_check import LossCheck
from fastdean.coupling.overflow import ScaledSums, add_what_overflowed
from fastdean.coupling.targets import Target
from fastdean.coupling.trial import Scorable


def run_pass(
    scorable: Scorable,
    targets: Sequence[Target],
    granularity: str,
    device: torch.device,
    impl: str | None,
    bar: Any,
    signs: bool = False,
) -> dict[str, Accumulator]:
    """Sum the targets' importance over this rank's examples; by parameter name.

    Args:
        signs: keep signed sums too.
    """
    if scorable.by_example:
        return dict(run_examples(scorable, targets, device, bar, signs))
    accumulators = accumulators_of(targets, granularity, device, impl, signs)
    scaled = None
    if scorable.scale is not None:
        scaled = ScaledSums(accumulators, scorable.sequence_first, scorable.scale)
    sums = scaled or Sums(accumulators, scorable.sequence_first)
    check = LossCheck(bar)
    with (
        capturing(targets, granularity, sums.receive),
        closing(scorable.work.losses(device)) as batches,
    ):
        for batch in batches:
            check.copy(batch)
            sums.backward(batch)
            # Before the next forward pass, not after it: the losses hold this batch's graph.
            del batch
            check.look(all_but=1)
        check.look()
    if scaled is not None:
        add_what_overflowed(scaled, scorable.work, targets, granularity, device)
    return accumulators
