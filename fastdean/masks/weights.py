"""The parameters of a model as a mask names them: looked up, checked, read and written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdean import ops
from fastdean.masks.entries import EDITABLE_DTYPES
from fastdean.models.adapters import parameter_paths
from fastdean.ops.memory import memory_fault, write_fault

# Name components that a wrapper adds and that no checkpoint has.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


@dataclass(frozen=True, eq=False)
class Part:
    """One parameter of an edit: its masked places, their values before and after."""

    name: str
    shape: tuple[int, ...]
    index: Tensor
    previous: Tensor
    written: Tensor


class Weights:
    """The parameters of a model under the names of its checkpoint, read and written at parts."""

    def __init__(self, root: nn.Module) -> None:
        # Tied parameters under all their names.
        named = dict(root.named_parameters(remove_duplicate=False))
        self._parameters: dict[str, nn.Parameter] = {}
        self._adapted: set[str] = set()
        for name, (path, adapted) in parameter_paths(root).items():
            name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
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
        parameter = self._checked(name, shape, dtype)
        return (
            parameter.untyped_storage(),
            parameter.storage_offset(),
            parameter.shape,
            parameter.stride(),
        )

    def elements(self, part: Part) -> tuple[tuple, Tensor]:
        """The memory of a part, and which of its elements the part is: int64 [M].

        Two parameters may share memory in layouts of their own, one the transpose of the other:
        what counts for either is then the same elements of the same memory.
        """
        parameter = self._checked(part.name, part.shape, part.written.dtype)
        memory = parameter.untyped_storage(), parameter.dtype
        offset = int(parameter.storage_offset())
        if parameter.is_contiguous():
            return memory, part.index + offset
        elements = torch.full_like(part.index, offset)
        coordinates = torch.unravel_index(part.index, parameter.shape)
        for coordinate, stride in zip(coordinates, parameter.stride(), strict=True):
            elements += coordinate * stride
        return memory, elements

    def require_writable(self, parts: Sequence[Part]) -> None:
        """Raises: ValueError naming a parameter that cannot be written in place where it lies."""
        for part, parameter in zip(parts, self._tensors(parts), strict=True):
            fault = write_fault(parameter)
            if fault is not None:
                raise fault.error(f"parameter {part.name!r} of the model")

    def read(self, parts: Sequence[Part]) -> list[Tensor]:
        """The values of the parts now, [M] each, on the CPU."""
        values = ops.gather_at(self._tensors(parts), [part.index for part in parts])
        return [value.cpu() for value in values]

    def write_(
        self, parts: Sequence[Part], values: Sequence[Tensor], impl: str | None = None
    ) -> None:
        ops.write_at_(self._tensors(parts), [part.index for part in parts], values, impl=impl)

    def zero_(self, parts: Sequence[Part], impl: str | None) -> None:
        ops.zero_at_(self._tensors(parts), [part.index for part in parts], impl=impl)

    def _tensors(self, parts: Sequence[Part]) -> list[nn.Parameter]:
        return [self._checked(part.name, part.shape, part.written.dtype) for part in parts]

    def _checked(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
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
        # A quantised subclass may report a floating dtype; only plain tensors have values to write.
        if parameter.dtype not in EDITABLE_DTYPES or type(parameter.data) is not Tensor:
            raise ValueError(
                f"model must hold {name!r} as plain floating-point values, got "
                f"{type(parameter.data).__name__} of {parameter.dtype} (quantised or sharded); "
                "load it without quantisation"
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
        fault = memory_fault(parameter)
        if fault is not None:
            raise fault.error(f"parameter {name!r} of the model")
        return parameter
