"""Chosen rows of a matrix that is sharded over ranks: whole on every rank, with their gradient.

Of a row every rank that has a part of it sends that part, and nothing else of the matrix is sent.
Back goes a gradient for the rank's own part of the rows. What the ranks' gradients have to do with
each other is the caller's: he gives what makes them one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdean.models.ranks.distributed import Ranks
from fastdean.models.ranks.shards import OwnBlock, in_memory, is_sharded, split_fault


class SharedRows:
    """The rows at an index of one sharded matrix, gathered again for every pass.

    Args:
        matrix: a DTensor [V, D].
        index: of the rows, ascending and each once.
    Raises:
        ValueError: the matrix is placed otherwise than in blocks.
    """

    def __init__(self, matrix: Tensor, index: Sequence[int]) -> None:
        sharded: Any = matrix
        if (fault := rows_fault(sharded)) is not None:
            raise ValueError(
                f"matrix must lie in blocks on the ranks, got one {fault}; gather it first "
                "(full_tensor)"
            )
        self.placed = placing(matrix)
        block = OwnBlock.of(sharded.detach())
        wanted = torch.tensor(index)
        rows, columns = block.along
        held = torch.arange(len(wanted))
        if rows is not None:
            held = held[torch.isin(wanted, rows)]
        own = wanted[held] if rows is None else torch.searchsorted(rows, wanted[held])
        device = block.tensor.device
        self._size = torch.Size((len(wanted), matrix.shape[1]))
        # Which of the rows this rank has, where in its block, and which of their columns.
        self._held, self._own = held.to(device), own.to(device)
        self._columns = None if columns is None else columns.to(device)
        # What lies on several ranks is put together over each dimension that cuts it.
        mesh, placements = sharded.device_mesh, sharded.placements
        self._groups = [
            mesh.get_group(i)
            for i, each in enumerate(placements)
            if not each.is_replicate() and mesh.size(i) > 1
        ]

    def gathered(self, matrix: Tensor, joined: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The rows [M, D] of the matrix as it is now, on every rank, differentiable.

        All ranks call it, and run the backward pass if one does.

        Args:
            matrix: placed as the one that this was made for.
            joined: a rank's gradient of the rows [M, D] -> the one that goes into the matrix, the
                same on all ranks that share it; None: it is that already.
        """
        assert placing(matrix) == self.placed
        return _Gathered.apply(matrix, self, joined)

    def _taken(self, block: Tensor) -> Tensor:
        """The rows, and zeros in the place of what other ranks have of them."""
        found = block.new_zeros(self._size)
        if self._columns is None:
            found.index_copy_(0, self._held, block.index_select(0, self._own))
        else:
            part = found.new_zeros(len(self._held), self._size[1])
            part.index_copy_(1, self._columns, block.index_select(0, self._own))
            found.index_copy_(0, self._held, part)
        return found

    def _put(self, rows: Tensor, block: Tensor) -> Tensor:
        """A block of the shape and dtype of `block` with this rank's part of the rows."""
        part = rows.index_select(0, self._held)
        if self._columns is not None:
            part = part.index_select(1, self._columns)
        return torch.zeros_like(block).index_copy_(0, self._own, part.to(block.dtype))


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Any, rows: SharedRows, joined: Any) -> Tensor:
        ctx.like, ctx.rows, ctx.joined = matrix.detach(), rows, joined
        found = rows._taken(in_memory(ctx.like.to_local()))
        # Everything but one rank's number is zero: the sum of the bytes has that one's bits.
        for group in rows._groups:
            Ranks.of_group().sum_([found.view(torch.uint8)], group)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        from torch.distributed.tensor import DTensor

        if ctx.joined is not None:
            grad = ctx.joined(grad)
        like = ctx.like
        own = ctx.rows._put(grad, in_memory(like.to_local()))
        placed = DTensor.from_local(
            own,
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )
        return placed, None, None


def placing(matrix: Any) -> tuple[Any, ...] | None:
    """How a tensor is sharded: equal for those of which a rank has the same entries."""
    if not is_sharded(matrix):
        return None
    return matrix.device_mesh, matrix.placements, matrix.shape, matrix.device


def rows_fault(matrix: Any) -> str | None:
    """Why rows of a sharded tensor cannot be gathered; None if they can."""
    if any(each.is_partial() for each in matrix.placements):
        return f"placed as {tuple(matrix.placements)}"
    return split_fault(matrix) if matrix.device_mesh.ndim == 1 else None
