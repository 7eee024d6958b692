"""The checks of a mask operation's arguments, and their messages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdean.native.structs import MAX_RANK
from fastdean.ops import memory
from fastdean.wording.mendable import InputTypeError

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_edited_places(tensors: Sequence[Tensor], indices: Sequence[Tensor]) -> None:
    """Checks the tensors and indices of a mask operation; see `mask.zero_at_`.

    Raises: TypeError or ValueError, naming the position of the offender.
    """
    if len(tensors) != len(indices):
        raise ValueError(
            f"indices must have one entry per tensor, got {len(indices)} for {len(tensors)} tensors"
        )
    memory.check_surroundings()
    for position, (tensor, index) in enumerate(zip(tensors, indices, strict=True)):
        _check_tensor(tensor, f"tensors[{position}]")
        _check_index(index, tensor, f"indices[{position}]")
    if not _all_ascend_within(tensors, indices):
        for position, (tensor, index) in enumerate(zip(tensors, indices, strict=True)):
            _check_places(index, tensor, f"indices[{position}]")


def check_writable(tensors: Sequence[Tensor]) -> None:
    """Raises: ValueError for a tensor that cannot be written in place; see `memory.write_fault`."""
    for position, tensor in enumerate(tensors):
        memory.check_written(f"tensors[{position}]", tensor)


def check_values(
    tensors: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor]
) -> None:
    """Raises: TypeError or ValueError unless `values` has, per tensor, a value per index."""
    if len(values) != len(tensors):
        raise ValueError(
            f"values must have one entry per tensor, got {len(values)} for {len(tensors)} tensors"
        )
    for position, (tensor, index, value) in enumerate(zip(tensors, indices, values, strict=True)):
        name = f"values[{position}]"
        if not isinstance(value, Tensor):
            raise InputTypeError(
                f"{name} must be a torch.Tensor, got {type(value).__name__}; make it with "
                "torch.tensor"
            )
        memory.check_memory(name, value)
        if value.dtype != tensor.dtype:
            raise ValueError(
                f"{name} must have its tensor's dtype {tensor.dtype}, got {value.dtype}; "
                "a conversion here would not be bit-exact"
            )
        if value.shape != index.shape:
            raise ValueError(
                f"{name} must have shape {tuple(index.shape)}, one value per index, "
                f"got {tuple(value.shape)}"
            )


def _check_tensor(tensor: Tensor, name: str) -> None:
    if not isinstance(tensor, Tensor):
        raise InputTypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    memory.check_memory(name, tensor)
    if tensor.is_neg():
        raise ValueError(
            f"{name} must hold its values as they are, got a tensor that torch negates on reading; "
            "pass tensor.resolve_neg()"
        )
    if tensor.dtype not in _FLOATS:
        raise ValueError(
            f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}; "
            "quantized weights must be dequantized before they are edited"
        )
    if tensor.dim() > MAX_RANK:
        raise ValueError(f"{name} must have at most {MAX_RANK} dimensions, got {tensor.dim()}")


def _check_index(index: Tensor, tensor: Tensor, name: str) -> None:
    if not isinstance(index, Tensor):
        raise InputTypeError(f"{name} must be a torch.Tensor, got {type(index).__name__}")
    if index.dtype != torch.int64 or index.dim() != 1:
        raise ValueError(
            f"{name} must be a 1-D int64 tensor, got {index.dim()}-D {index.dtype}; "
            "flat indices are row-major over the tensor's shape"
        )
    if index.device.type != "cpu" and index.device != tensor.device:
        raise ValueError(
            f"{name} must be on the CPU or on its tensor's device {tensor.device}, "
            f"got {index.device}"
        )
    memory.check_memory(name, index)


def _all_ascend_within(tensors: Sequence[Tensor], indices: Sequence[Tensor]) -> bool:
    """Whether every index is in order and in range, checked at once for all tensors."""
    pairs = [(t, i) for t, i in zip(tensors, indices, strict=True) if i.numel()]
    if not pairs:
        return True
    if any(index.device.type != "cpu" for _, index in pairs):
        return False
    flat = torch.cat([index for _, index in pairs])
    ends = torch.tensor([index.numel() for _, index in pairs], device="cpu").cumsum(0)
    ascends = flat[1:] > flat[:-1]
    ascends[ends[:-1] - 1] = True
    first, last = flat[torch.cat([ends[:1] * 0, ends[:-1]])], flat[ends - 1]
    sizes = torch.tensor([tensor.numel() for tensor, _ in pairs], device="cpu")
    return bool(ascends.all()) and bool((first >= 0).all()) and bool((last < sizes).all())


def _check_places(index: Tensor, tensor: Tensor, name: str) -> None:
    if index.numel() == 0:
        return
    if bool((index[1:] <= index[:-1]).any()):
        raise ValueError(
            f"{name} must be sorted in strictly ascending order, got unsorted or repeated indices; "
            "use torch.unique(indices)"
        )
    first, last = int(index[0]), int(index[-1])
    if first < 0 or last >= tensor.numel():
        raise ValueError(
            f"{name} must lie in 0..{tensor.numel() - 1} for a tensor of shape "
            f"{tuple(tensor.shape)}, got {first if first < 0 else last}"
        )
