"""One parameter that is sharded over ranks (FSDP2, tensor parallel), and what a rank has of it.

A sharded parameter is a DTensor. Its shape and dtype are those of the whole; on a rank lies a block
of it, whose entries are found here by their flat indices in the whole.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdean.models.ranks.distributed import Ranks


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
    if is_cut_twice(sharded):
        return _put_together(sharded, sharded.device_mesh.ndim)
    with Ranks.of_group().together():
        return sharded.full_tensor()


def split_alone(tensor: Tensor, like: Tensor, dims: int) -> Tensor:
    """A parameter that FSDP2 shards, gathered in its own dtype, still split by tensor parallel.

    All ranks call it.

    Args:
        like: placed as the result, a DTensor of the mesh of tensor parallel.
        dims: how many dimensions of the parameter's mesh are FSDP2's; they come first.
    """
    from torch.distributed.tensor import DTensor

    placed: Any = like
    return DTensor.from_local(
        _put_together(tensor.detach(), dims),
        placed.device_mesh,
        placed.placements,
        run_check=False,
        shape=placed.shape,
        stride=placed.stride(),
    )


def _put_together(sharded: Any, dims: int) -> Tensor:
    """What lies on the ranks along the first dimensions of the mesh of a sharded tensor.

    DTensor's own way asks for blocks in the order of the mesh's dimensions, and FSDP2 cuts what
    tensor parallel has cut before.
    """
    block, larger = OwnBlock.of(sharded), OwnBlock.split(sharded, dims)
    found = block.tensor.new_zeros(larger.tensor.shape)
    places = []
    for axis, (own, of_larger) in enumerate(zip(block.along, larger.along, strict=True)):
        if own is None:
            own = torch.arange(found.shape[axis])
        elif of_larger is not None:
            own = torch.searchsorted(of_larger, own)
        shape = [-1 if each == axis else 1 for each in range(found.dim())]
        places.append(own.view(shape).to(found.device))
    found[tuple(places)] = block.tensor
    mesh = sharded.device_mesh
    for i in range(dims):
        if mesh.size(i) > 1 and not sharded.placements[i].is_replicate():
            # Everything but one rank's number is zero: the sum of the bytes has that one's bits.
            Ranks.of_group().sum_([found.view(torch.uint8)], mesh.get_group(i))
    return found


def shard_fault(tensor: Tensor, size: int) -> str | None:
    """Why a rank's block of a sharded tensor is not the plain one that `Shard` takes it for.

    Args:
        size: of the ranks over all of which the tensor must be sharded or replicated.
    """
    from torch.distributed.tensor import Replicate, Shard

    sharded: Any = tensor
    placements = sharded.placements
    # A strided block has another class.
    cuts = [each for each in placements if type(each) is not Replicate]
    if len(cuts) > 1 or any(type(each) is not Shard for each in cuts):
        return f"placed as {tuple(placements)}"
    return _block_fault(sharded, size)


def split_shard_fault(tensor: Tensor, size: int, dims: int) -> str | None:
    """Why a tensor that tensor parallel splits and FSDP2 shards is none whose blocks are known.

    Args:
        size: of the process group, over all of which the tensor must lie.
        dims: how many dimensions of its mesh are FSDP2's; they come first.
    """
    sharded: Any = tensor
    placements, mesh = sharded.placements, sharded.device_mesh
    if mesh.ndim != dims + 1:
        return f"split over {mesh.ndim - dims} dimensions of a mesh by tensor parallel"
    if not all(each.is_replicate() or hasattr(each, "dim") for each in placements):
        return f"placed as {tuple(placements)}"
    return _block_fault(sharded, size)


def _block_fault(sharded: Any, size: int) -> str | None:
    """Why a rank's block is no plain tensor of one that lies on all ranks."""
    if sharded.device_mesh.size() != size:
        return f"on {sharded.device_mesh.size()} of {size} ranks"
    if type(sharded.to_local()) is not Tensor:
        return f"of {type(sharded.to_local()).__name__}"
    return None


def is_cut_twice(tensor: Tensor) -> bool:
    """Whether several dimensions of the mesh of a sharded tensor cut it."""
    sharded: Any = tensor
    return sum(not each.is_replicate() for each in sharded.placements) > 1


def split_fault(tensor: Tensor) -> str | None:
    """Why a sharded tensor is none that one axis of is cut, or none, as tensor parallel cuts it."""
    sharded: Any = tensor
    placements, mesh = sharded.placements, sharded.device_mesh
    if mesh.ndim != 1:
        return f"on a mesh of {mesh.ndim} dimensions"
    # Strided shards, of matrices that are packed into one, have an axis too.
    if not (placements[0].is_replicate() or hasattr(placements[0], "dim")):
        return f"placed as {tuple(placements)}"
    if type(sharded.to_local()) is not Tensor:
        return f"of {type(sharded.to_local()).__name__}"
    return None


def in_memory(tensor: Tensor) -> Tensor:
    """A tensor of no subclass of torch's collectives: what they still wait for has come."""
    waits = getattr(tensor, "trigger_wait", None)
    return tensor if waits is None else waits()


def placed_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This rank's block of a gradient of a parameter; all ranks that share it call it."""
    if not is_sharded(tensor):
        return in_memory(tensor)
    # DTensors, of whose methods a type checker is told nothing.
    sharded: Any = tensor
    like: Any = parameter
    if sharded.placements != like.placements:
        sharded = sharded.redistribute(like.device_mesh, like.placements)
    return in_memory(sharded.to_local())


def whole_features(features: Tensor) -> Tensor:
    """Differentiable activations as every rank that shares them computes on: all of a DTensor.

    Its gradient must be the same on all of these ranks.
    """
    if not is_sharded(features):
        return features
    sharded: Any = features
    return in_memory(sharded.full_tensor())


def rows_at(rows: Tensor, index: Tensor) -> Tensor:
    """The rows [1, M, H] at an index of [..., H], all but the last axis counted as one.

    Of a DTensor one that every rank has; all ranks that share it call this.
    """
    if not is_sharded(rows):
        return rows.flatten(0, -2).index_select(0, index.to(rows.device)).unsqueeze(0)
    from torch.distributed.tensor import DTensor, Replicate

    sharded: Any = rows
    mesh = sharded.device_mesh
    everywhere = [Replicate()] * mesh.ndim
    found = rows_at(sharded.redistribute(mesh, everywhere).to_local(), index)
    return DTensor.from_local(found, mesh, everywhere, run_check=False)


@dataclass(frozen=True, eq=False)
class OwnBlock:
    """What this rank has of a parameter.

    Attributes:
        tensor: the values, in the memory of the parameter.
        shape: of the whole parameter.
        along: of each axis, which of its places the block has, int64 ascending on the CPU; None:
            all. So flat indices ascend in the block as they do in the whole.
    """

    tensor: Tensor
    shape: torch.Size
    along: tuple[Tensor | None, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, parameter: Tensor) -> OwnBlock:
        """Of a parameter without a fault; of one that is not sharded all of it."""
        if not is_sharded(parameter):
            return cls(parameter, parameter.shape, (None,) * parameter.dim())
        sharded: Any = parameter
        tensor = in_memory(sharded.to_local())
        along = tuple(_places_along(sharded, axis) for axis in range(parameter.dim()))
        block = cls(tensor, parameter.shape, along)
        assert tensor.shape == block._own_sizes(), "or its entries lie elsewhere"
        return block

    @classmethod
    def split(cls, parameter: Tensor, dims: int) -> OwnBlock:
        """What this rank has while FSDP2 has a sharded parameter gathered: shapes, on meta.

        Args:
            dims: how many dimensions of the parameter's mesh are FSDP2's; they come first.
        """
        along = tuple(_places_along(parameter, axis, dims) for axis in range(parameter.dim()))
        of_shape = cls(parameter, parameter.shape, along)._own_sizes()
        tensor = torch.empty(of_shape, dtype=parameter.dtype, device="meta")
        return cls(tensor, parameter.shape, along)

    @property
    def is_whole(self) -> bool:
        """Whether nothing of the parameter lies elsewhere."""
        return self.tensor.shape == self.shape

    def holds(self, index: Tensor) -> Tensor:
        """bool [M]: which flat indices of the whole lie in this block."""
        here = torch.ones_like(index, dtype=torch.bool)
        for place, own in zip(torch.unravel_index(index, self.shape), self.along, strict=True):
            if own is not None:
                here &= torch.isin(place, own.to(place.device))
        return here

    def places(self, index: Tensor) -> Tensor:
        """int64 [M]: flat indices in the block, of flat indices of the whole that it holds."""
        found = torch.zeros_like(index)
        for axis, place in enumerate(torch.unravel_index(index, self.shape)):
            own = self.along[axis]
            if own is not None:
                place = torch.searchsorted(own.to(place.device), place.contiguous())
            found = found * self.tensor.shape[axis] + place
        return found

    def flat_index(self, places: Tensor) -> Tensor:
        """int64 [M]: flat indices in the whole, of flat indices in the block."""
        found = torch.zeros_like(places)
        for axis, place in enumerate(torch.unravel_index(places, self.tensor.shape)):
            own = self.along[axis]
            found = found * self.shape[axis] + (
                place if own is None else own.to(place.device)[place]
            )
        return found

    def rows_and_columns(self) -> tuple[Tensor, Tensor]:
        """Where its rows and columns lie in the whole, all axes but the last taken as one."""
        *leading, columns = self.tensor.shape
        of_rows = torch.arange(math.prod(leading))
        rows = OwnBlock(self.tensor[..., 0], self.shape[:-1], self.along[:-1]).flat_index(of_rows)
        own = self.along[-1]
        return rows, torch.arange(columns) if own is None else own

    def part(self, first: int, end: int) -> OwnBlock:
        """The same of places `first` to `end` of the first axis, all of which the block has."""
        assert self.along[0] is None
        return OwnBlock(
            self.tensor[first:end], torch.Size((end - first, *self.shape[1:])), self.along
        )

    @property
    def cut(self) -> int | None:
        """The axis that lies on several ranks."""
        return next((axis for axis, own in enumerate(self.along) if own is not None), None)

    def features(self, rows: Tensor, axis: int) -> Tensor:
        """Of rows with a number for each place along an axis of the whole, those of the block's.

        Args:
            rows: [..., whole or own], plain or a DTensor. All ranks that share it call this.
        """
        own = self.along[axis]
        if is_sharded(rows):
            rows = self._rows_of(rows, own)
        rows = in_memory(rows)
        if own is None or rows.shape[-1] == len(own):
            return rows
        assert rows.shape[-1] == self.shape[axis], "or they are of another weight"
        return rows.index_select(-1, own.to(rows.device))

    @staticmethod
    def _rows_of(rows: Any, own: Tensor | None) -> Tensor:
        (placement,) = rows.placements
        last = placement.is_shard(-1) or placement.is_shard(rows.dim() - 1)
        # In one piece: then they are cut as the axis is.
        if last and own is not None and len(own) and int(own[-1] - own[0]) + 1 == len(own):
            return rows.to_local()
        return rows.full_tensor()

    def _own_sizes(self) -> torch.Size:
        sizes = zip(self.shape, self.along, strict=True)
        return torch.Size(size if own is None else len(own) for size, own in sizes)


def _places_along(parameter: Any, axis: int, first: int = 0) -> Tensor | None:
    """Which places of an axis a rank's block has, by the dimensions of the mesh from `first` on.

    Where FSDP2 cuts an axis that tensor parallel has cut, its dimension comes before in the mesh
    and cuts after. It says so by a strided shard of as many groups as there are cuts behind. Any
    other strided shard is of matrices that are packed into one, of each of which a rank has a part.
    """
    mesh, placements = parameter.device_mesh, parameter.placements
    cuts = [
        i
        for i, each in enumerate(placements)
        if i >= first
        and hasattr(each, "dim")
        and each.dim % parameter.dim() == axis
        and mesh.size(i) > 1
    ]
    if not cuts:
        return None
    return own_places(
        parameter.shape[axis],
        [mesh.size(i) for i in cuts],
        [getattr(placements[i], "split_factor", 1) for i in cuts],
        [mesh.get_coordinate()[i] for i in cuts],
    )


def own_places(
    number: int, parts: Sequence[int], groups: Sequence[int], coordinates: Sequence[int]
) -> Tensor:
    """int64, ascending: which of so many places a rank has; of each dimension of a mesh that cuts
    them, how many parts it makes, its `split_factor`, and the rank's coordinate."""
    behind = [math.prod(parts[i + 1 :]) for i in range(len(parts))]
    later = [i for i, of in enumerate(groups) if 1 < of == behind[i]]
    places = torch.arange(number)
    for i in [*(i for i in range(len(parts)) if i not in later), *reversed(later)]:
        packed = places.chunk(1 if i in later else groups[i])
        found = [_chunk(each, parts[i], coordinates[i]) for each in packed]
        places = torch.cat(found)
    return places


def _chunk(places: Tensor, parts: int, number: int) -> Tensor:
    """The chunk of this number; the last may be smaller than the others, or missing."""
    chunks = places.chunk(parts)
    return chunks[number] if number < len(chunks) else places[:0]
