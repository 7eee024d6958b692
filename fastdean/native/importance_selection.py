"""The fused accumulation and selection of importance on the CPU."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdean.native.extension import cpu_level, dtype_code, has_dtype, loaded
from fastdean.native.selection import not_finite_error
from fastdean.native.structs import written


def select_importance(
    x: Tensor,
    g: Tensor,
    segments: Tensor,
    sets: Tensor,
    weight: Tensor,
    k: Sequence[int],
    batches: Tensor | None = None,
    *,
    level: int | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """`ops.select_importance` in compiled code, for fp32, bf16 and fp16 on the CPU.

    The other arguments have passed its checks. Denormals as in `accumulate_importance_`.

    Args:
        level: number of an instruction set; None for `cpu_level()`.
    Raises: ValueError if an importance is NaN or infinite, or the processor lacks the level.
    """
    extension = loaded()
    rows, columns = weight.shape
    ks = [min(each, rows * columns) for each in k]
    indices = torch.empty(sum(ks), dtype=torch.int64, device="cpu")
    sums = torch.empty(sum(ks), dtype=torch.float32, device="cpu")
    counts = [0] * len(ks)
    if rows * columns and ks:
        found = torch.empty(len(ks), 3, dtype=torch.int64, device="cpu")
        x, g, weight = (each.detach().resolve_neg() for each in (x, g, weight))
        weight = weight if has_dtype(weight.dtype) else weight.float()
        weight = weight if columns == 1 or weight.stride(1) == 1 else weight.contiguous()
        segments = segments.contiguous()
        every = torch.arange(len(ks) + 1, device="cpu")
        starts = torch.searchsorted(sets.contiguous(), every).contiguous()
        of_sets = array("q", ks)
        batches = None if batches is None else batches.contiguous()
        params = written(
            "ImportanceSelectionParams",
            x=x.data_ptr(),
            x_stride_t=x.stride(0),
            x_stride_c=x.stride(1),
            g=g.data_ptr(),
            g_stride_t=g.stride(0),
            g_stride_r=g.stride(1),
            dtype=dtype_code(x.dtype),
            weight=weight.data_ptr(),
            weight_stride_r=weight.stride(0),
            weight_dtype=dtype_code(weight.dtype),
            rows=rows,
            columns=columns,
            tokens=x.shape[0],
            segments=segments.data_ptr(),
            set_starts=starts.data_ptr(),
            batches=0 if batches is None else batches.data_ptr(),
            ks=of_sets.buffer_info()[0],
            num_sets=len(ks),
            indices=indices.data_ptr(),
            sums=sums.data_ptr(),
            found=found.data_ptr(),
            level=cpu_level() if level is None else level,
            num_workers=torch.get_num_threads(),
        )
        address = params.buffer_info()[0]
        size = extension.select_importance_workspace_bytes(params=address)
        workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
        params[-1] = workspace.data_ptr()
        extension.select_importance_cpu(params=address)
        for number, (count, flaw, bits) in enumerate(found.tolist()):
            if flaw >= 0:
                raise not_finite_error(bits, flaw)
            counts[number] = count
    # Copies, which do not keep the memory of all k of all sets.
    return [
        (one[:count].clone(), other[:count].clone())
        for one, other, count in zip(indices.split(ks), sums.split(ks), counts, strict=True)
    ]
