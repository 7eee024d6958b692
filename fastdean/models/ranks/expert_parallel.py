"""Fused experts that lie on several ranks, whole ones on each: what a rank computes of them.

Every rank is given all tokens, runs its own experts on those that chose them, and the ranks add up
what came out. So the place of a row in the batch is known, which is lost where tokens are sent to
the experts' ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from fastdean.models.ranks.shards import in_memory, is_sharded


def own_experts(weight: Tensor) -> Tensor:
    """Of stacked weights those that lie here; all of plain ones."""
    if not is_sharded(weight):
        return weight
    sharded: Any = weight
    return in_memory(sharded.to_local())


def routed_here(
    weight: Tensor, hidden: Tensor, chosen: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What a rank's experts are given: the tokens, the chosen experts by their number among the
    rank's own (one more than the last: another rank's), and the router's weights of its own.

    The gradients of the first and the last are those of all ranks' experts together.

    Args:
        weight: a stacked one, as many experts of it on each rank.
    """
    sharded: Any = weight
    mesh = sharded.device_mesh
    number = len(own_experts(weight.detach()))
    elsewhere = chosen // number != mesh.get_local_rank()
    group = mesh.get_group()
    hidden, weights = (_SummedGradient.apply(each, group) for each in (hidden, weights))
    chosen = torch.where(elsewhere, number, chosen % number)
    return hidden, chosen, weights.masked_fill(elsewhere, 0.0)


def summed(weight: Tensor, result: Tensor) -> Tensor:
    """What all ranks' experts gave a token, of what this rank's did."""
    sharded: Any = weight
    return _Summed.apply(result, sharded.device_mesh.get_group())


class _SummedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return given.view_as(given)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad, None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, given: Tensor, group: Any) -> Tensor:
        total = given.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
