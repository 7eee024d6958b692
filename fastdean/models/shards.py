"""One parameter that FSDP2 (`fully_shard`) shards over the ranks, and what a rank has of it.

A sharded parameter is a DTensor. Its shape and dtype are those of the whole; on a rank lies a block
of it, whose entries are found here by their flat indices in the whole.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdean.models.distributed import Ranks


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is sharded over ranks (a DTensor)."""
    # Nobody made one where the module was never imported, and importing it takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, detached, with the bits that the ranks hold; all ranks call it.

    One that is sharded is gathered into new memory on every rank; another one is returned.
    """
    if not is_sharded(tensor):
        return tensor.detach()
    sharded: Any = tensor.detach()
    with Ranks.of_group().together():
        return sharded.full_tensor()


def shard_fault(tensor: Tensor, size: int) -> str | None:
    """Why a rank's block of a sharded tensor is not the plain one that `Shard` takes it for.

    Args:
        size: of the process group, over all of which the tensor must be sharded or replicated.
    """
    from torch.distributed.tensor import Replicate, Shard

    sharded: Any = tensor
    placements, mesh = sharded.placements, sharded.device_mesh
    # A strided block has another class.
    cuts = [each for each in placements if type(each) is not Replicate]
    if len(cuts) > 1 or any(type(each) is not Shard for each in cuts):
        return f"placed as {tuple(placements)}"
    if mesh.size() != size:
        return f"on {mesh.size()} of {size} ranks"
    if type(sharded.to_local()) is not Tensor:
        return f"of {type(sharded.to_local()).__name__}"
    return None


@dataclass(frozen=True, eq=False)
class OwnBlock:
    """What this rank has of a parameter.

    Attributes:
        tensor: the values, in the memory of the parameter.
        shape: of the whole parameter.
        first: of each axis, where the block begins in the whole.
    """

    tensor: Tensor
    shape: torch.Size
    first: tuple[int, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, parameter: Tensor) -> OwnBlock:
        """Of a parameter without a `shard_fault`; of one that is not sharded all of it."""
        if not is_sharded(parameter):
            return cls(parameter, parameter.shape, (0,) * parameter.dim())
        sharded: Any = parameter
        # As checkpoints of torch.distributed ask where a rank's part lies.
        (block,) = sharded.__create_chunk_list__()
        tensor = sharded.to_local()
        assert tensor.shape == block.sizes, "or its entries lie elsewhere"
        return cls(tensor, parameter.shape, tuple(block.offsets))

    @property
    def is_whole(self) -> bool:
        """Whether nothing of the parameter lies elsewhere."""
        return self.tensor.shape == self.shape

    def holds(self, index: Tensor) -> Tensor:
        """bool [M]: which flat indices of the whole lie in this block."""
        here = torch.ones_like(index, dtype=torch.bool)
        for place, first, size in self._along_axes(index):
            here &= (place >= first) & (place < first + size)
        return here

    def places(self, index: Tensor) -> Tensor:
        """int64 [M]: flat indices in the block, of flat indices of the whole that it holds."""
        found = torch.zeros_like(index)
        for place, first, size in self._along_axes(index):
            found = found * size + place - first
        return found

    def _along_axes(self, index: Tensor) -> list[tuple[Tensor, int, int]]:
        coordinates = torch.unravel_index(index, self.shape)
        return list(zip(coordinates, self.first, self.tensor.shape, strict=True))
