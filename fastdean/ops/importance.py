"""Importance accumulation: the sum over examples of per-example absolute gradients.

Three ops (a weight, the stacked weights of experts, units). The loop over examples is inside the
op, so no [B, R, C] tensor and no gradient per example is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdean.ops._dispatch import choose
from fastdean.ops.memory import (
    check_apart,
    check_memory,
    check_surroundings,
    check_tensor,
    check_written,
)
from fastdean.ops.writes import note_writes
from fastdean.wording.mendable import InputTypeError

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
        impl: None (by device), "reference", "triton" or "native" (CPU).
    Returns:
        `acc`.
    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit together.
    Source:
        DEAN (arXiv 2410.16672), importance E_s |W_ij * dL(s)/dW_ij|; |W_ij| is multiplied once,
        later.
    """
    check_pair(x, g)
    check_segments(segments, x)
    _check_accumulator(acc, (g.shape[1], x.shape[1]), x, g, segments)
    choose("accumulate_importance_", x.device, impl, x.dtype).callable(acc, x, g, segments)
    note_writes([acc])
    return acc


def accumulate_expert_importance_(
    acc: Tensor,
    x: Tensor,
    g: Tensor,
    segments: Tensor,
    experts: Tensor,
    *,
    impl: str | None = None,
) -> Tensor:
    """Add every example's absolute weight gradient, expert by expert, to `acc`, in place.

    For stacked expert weights [E, R, C], once the tokens that were routed to an expert are sorted
    by expert and, within it, by example. Equivalent to:

        for (start, end), expert in zip(segments.tolist(), experts.tolist()):
            acc[expert] += (g[start:end].T.float() @ x[start:end].float()).abs()

    Args:
        acc: fp32 [E, R, C], any strides; on the device of `x`.
        x: [N, C] inputs of the experts; fp32, bf16, fp16 or fp64, any strides.
        g: [N, R] gradients of the loss with respect to their outputs (routing weight included);
            dtype of `x`.
        segments: int64 [S, 2], rows (start, end) of one example's tokens at one expert, 0 <= start
            <= end <= N; on the CPU or on the device of `x`. There they are not checked, so that
            nothing waits for the device, and must not overlap.
        experts: int64 [S], ascending, 0..E-1, the expert of each segment; where `segments` are.
        impl: None (by device), "reference", "triton" or "native" (CPU).
    Returns:
        `acc`.
    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit together, or CPU segments reach
            outside the inputs.
    """
    check_pair(x, g)
    check_tensor("acc", acc)
    if acc.dim() != 3:
        raise ValueError(f"acc must be [E, R, C], got {list(acc.shape)}; stack the experts")
    check_segments(segments, x, on_device=True)
    _check_experts(experts, segments, acc.shape[0])
    shape = (acc.shape[0], g.shape[1], x.shape[1])
    _check_accumulator(acc, shape, x, g, segments, experts)
    op = choose("accumulate_expert_importance_", x.device, impl, x.dtype)
    op.callable(acc, x, g, segments, experts)
    note_writes([acc])
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
    check_pair(a, g)
    check_segments(segments, a)
    if a.shape[1] != g.shape[1]:
        raise ValueError(
            f"g must have as many columns as a ({a.shape[1]}), got {g.shape[1]}; "
            "pass the gradient with respect to a itself"
        )
    _check_accumulator(acc, (a.shape[1],), a, g, segments)
    op = choose("accumulate_unit_importance_", a.device, impl, a.dtype)
    op.callable(acc, a, g, segments)
    note_writes([acc])
    return acc


def check_pair(x: Tensor, g: Tensor, *, gathered: bool = False) -> None:
    """`gathered`: tokens choose their rows, so that the numbers of rows may differ."""
    check_surroundings()
    for name, tensor in (("the inputs", x), ("g", g)):
        check_tensor(name, tensor)
    matrices = x.dim() == 2 and g.dim() == 2
    if not matrices or (x.shape[0] != g.shape[0] and not gathered):
        raise ValueError(
            "inputs and gradients must be [N, C] and [N, R] with the same N, "
            f"got {list(x.shape)} and {list(g.shape)}; flatten batch and time first"
        )
    if x.dtype not in _INPUT_DTYPES or g.dtype != x.dtype:
        raise InputTypeError(
            f"inputs and gradients must share one floating dtype, got {x.dtype} and {g.dtype}; "
            "cast one to the other"
        )
    if g.device != x.device:
        raise ValueError(
            f"g must be on the device of the inputs, {x.device}, got {g.device}; move it there"
        )
    check_memory("the inputs", x)
    check_memory("g", g)


def check_segments(
    segments: Tensor, x: Tensor, *, tokens: int | None = None, on_device: bool = False
) -> None:
    """`tokens`: how many there are; None: as many as `x` has rows. `on_device`: they may lie on the
    inputs' device."""
    tokens = x.shape[0] if tokens is None else tokens
    where = "the CPU or the inputs' device" if on_device else "the CPU"
    if not isinstance(segments, Tensor):
        raise InputTypeError(
            f"segments must be a tensor, int64 [B, 2] on {where}, "
            f"got {type(segments).__name__}; make it with torch.tensor"
        )
    if (
        segments.dim() != 2
        or segments.shape[1] != 2
        or segments.dtype != torch.int64
        or segments.device.type not in ("cpu", x.device.type if on_device else "cpu")
    ):
        raise ValueError(
            f"segments must be int64 [B, 2] on {where}, "
            f"got {segments.dtype} {list(segments.shape)} on {segments.device}; "
            "give (start, end) of each example"
        )
    check_memory("segments", segments)
    if segments.numel() and segments.device.type == "cpu":
        starts, ends = segments.unbind(1)
        if starts.min() < 0 or ends.max() > tokens or (starts > ends).any():
            raise ValueError(
                f"segments must satisfy 0 <= start <= end <= {tokens}, got rows from "
                f"{int(starts.min())} to {int(ends.max())}; check the batch's layout"
            )


def _check_experts(experts: Tensor, segments: Tensor, number: int) -> None:
    if not isinstance(experts, Tensor):
        raise InputTypeError(
            "experts must be a tensor, int64 [S] beside segments, "
            f"got {type(experts).__name__}; make it with torch.tensor"
        )
    if (
        experts.dtype != torch.int64
        or tuple(experts.shape) != (len(segments),)
        or experts.device != segments.device
    ):
        raise ValueError(
            f"experts must be int64 [{len(segments)}] on {segments.device}, one per segment, "
            f"got {experts.dtype} {list(experts.shape)} on {experts.device}; sort tokens by expert"
        )
    check_memory("experts", experts)
    if experts.numel() and experts.device.type == "cpu":
        if bool((experts.diff() < 0).any()):
            raise ValueError(
                "experts must be in ascending order, got a lower one after a higher; "
                "sort the tokens by expert first"
            )
        if int(experts[0]) < 0 or int(experts[-1]) >= number:
            raise ValueError(
                f"experts must lie in 0..{number - 1}, got {int(experts[0])} to "
                f"{int(experts[-1])}; acc has {number} experts"
            )


def _check_accumulator(
    acc: Tensor,
    shape: tuple[int, ...],
    x: Tensor,
    g: Tensor,
    segments: Tensor,
    experts: Tensor | None = None,
) -> None:
    check_tensor("acc", acc)
    if tuple(acc.shape) != shape or acc.dtype != torch.float32 or acc.device != x.device:
        raise ValueError(
            f"acc must be torch.float32 {list(shape)} on {x.device}, "
            f"got {acc.dtype} {list(acc.shape)} on {acc.device}; make it with torch.zeros"
        )
    check_memory("acc", acc)
    check_written("acc", acc)
    read = {"the inputs": x, "g": g, "segments": segments, "experts": experts}
    check_apart("acc", acc, read)
