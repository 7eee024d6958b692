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
    batches: Tensor | None = None,
    impl: str | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """The most important entries of one weight to each of several sets of examples.

    Equivalent to:

        for number, each in enumerate(k):
            mine = segments[sets == number]
            sums = torch.zeros(weight.shape)
            accumulate_importance_(sums, x, g, mine)  # with `batches` a call for each of them
            index = select_top(sums, weight, max(1, len(mine)), each)
            yield index, sums.flatten()[index]

    and with "native" the same bits as with these two; but sums exist for a few rows at a time.
    For a weight stored [C, R] (Conv1D) exchange `x` and `g`.

    Args:
        x, g, segments: see `accumulate_importance_`; every example, of whatever set.
        sets: int64 [B] on the CPU, ascending, 0..S-1: the set of each example.
        weight: floating [R, C]; on the device of `x`.
        k: how many entries at most of each of the S sets. A set may have no example.
        batches: int64 [B] on the CPU, ascending in each set: the batch of each example. How an
            implementation rounds may depend on which examples it is given at once; with them the
            sums are those of one call after the other. None: each set is one batch.
        impl: None (by device), "reference" or "native" (CPU).
    Returns:
        For each set (index int64 [M], ascending flat indices; sums fp32 [M], there), on the device
        of `x`; M <= k, because only entries of positive importance can be selected.
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
    if batches is not None:
        _check_batches(batches, sets)
    op = choose("select_importance", x.device, impl, x.dtype)
    return op.callable(x, g, segments, sets, weight, k, batches)


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


def _check_batches(batches: Tensor, sets: Tensor) -> None:
    check_tensor("batches", batches)
    on_cpu = batches.device.type == "cpu"
    if batches.dtype != torch.int64 or batches.shape != sets.shape or not on_cpu:
        raise ValueError(
            f"batches must be int64 [{len(sets)}] on the CPU, one per segment, got {batches.dtype} "
            f"{list(batches.shape)} on {batches.device}; give the number of each example's batch"
        )
    check_memory("batches", batches)
    if bool(((batches.diff() < 0) & (sets.diff() == 0)).any()):
        raise ValueError(
            "batches must be in ascending order within a set, got a lower one after a higher; give "
            "the examples in the order in which they were scored"
        )


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
