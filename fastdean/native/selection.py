"""The exact selection of the most important entries on the CPU."""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

from fastdean.native.extension import cpu_level, dtype_code, loaded
from fastdean.native.structs import written


def select_top(
    sums: Tensor, weight: Tensor | None, num_examples: int, k: int, *, level: int | None = None
) -> Tensor:
    """`ops.select_top` in compiled code, for weights in fp32, bf16, fp16 and fp64 on the CPU.

    The other arguments have passed its checks.

    Args:
        level: number of an instruction set; None for `cpu_level()`.
    Raises: ValueError if an importance is NaN or infinite, or the processor lacks the level.
    """
    extension = loaded()
    k = min(k, sums.numel())
    indices = torch.empty(k, dtype=torch.int64, device="cpu")
    if sums.numel() == 0:
        return indices
    given = [sums.detach()] if weight is None else [sums.detach(), weight.detach().cpu()]
    rows, columns, laid_out = _as_matrices(given)
    found = torch.empty(3, dtype=torch.int64, device="cpu")
    of_weight = {}
    if weight is not None:
        of_weight = {
            "weight": laid_out[1].data_ptr(),
            "weight_stride_r": laid_out[1].stride(0),
            "weight_stride_c": laid_out[1].stride(1),
            "weight_dtype": dtype_code(laid_out[1].dtype),
        }
    params = written(
        "SelectionParams",
        sums=laid_out[0].data_ptr(),
        sums_stride_r=laid_out[0].stride(0),
        sums_stride_c=laid_out[0].stride(1),
        **of_weight,
        rows=rows,
        columns=columns,
        num_examples=num_examples,
        k=k,
        indices=indices.data_ptr(),
        found=found.data_ptr(),
        level=cpu_level() if level is None else level,
        num_workers=torch.get_num_threads(),
    )
    address = params.buffer_info()[0]
    size = extension.select_top_workspace_bytes(params=address)
    workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
    params[-1] = workspace.data_ptr()
    extension.select_top_cpu(params=address)
    count, flaw, bits = found.tolist()
    if flaw >= 0:
        raise not_finite_error(bits, flaw)
    # Not a view, which would keep the memory of all k.
    return indices if count == k else indices[:count].clone()


def not_finite_error(bits: int, index: int) -> ValueError:
    """The error for an importance, given by the bits of its fp32, at a flat index."""
    value = struct.unpack("f", struct.pack("I", bits))[0]
    return ValueError(
        f"importance must be finite, got {value} at flat index {index}; "
        "check the losses and the model's weights"
    )


def _as_matrices(tensors: list[Tensor]) -> tuple[int, int, list[Tensor]]:
    """Tensors of one shape as matrices [rows, columns] in the order of their flat indices.

    Copied are those that torch negates on reading, and those of three or more dimensions whose
    leading ones have no common stride.
    """
    tensors = [tensor.resolve_neg() for tensor in tensors]
    shape = tensors[0].shape
    if all(tensor.is_contiguous() for tensor in tensors):
        matrix = (1, shape.numel())
    else:
        columns = shape[-1] if shape else 1
        matrix = (math.prod(shape[:-1]), columns)
    return *matrix, [tensor.reshape(matrix) for tensor in tensors]
