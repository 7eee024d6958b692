"""Importance accumulation: the sum over examples of per-example absolute gradients.

Two ops, both without any [B, R, C] temporary and without a gradient kept per example: the loop over
examples lies inside the op.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdean.ops._dispatch import choose

_INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def accumulate_importance_(
    acc: Tensor, x: Tensor, g: Tensor, segments: Tensor, *, impl: str | None = None
) -> Tensor:
    """Add every example's absolute weight gradient to `acc`, in place.

    Equivalent to:
        for start, end in segments.tolist():
            acc += (g[start:end].T.float() @ x[start:end].float()).abs()

    The product of an example is never rounded below fp32 before the absolute value. For a weight
    stored [C, R] (Conv1D) exchange `x` and `g`.

    Args:
        acc: fp32 [R, C], any strides; on the device of `x`.
        x: [N, C] inputs of the layer; fp32, bf16, fp16 or fp64, any strides.
        g: [N, R] gradients of the loss with respect to its outputs; dtype of `x`.
        segments: int64 [B, 2] on the CPU, rows (start, end) of each example, 0 <= start <= end <=
            N. Rows in no segment (padding) count for nothing; B = 0 leaves `acc` as it is.
        impl: None (by device), "reference", "triton" or "native".
    Returns:
        `acc`.
    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit together.
    Source:
        DEAN (arXiv 2410.16672), importance E_s |W_ij * dL(s)/dW_ij|; |W_ij| is multiplied once,
        later.
    """
    _check_inputs(x, g, segments)
    _check_accumulator(acc, (g.shape[1], x.shape[1]), x.device)
    choose("accumulate_importance_", x.device, impl).callable(acc, x, g, segments)
    return acc


def accumulate_unit_importance_(
    acc: Tensor, a: Tensor, g: Tensor, segments: Tensor, *, impl: str | None = None
) -> Tensor:
    """Add every example's absolute activation x gradient sum to `acc`, in place.

    Equivalent to:
        for start, end in segments.tolist():
            acc += (a[start:end].float() * g[start:end].float()).sum(0).abs()

    Args:
        acc: fp32 [C]; on the device of `a`.
        a: [N, C] activations of the C units; fp32, bf16, fp16 or fp64, any strides.
        g: [N, C] gradients of the loss with respect to `a`; dtype of `a`.
        segments, impl: as for `accumulate_importance_`.
    Returns:
        `acc`.
    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit together.
    """
    _check_inputs(a, g, segments)
    if a.shape[1] != g.shape[1]:
        raise ValueError(
            f"g must have as many columns as a ({a.shape[1]}), got {g.shape[1]}; "
            "pass the gradient with respect to a itself"
        )
    _check_accumulator(acc, (a.shape[1],), a.device)
    choose("accumulate_unit_importance_", a.device, impl).callable(acc, a, g, segments)
    return acc


def _check_inputs(x: Tensor, g: Tensor, segments: Tensor) -> None:
    if x.dim() != 2 or g.dim() != 2 or x.shape[0] != g.shape[0]:
        raise ValueError(
            "inputs and gradients must be [N, C] and [N, R] with the same N, "
            f"got {list(x.shape)} and {list(g.shape)}; flatten batch and time first"
        )
    if x.dtype not in _INPUT_DTYPES or g.dtype != x.dtype:
        raise TypeError(
            f"inputs and gradients must share one floating dtype, got {x.dtype} and {g.dtype}; "
            "cast one to the other"
        )
    if g.device != x.device:
        raise ValueError(
            f"g must be on the device of the inputs, {x.device}, got {g.device}; move it there"
        )
    if not isinstance(segments, Tensor):
        raise TypeError(
            "segments must be a tensor, int64 [B, 2] on the CPU, "
            f"got {type(segments).__name__}; make it with torch.tensor"
        )
    if (
        segments.dim() != 2
        or segments.shape[1] != 2
        or segments.dtype != torch.int64
        or segments.device.type != "cpu"
    ):
        raise ValueError(
            "segments must be int64 [B, 2] on the CPU, "
            f"got {segments.dtype} {list(segments.shape)} on {segments.device}; "
            "give (start, end) of each example"
        )
    if segments.numel():
        starts, ends = segments.unbind(1)
        if starts.min() < 0 or ends.max() > x.shape[0] or (starts > ends).any():
            raise ValueError(
                f"segments must satisfy 0 <= start <= end <= {x.shape[0]}, got rows from "
                f"{int(starts.min())} to {int(ends.max())}; check the batch's layout"
            )


def _check_accumulator(acc: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if tuple(acc.shape) != shape or acc.dtype != torch.float32 or acc.device != device:
        raise ValueError(
            f"acc must be torch.float32 {list(shape)} on {device}, "
            f"got {acc.dtype} {list(acc.shape)} on {acc.device}; make it with torch.zeros"
        )
