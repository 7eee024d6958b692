"""The sums of `score()` taken batch by batch: each one through the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastdean.coupling.passes.by_example import (
    add_examples,
    parameter_accumulators,
    require_in_memory,
)
from fastdean.coupling.passes.capture import Sums, capturing
from fastdean.coupling.passes.overflow import ScaledSums, add_what_overflowed
from fastdean.coupling.sums.accumulators import Accumulator, accumulators_of
from fastdean.coupling.sums.block_sums import BlockSums
from fastdean.coupling.targets.target import Target
from fastdean.coupling.workloads.loss_check import run_checked
from fastdean.coupling.workloads.scorable import Scorable
from fastdean.coupling.workloads.workload import Workload


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
    accumulators: dict[str, Accumulator]
    if scorable.by_example:
        require_in_memory(targets)
        accumulators = dict(parameter_accumulators(targets, device, signs))
    else:
        accumulators = accumulators_of(targets, granularity, device, impl, signs)
    # A block is through when what overflowed in it has been added.
    block_sums = BlockSums(accumulators.values(), [1] * len(scorable.work.blocks))
    for block in scorable.work.by_block():
        if scorable.by_example:
            add_examples(block, targets, accumulators, scorable.scale, device, bar)
        else:
            _add_block(scorable, block, accumulators, targets, granularity, device, bar)
        block_sums.batch_added()
    return accumulators


def _add_block(
    scorable: Scorable,
    block: Workload,
    accumulators: dict[str, Accumulator],
    targets: Sequence[Target],
    granularity: str,
    device: torch.device,
    bar: Any,
) -> None:
    scaled = None
    if scorable.scale is not None:
        scaled = ScaledSums(accumulators, scorable.sequence_first, scorable.scale)
    sums = scaled or Sums(accumulators, scorable.sequence_first)
    with capturing(targets, granularity, sums.receive):
        run_checked(block, sums.backward, device, bar)
    if scaled is not None:
        add_what_overflowed(scaled, block, targets, granularity, device)
