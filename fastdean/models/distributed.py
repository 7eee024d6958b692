"""What the ranks of a `torch.distributed` job do together; one rank when there is no job.

Inside `failing_together` every collective first asks whether all ranks have come so far. A rank
that fails anywhere answers that question and goes; the others, which expect it in some collective,
hear of it there. So all stay in step, and none waits for ever.
"""

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


@dataclass
class _Meeting:
    """Of this process, as its process group is: blocks of `failing_together` that are open, and
    whether all ranks know of a failure inside."""

    depth: int = 0
    failure_is_known: bool = False


_meeting = _Meeting()


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
        self._require_all_here()
        for tensor in tensors:
            reachable = _reachable(tensor)
            torch.distributed.all_reduce(reachable)
            if reachable is not tensor:
                tensor.copy_(reachable)

    def highest(self, value: int) -> int:
        """The largest of the ranks' values, on every rank."""
        if self.size == 1:
            return value
        self._require_all_here()
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
        self._require_all_here()
        box = [decision]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """If the block raises on one rank, raise on all: none waits for ever in a reduction.

        Blocks may lie in one another. Inside, ranks meet in the methods of this class alone.
        """
        if self.size == 1:
            yield
            return
        if _meeting.depth == 0:
            _meeting.failure_is_known = False
        _meeting.depth += 1
        try:
            yield
        except BaseException:
            # Told once: all ranks are on their way out by then.
            if not _meeting.failure_is_known:
                self._meet(failed=True)
            raise
        else:
            self._meet(failed=False)
        finally:
            _meeting.depth -= 1

    def _require_all_here(self) -> None:
        """Before a collective: raise if another rank has failed in a block that both are in."""
        if _meeting.depth:
            self._meet(failed=False)

    def _meet(self, *, failed: bool) -> None:
        """Tell the other ranks whether this one has failed; StateError if only others have."""
        # Of a group that has broken down nothing is asked again.
        _meeting.failure_is_known = True
        count = torch.tensor([int(failed)], device=_collective_device())
        torch.distributed.all_reduce(count)
        _meeting.failure_is_known = bool(count)
        if _meeting.failure_is_known and not failed:
            raise StateError(
                f"every rank must finish its part of the work, got {int(count)} of {self.size} "
                "that failed; see their own messages"
            )

    def hold_the_same(self, value: int) -> bool:
        """Whether `value`, which must fit an int64, is the same on every rank."""
        if self.size == 1:
            return True
        self._require_all_here()
        extremes = torch.tensor([value, -value], device=_collective_device())
        torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX)
        highest, negated_lowest = extremes.tolist()
        return highest == -negated_lowest


@contextmanager
def failing_together() -> Iterator[None]:
    """`Ranks.failing_together` of the process group that there is then; decorates functions too."""
    with Ranks.of_group().failing_together():
        yield


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
