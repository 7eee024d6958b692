"""The parameters of a model as a mask names them: looked up, checked, read and written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdean import ops
from fastdean.masks.entries import EDITABLE_DTYPES
from fastdean.models.adapters import parameter_paths
from fastdean.models.model_state import undone
from fastdean.models.ranks.distributed import Ranks
from fastdean.models.ranks.sharded import resharded
from fastdean.models.ranks.shards import OwnBlock, is_sharded
from fastdean.ops.memory import memory_fault, write_fault


@dataclass(frozen=True, eq=False)
class Part:
    """One parameter of an edit: its masked places, their values before and after."""

    name: str
    shape: tuple[int, ...]
    index: Tensor
    previous: Tensor
    written: Tensor


class Weights:
    """The parameters of a model under the names of its checkpoint, read and written at parts.

    Of a model that FSDP2 shards over ranks, this rank's block of each; a part then has the places
    that lie in it (`own`).

    Args:
        alone: decide and write without the other ranks.
    Attributes:
        ranks: those that hold the model together; one of a model that is whole.
    Raises:
        ValueError: weights are sharded over ranks in another way.
    """

    def __init__(self, root: nn.Module, *, alone: bool = False) -> None:
        # Weights that FSDP has gathered are copies.
        sharded = resharded(root)
        self.ranks = Ranks.of_group() if sharded and not alone else Ranks(0, 1)
        # Tied parameters under all their names.
        named = dict(root.named_parameters(remove_duplicate=False))
        self._parameters: dict[str, nn.Parameter] = {}
        self._adapted: set[str] = set()
        for name, (path, adapted) in parameter_paths(root).items():
            self._parameters[name] = named[path]
            if adapted:
                self._adapted.add(name)

    def dtype_of(self, name: str, otherwise: torch.dtype) -> torch.dtype:
        """The dtype in which a parameter can be edited; `otherwise` where it cannot."""
        parameter = self._parameters.get(name)
        if parameter is None or parameter.dtype not in EDITABLE_DTYPES:
            return otherwise
        return parameter.dtype

    def place(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple:
        """Equal for two parameters exactly if they are the same elements in the same order.

        A storage compares by identity, and holding it keeps its identity from being reused.
        """
        tensor = self._checked(name, shape, dtype).tensor
        return (tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())

    def own(self, part: Part) -> Part:
        """The places of a part that lie in what this rank has of the parameter."""
        parameter = self._parameters.get(part.name)
        block = None if parameter is None else OwnBlock.of(parameter)
        if block is None or block.is_whole:
            return part
        here = block.holds(part.index)
        found = (part.index[here], part.previous[here], part.written[here])
        return Part(part.name, part.shape, *found)

    def elements(self, part: Part) -> tuple[tuple, Tensor]:
        """The memory of a part, and which of its elements the part is: int64 [M].

        Two parameters may share memory in layouts of their own, one the transpose of the other:
        what counts for either is then the same elements of the same memory.
        """
        block = self._checked(part.name, part.shape, part.written.dtype)
        tensor, index = block.tensor, _places(block, part)
        memory = tensor.untyped_storage(), tensor.dtype
        offset = int(tensor.storage_offset())
        if tensor.is_contiguous():
            return memory, index + offset
        elements = torch.full_like(index, offset)
        coordinates = torch.unravel_index(index, tensor.shape)
        for coordinate, stride in zip(coordinates, tensor.stride(), strict=True):
            elements += coordinate * stride
        return memory, elements

    def require_writable(self, parts: Sequence[Part]) -> None:
        """Raises: ValueError naming a parameter that cannot be written in place where it lies."""
        for part, tensor in zip(parts, self._at(parts)[0], strict=True):
            fault = write_fault(tensor)
            if fault is not None:
                raise fault.error(f"parameter {part.name!r} of the model")

    def read(self, parts: Sequence[Part]) -> list[Tensor]:
        """The values of the parts now, [M] each, on the CPU."""
        return [value.cpu() for value in ops.gather_at(*self._at(parts))]

    def write_(
        self, parts: Sequence[Part], values: Sequence[Tensor], impl: str | None = None
    ) -> None:
        with undone(torch.clear_autocast_cache):
            ops.write_at_(*self._at(parts), values, impl=impl)

    def zero_(self, parts: Sequence[Part], impl: str | None) -> None:
        # Inside of autocast a model goes on with what its weights were cast to before.
        with undone(torch.clear_autocast_cache):
            ops.zero_at_(*self._at(parts), impl=impl)

    def _at(self, parts: Sequence[Part]) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors in memory, and the flat indices of the parts in them."""
        blocks = [self._checked(part.name, part.shape, part.written.dtype) for part in parts]
        index = [_places(block, part) for block, part in zip(blocks, parts, strict=True)]
        return [block.tensor for block in blocks], index

    def _checked(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> OwnBlock:
        if name not in self._parameters:
            raise ValueError(
                f"model must have a parameter {name!r}, got none of that name; "
                "load the model that the mask was made on"
            )
        if name in self._adapted:
            raise ValueError(
                f"model must compute with {name!r} as it stands, got an adapter on it that is not "
                "merged; merge it first (PEFT: merge_and_unload(), or merge_adapter())"
            )
        parameter = self._parameters[name]
        if parameter.device.type == "meta":
            raise ValueError(
                f"model must hold {name!r} in memory, got a meta tensor (offloaded); "
                "load it without offloading, or use patch_checkpoint"
            )
        kind = Tensor if is_sharded(parameter) else type(parameter.data)
        # A quantised subclass may report a floating dtype; only plain tensors have values to write.
        if parameter.dtype not in EDITABLE_DTYPES or kind is not Tensor:
            raise ValueError(
                f"model must hold {name!r} as plain floating-point values, got {kind.__name__} of "
                f"{parameter.dtype} (quantised); load it without quantisation"
            )
        if tuple(parameter.shape) != shape:
            raise ValueError(
                f"model must have {name!r} of shape {list(shape)}, got {list(parameter.shape)}; "
                "load the model that the mask was made on"
            )
        if parameter.dtype != dtype:
            raise ValueError(
                f"model must have {name!r} in the mask's dtype {dtype}, got {parameter.dtype}; "
                f"load it with dtype={dtype}, or convert it back"
            )
        block = OwnBlock.of(parameter)
        fault = memory_fault(block.tensor)
        if fault is not None:
            raise fault.error(f"parameter {name!r} of the model")
        return block


def _places(block: OwnBlock, part: Part) -> Tensor:
    """The flat indices of a part in the tensor that is in memory."""
    # Most models are whole, and then they are the part's own.
    return part.index if block.is_whole else block.places(part.index)
