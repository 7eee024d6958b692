"""Sums of a tensor's bits, of which an exact checksum is made."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdean.ops._dispatch import choose
from fastdean.ops.memory import check_dense, check_memory, check_tensor, memory_fault
from fastdean.wording.mendable import InputTypeError

_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bit_sums(weight: Tensor, *, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """Sums of the bits of each row and of each column, each entry's read as a signed integer.

    Equivalent to, modulo 2^64:

        bits = weight.view(torch.int32).to(torch.int64).flatten(0, -2)  # of a dtype of 4 bytes
        return bits.sum(1), bits.sum(0)

    Args:
        weight: any shape, any strides, any dtype of 1, 2, 4 or 8 bytes, but no quantised one. Rows
            are all axes but the last taken as one; of fewer than two axes each entry is a row.
        impl: None (by device), "reference" or "native" (CPU).
    Returns:
        int64 [R] and int64 [C], on the device of `weight`.
    Raises:
        ValueError, TypeError: `weight` is no dense tensor of such a dtype, or with "native" one
            without memory to read.
    """
    check_tensor("weight", weight)
    check_dense("weight", weight)
    # torch views a quantised tensor as integers, and ends the process when these are read.
    integer = None if weight.is_quantized else _INTEGER_OF_SIZE.get(weight.element_size())
    if integer is None:
        raise InputTypeError(
            f"weight must be of a dtype of 1, 2, 4 or 8 bytes, got {weight.dtype}; pass the "
            "numbers that it holds (int_repr, view_as_real)"
        )
    bits = weight.detach().resolve_conj().resolve_neg().view(integer)
    rows = bits.flatten(0, -2) if bits.dim() > 1 else bits.reshape(-1, 1)
    if impl is None and memory_fault(rows) is not None:
        # The operations of a subclass of tensors may reach values that no address does.
        impl = "reference"
    elif impl != "reference":
        check_memory("weight", rows)
    return choose("bit_sums", rows.device, impl, rows.dtype).callable(rows)
