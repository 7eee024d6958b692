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
                "WORLD_SIZE is %s but torch.distributed is not initialised: every process does the whole work; "
                "call torch.distributed.init_process_group() first",
                os.environ["WORLD_SIZE"],
            )
        return cls(0, 1)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """If the block raises on one rank, raise on all, so that none waits for ever in a reduction."""
        if self.size == 1:
            yield
            return
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:
            error = caught
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        failed = torch.tensor([int(error is not None)], device=device)
        torch.distributed.all_reduce(failed)
        if error is not None:
            raise error
        if failed.item():
            raise RuntimeError(
                f"{int(failed)} of {self.size} ranks failed while scoring; see their own messages"
            )
