"""The classes' sums over the positions of all ranks, with the gradient of each rank's own features.

    S_c = sum of h_t over the positions t of class c of every rank
    dL/dh_t = dL/dS_c

So that the ranks need to send no features: [K, D] forward, and as much back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdean.models.ranks.distributed import Ranks


def class_counts(labels: Tensor, num_classes: int) -> Tensor:
    """int64 [K]: how many positions each class has; the host does not wait for the device."""
    found = torch.zeros(num_classes + 1, dtype=torch.int64, device=labels.device)
    # Those of no class, -1, are counted last, and cut off.
    places = torch.where(labels < 0, num_classes, labels)
    return found.index_add_(0, places, torch.ones_like(labels))[:num_classes]


class ClassSums(torch.autograd.Function):
    """Zeros [K, D] whose gradient is that of the sums, and goes to a rank's own features.

    The gradients that the ranks have for the sums are added up; what the ranks of a team have
    counts once. All ranks must run the backward pass if one does.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, labels: Tensor, sums: Tensor, ranks: Ranks) -> Tensor:
        ctx.save_for_backward(labels)
        ctx.dtype, ctx.ranks = features.dtype, ranks
        return torch.zeros_like(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (labels,) = ctx.saved_tensors
        total = grad.clone(memory_format=torch.contiguous_format)
        ctx.ranks.sum_([total])
        total /= len(ctx.ranks.team)
        rows = total.to(ctx.dtype).index_select(0, labels.clamp_min(0))
        return torch.where((labels >= 0).unsqueeze(1), rows, 0), None, None, None
