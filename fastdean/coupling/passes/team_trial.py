"""What the ranks of a team must find alike before a model that is split over them is scored.

They run the same batches, and every layer waits for all of them: one that goes another way stops
the others.
"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdean.models.identity import json_digest
from fastdean.wording.mendable import StateError

if TYPE_CHECKING:
    from fastdean.coupling.workloads.scorable import Scorable
    from fastdean.coupling.workloads.workload import Workload
    from fastdean.models.ranks.distributed import Ranks

# Of a loss, which is rounded otherwise on no rank but for kernels that add up in another order.
_APART = 1e-2


def require_same_losses(work: Workload, device: torch.device, ranks: Ranks) -> None:
    """StateError unless all ranks compute the same losses of one batch, which they all have."""
    with ranks.running_together(), closing(work.losses(device)) as batches:
        losses = next(batches).values.detach().double()
        found = [each for (each,) in ranks.gather([losses])]
        if any(map(_differ, found, [found[0]] * len(found))):
            raise StateError(
                "model must compute the same losses on every rank that tensor parallel splits it "
                "over, got others; gather what its layers and its head return"
            )


def _differ(one: Tensor, other: Tensor) -> bool:
    # What is not finite is for the loss check to say.
    return bool(((one - other).abs() > _APART * other.abs().clamp_min(_APART)).any())


def require_same_targets(found: Scorable, ranks: Ranks) -> None:
    """StateError unless all ranks can score the same targets, in the same batches."""
    parts = [
        [target.key for target in found.targets],
        sorted(found.left_out),
        sorted(found.sequence_first),
        found.alone,
        found.conclusive,
    ]
    if not ranks.hold_the_same(json_digest(parts)):
        raise StateError(
            "target_modules must match what can be scored on every rank that tensor parallel "
            "splits the model over, got modules that can on some; choose others"
        )
