"""The accumulation of importance on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdean.native.extension import cpu_level, dtype_code, loaded
from fastdean.native.structs import written


def accumulate_importance_(
    acc: Tensor, x: Tensor, g: Tensor, segments: Tensor, *, level: int | None = None
) -> None:
    """`ops.accumulate_importance_` in compiled code, for fp32, bf16 and fp16 on the CPU.

    The other arguments have passed its checks. The bf16 instructions (AVX512-BF16, AMX-BF16) treat
    denormals, below 1.2e-38, as 0: in the inputs, in products and in an example's sum.

    Args:
        level: number of an instruction set; None for `cpu_level()`.
    Raises: ValueError if the processor lacks it.
    """
    starts = torch.tensor([0, len(segments)], dtype=torch.int64, device="cpu")
    _accumulate_(acc.unsqueeze(0), x, g, segments, starts, level)


def accumulate_expert_importance_(
    acc: Tensor,
    x: Tensor,
    g: Tensor,
    segments: Tensor,
    experts: Tensor,
    *,
    level: int | None = None,
) -> None:
    """`ops.accumulate_expert_importance_` in compiled code; otherwise as `accumulate_importance_`.

    An expert's sums have the bits that `accumulate_importance_` gives with its segments alone.
    """
    every = torch.arange(acc.shape[0] + 1, device="cpu")
    starts = torch.searchsorted(experts.contiguous(), every).contiguous()
    _accumulate_(acc, x, g, segments, starts, level)


def _accumulate_(
    acc: Tensor, x: Tensor, g: Tensor, segments: Tensor, starts: Tensor, level: int | None
) -> None:
    """`starts`: int64 [E + 1], each expert's first segment, and how many there are."""
    if acc.numel() == 0 or len(segments) == 0:
        return
    extension = loaded()
    segments = segments.contiguous()
    experts, rows, columns = acc.shape
    params = written(
        "ImportanceParams",
        acc=acc.data_ptr(),
        acc_stride_e=acc.stride(0),
        acc_stride_r=acc.stride(1),
        acc_stride_c=acc.stride(2),
        x=x.data_ptr(),
        x_stride_t=x.stride(0),
        x_stride_c=x.stride(1),
        g=g.data_ptr(),
        g_stride_t=g.stride(0),
        g_stride_r=g.stride(1),
        dtype=dtype_code(x.dtype),
        experts=experts,
        rows=rows,
        columns=columns,
        tokens=x.shape[0],
        segments=segments.data_ptr(),
        expert_starts=starts.data_ptr(),
        level=cpu_level() if level is None else level,
        num_workers=torch.get_num_threads(),
    )
    address = params.buffer_info()[0]
    size = extension.accumulate_importance_workspace_bytes(params=address)
    workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
    params[-1] = workspace.data_ptr()
    extension.accumulate_importance_cpu(params=address)
