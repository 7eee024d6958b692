"""What the ranks of a `torch.distributed` job do together; one rank when there is no job."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from fastdean.wording.log import logger
from fastdean.wording.mendable import StateError


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int
    size: int

    @classmethod
    def of_group(cls) -> Ranks:
        """This process in the default process group; alone where there is none."""
        if _group_exists():
            return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())
        return cls(0, 1)

    @classmethod
    def current(cls) -> Ranks:
        """As `of_group`, with a warning where a job of several processes forgot its group."""
        if not _group_exists() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            logger.warning(
                "WORLD_SIZE is %s but torch.distributed is not initialised: every process does the "
                "whole work; call torch.distributed.init_process_group() first",
                os.environ["WORLD_SIZE"],
            )
        return cls.of_group()

    @classmethod
    def require_alone(cls, job: str) -> None:
        """Raise ValueError in a process that has peers, for a job that does not share its work."""
        size = max(cls.of_group().size, int(os.environ.get("WORLD_SIZE", "1")))
        if size > 1:
            raise ValueError(
                f"{job} must run in one process, got {size}; start it without torchrun"
            )

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks."""
        if self.size == 1:
            return
        for tensor in tensors:
            reachable = _reachable(tensor)
            torch.distributed.all_reduce(reachable)
            if reachable is not tensor:
                tensor.copy_(reachable)

    def highest(self, value: int) -> int:
        """The largest of the ranks' values, on every rank."""
        if self.size == 1:
            return value
        box = torch.tensor(value, device=_collective_device())
        torch.distributed.all_reduce(box, op=torch.distributed.ReduceOp.MAX)
        return int(box)

    def concatenate(self, rows: Tensor) -> Tensor:
        """The rows of all ranks in the order of the ranks: [size * n, ...] of [n, ...] on each.

        Differentiable: a row's gradient is the sum of the gradients that the ranks have for it.
        All ranks must call it, with as many rows, and run the backward pass if one does.
        """
        return rows if self.size == 1 else _Concatenation.apply(rows)

    def agree(self, decision: bool) -> bool:
        """The first rank's decision, on every rank."""
        if self.size == 1:
            return decision
        box = [decision]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """If the block raises on one rank, raise on all: none waits for ever in a reduction."""
        if self.size == 1:
            yield
            return
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:
            error = caught
        failed = torch.tensor([int(error is not None)], device=_collective_device())
        torch.distributed.all_reduce(failed)
        if error is not None:
            raise error
        if failed.item():
            raise StateError(
                f"every rank must finish its part of the work, got {int(failed)} of {self.size} "
                "that failed; see their own messages"
            )

    def hold_the_same(self, value: int) -> bool:
        """Whether `value`, which must fit an int64, is the same on every rank."""
        if self.size == 1:
            return True
        extremes = torch.tensor([value, -value], device=_collective_device())
        torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX)
        highest, negated_lowest = extremes.tolist()
        return highest == -negated_lowest


def _group_exists() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class _Concatenation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor) -> Tensor:
        reachable = _reachable(rows).contiguous()
        parts = [torch.empty_like(reachable) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, reachable)
        return torch.cat(parts).to(rows.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        # A sum of half-precision gradients would be rounded once for each rank.
        total = _reachable(grad.float() if grad.dtype.itemsize < 4 else grad.clone())
        torch.distributed.all_reduce(total)
        rows = len(total) // torch.distributed.get_world_size()
        start = torch.distributed.get_rank() * rows
        return total[start : start + rows].to(grad.device, grad.dtype)


def _reachable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it where a process group of GPUs alone can reduce it."""
    return tensor.to(_collective_device()) if tensor.device.type == "cpu" else tensor


def _collective_device() -> str:
    return "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
