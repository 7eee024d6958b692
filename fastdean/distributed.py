"""What the ranks of a `torch.distributed` job do together; one rank when there is no job."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdean._logging import logger


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int
    size: int

    @classmethod
    def current(cls) -> Ranks:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            logger.warning(
                "WORLD_SIZE is %s but torch.distributed is not initialised: every process does the "
                "whole work; call torch.distributed.init_process_group() first",
                os.environ["WORLD_SIZE"],
            )
        return cls(0, 1)

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
            raise RuntimeError(
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


def _reachable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it where a process group of GPUs alone can reduce it."""
    return tensor.to(_collective_device()) if tensor.device.type == "cpu" else tensor


def _collective_device() -> str:
    return "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
