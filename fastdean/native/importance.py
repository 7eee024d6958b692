"""The accumulation of importance on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdean.native.autograd import increment_versions
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
    if acc.numel() == 0 or len(segments) == 0:
        return
    extension = loaded()
    segments = segments.contiguous()
    rows, columns = acc.shape
    params = written(
        "ImportanceParams",
        acc=acc.data_ptr(),
        acc_stride_r=acc.stride(0),
        acc_stride_c=acc.stride(1),
        x=x.data_ptr(),
        x_stride_t=x.stride(0),
        x_stride_c=x.stride(1),
        g=g.data_ptr(),
        g_stride_t=g.stride(0),
        g_stride_r=g.stride(1),
        dtype=dtype_code(x.dtype),
        rows=rows,
        columns=columns,
        tokens=x.shape[0],
        segments=segments.data_ptr(),
        num_segments=len(segments),
        level=cpu_level() if level is None else level,
        num_workers=torch.get_num_threads(),
    )
    address = params.buffer_info()[0]
    size = extension.accumulate_importance_workspace_bytes(params=address)
    workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
    params[-1] = workspace.data_ptr()
    extension.accumulate_importance_cpu(params=address)
    increment_versions([acc])
