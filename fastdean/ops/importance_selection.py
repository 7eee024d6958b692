"""Accumulation and selection of importance in one operation, without sums of the weight's size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdean.ops._dispatch import choose
from fastdean.ops.importance import check_pair, check_segments
from fastdean.ops.memory import check_memory, check_tensor
from fastdean.ops.selection import integer
from fastdean.wording.mendable import InputTypeError


def select_importance(
    x: Tensor,
    g: Tensor,
    segments: Tensor,
    sets: Tensor,
    weight: Tensor,
    k: Sequence[int],
    *,
    signed: bool = False,
    impl: str | None = None,
) -> list[tuple[Tensor, ...]]:
    """The most important entries of one weight to each of several sets of examples.

    Equivalent to:

        for number, each in enumerate(k):
            mine = segments[sets == number]
            sums = torch.zeros(weight.shape)
            accumulate_importance_(sums, x, g, mine)
            index = select_top(sums, weight, max(1, len(mine)), each)
            gradients = (g[start:end].T.float() @ x[start:end].float() for start, end in mine)
            yield index, sums.flatten()[index], sum(gradients).flatten()[index]

    the last only if `signed`. With "native" the first two have the bits that these two operations
    give; but sums exist for a few rows at a time. For a weight stored [C, R] (Conv1D) exchange `x`
    and `g`.

    Args:
        x, g, segments: see `accumulate_importance_`; every example, of whatever set.
        sets: int64 [B] on the CPU, ascending, 0..S-1: the set of each example.
        weight: floating [R, C]; on the device of `x`.
        k: how many entries at most of each of the S sets. A set may have no example.
        signed: whether the sums of the gradients themselves are wanted, beside those of their
            absolute values.
        impl: None (by device), "reference" or "native" (CPU).
    Returns:
        For each set (index int64 [M], ascending flat indices; sums fp32 [M], there; if `signed`
        also signed sums fp32 [M], there), on the device of `x`; M <= k, because only entries of
        positive importance can be selected.
    Raises:
        ValueError: an importance is NaN or infinite, k is negative, or shapes or devices do not fit
            together.
        TypeError: a dtype does not fit, or k holds something else than integers.
    Source:
        DEAN (arXiv 2410.16672), importance score.
    """
    check_pair(x, g)
    check_segments(segments, x)
    _check_weight(weight, x, g)
    k = [integer("each k", each) for each in _sequence(k)]
    if min(k, default=0) < 0:
        raise ValueError(f"each k must be at least 0, got {min(k)}; check the ratios")
    _check_sets(sets, len(segments), len(k))
    op = choose("select_importance", x.device, impl, x.dtype)
    return op.callable(x, g, segments, sets, weight, k, signed=signed)


def _sequence(k: Any) -> Sequence[Any]:
    if isinstance(k, Tensor) or not isinstance(k, Sequence):
        raise InputTypeError(
            f"k must be a list with a number for each set, got {type(k).__name__}; use [k]"
        )
    return k


def _check_weight(weight: Tensor, x: Tensor, g: Tensor) -> None:
    check_tensor("weight", weight)
    if not weight.is_floating_point():
        raise InputTypeError(
            f"weight must be floating point, got {weight.dtype}; pass the weight that was scored"
        )
    shape = [g.shape[1], x.shape[1]]
    if list(weight.shape) != shape or weight.device != x.device:
        raise ValueError(
            f"weight must be {shape} on {x.device}, got {list(weight.shape)} on {weight.device}; "
            "pass the weight that the inputs were multiplied with"
        )
    check_memory("weight", weight)


def _check_sets(sets: Tensor, examples: int, number: int) -> None:
    check_tensor("sets", sets)
    if sets.dtype != torch.int64 or tuple(sets.shape) != (examples,) or sets.device.type != "cpu":
        raise ValueError(
            f"sets must be int64 [{examples}] on the CPU, one per segment, got {sets.dtype} "
            f"{list(sets.shape)} on {sets.device}; give the number of each example's set"
        )
    check_memory("sets", sets)
    if not examples:
        return
    if bool((sets.diff() < 0).any()):
        raise ValueError(
            "sets must be in ascending order, got a lower one after a higher; sort the examples by "
            "set first"
        )
    if int(sets[0]) < 0 or int(sets[-1]) >= number:
        raise ValueError(
            f"sets must lie in 0..{number - 1}, got {int(sets[0])} to {int(sets[-1])}; k has "
            f"{number} sets"
        )
