"""The accumulation of importance on the CPU."""

from __future__ import annotations

import torch

from fastdean.native.autograd import increment_versions
from fastdean.native.extension import cpu_level, dtype_code, loaded


def accumulate_importance_(
    acc: torch.Tensor,
    x: torch.Tensor,
    g: torch.Tensor,
    segments: torch.Tensor,
    *,
    level: int | None = None,
) -> None:
    """`ops.accumulate_importance_` in compiled code, for fp32, bf16 and fp16 on the CPU.

    The other arguments have passed the checks of `ops.accumulate_importance_`. The bf16
    instructions (AVX512-BF16, AMX-BF16) take denormals, below 1.2e-38, for 0: in the inputs, in
    products and in an example's sum.

    Args:
        level: number of an instruction set, up to `cpu_level()`, which None takes.
    Raises: ValueError if the processor lacks this instruction set.
    """
    if acc.numel() == 0 or len(segments) == 0:
        return
    extension = loaded()
    segments = segments.contiguous()
    # One `ImportanceParams` of csrc/fastdean.h, field by field; the workspace comes last.
    params = torch.tensor(
        [
            acc.data_ptr(),
            *acc.stride(),
            x.data_ptr(),
            *x.stride(),
            g.data_ptr(),
            *g.stride(),
            dtype_code(extension, x.dtype),
            *acc.shape,
            x.shape[0],
            segments.data_ptr(),
            len(segments),
            cpu_level() if level is None else level,
            torch.get_num_threads(),
            0,
        ],
        dtype=torch.int64,
        device="cpu",
    )
    size = extension.accumulate_importance_workspace_bytes(params=params.data_ptr())
    workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
    params[-1] = workspace.data_ptr()
    extension.accumulate_importance_cpu(params=params.data_ptr())
    increment_versions([acc])
