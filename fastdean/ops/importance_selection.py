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
    signed: bool = False,
    impl: str | None = None,
) -> list[tuple[Tensor, ...]]:
    """The most important entries of one weight to each of several sets of examples.

    Equivalent to:

        for number, each in enumerate(k):
            mine = segments[sets == number]
            sums = torch.zeros(weight.shape)
            accumulate_importance_(sums, x, g, mine)  # with `batches` a call for each of them
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
        batches: int64 [B] on the CPU, ascending in each set: the batch of each example. How an
            implementation rounds may depend on which examples it is given at once; with them
            "native" and "reference" have the bits of one call after the other, while "triton" adds
            the examples of a set one by one all the same. None: each set is one batch.
        signed: whether the sums of the gradients themselves are wanted, beside those of their
            absolute values.
        impl: None (by device), "reference", "triton" or "native" (CPU).
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
    _check_weight(weight, [g.shape[1], x.shape[1]], x)
    k = _numbers("k", k, least=0, advice="check the ratios")
    _check_numbers("sets", sets, segments, len(k), f"k has {len(k)} sets")
    _check_ascending(sets)
    _check_batches(batches, segments, sets, "a set")
    op = choose("select_importance", x.device, impl, x.dtype)
    return op.callable(x, g, segments, sets, weight, k, batches=batches, signed=bool(signed))


def select_expert_importance(
    x: Tensor,
    g: Tensor,
    segments: Tensor,
    experts: Tensor,
    sets: Tensor,
    weight: Tensor,
    k: Sequence[int],
    num_examples: Sequence[int],
    *,
    x_rows: Tensor | None = None,
    g_rows: Tensor | None = None,
    batches: Tensor | None = None,
    signed: bool = False,
    impl: str | None = None,
) -> list[tuple[Tensor, ...]]:
    """The most important entries of each expert of a stacked weight to each of several sets.

    Equivalent to, with X = x[x_rows] and G = g[g_rows] (or x and g themselves):

        for number, each in enumerate(k):
            for expert in range(len(weight)):
                mine = segments[(sets == number) & (experts == expert)]
                sums = torch.zeros(weight.shape[1:])
                accumulate_importance_(sums, X, G, mine)  # with `batches` a call for each of them
                index = select_top(sums, weight[expert], num_examples[number], each)
                gradients = (G[start:end].T.float() @ X[start:end].float() for start, end in mine)
                signed_sums = sum(gradients).flatten()[index]
                yield index + expert * R * C, sums.flatten()[index], signed_sums

    joined expert after expert, the last only if `signed`; with "native" the first two have the same
    bits. X and G need not exist: the hidden state of a token that goes to 8 experts is held once.
    For weights stored [E, C, R] exchange x and g, with their rows.

    Args:
        x: [.., C] inputs of the experts; fp32, bf16, fp16 or fp64, any strides.
        g: [.., R] gradients of the loss with respect to their outputs (routing weight included);
            dtype of `x`.
        segments: int64 [S, 2] on the CPU, tokens (start, end) of one example at one expert, 0 <=
            start <= end <= N, in any order.
        experts: int64 [S] on the CPU, 0..E-1: the expert of each segment.
        sets: int64 [S] on the CPU: the number of its set.
        weight: floating [E, R, C]; on the device of `x`.
        k: for each set, how many entries at most of each expert.
        num_examples: for each set, the number of its examples, wherever their tokens went; at least
            1.
        x_rows, g_rows: int64 [N], the row of `x` and of `g` of each of the N tokens, on the device
            of `x`; None: a token is its row.
        batches: int64 [S] on the CPU, ascending in each set at each expert: the batch of each
            segment, as for `select_importance`.
        signed: as for `select_importance`.
        impl: None (by device), "reference" or "native" (CPU).
    Returns:
        As `select_importance`, by ascending flat indices of the stacked weight.
    Raises:
        ValueError: an importance is NaN or infinite, k is negative, or shapes, devices or numbers
            do not fit together.
        TypeError: a dtype does not fit, or k or num_examples hold something else than integers.
    Source:
        DEAN (arXiv 2410.16672), importance score.
    """
    gathered = {"x_rows": (x_rows, x), "g_rows": (g_rows, g)}
    check_pair(x, g, gathered=x_rows is not None or g_rows is not None)
    tokens = [_tokens(name, rows, of) for name, (rows, of) in gathered.items()]
    if tokens[0] != tokens[1]:
        raise ValueError(
            f"x and g must have as many tokens, got {tokens[0]} and {tokens[1]}; give x_rows and "
            "g_rows a number for each token"
        )
    check_segments(segments, x, tokens=tokens[0])
    check_tensor("weight", weight)
    if weight.dim() != 3:
        raise ValueError(
            f"weight must be [E, R, C], got {list(weight.shape)}; stack the experts' weights"
        )
    _check_weight(weight, [len(weight), g.shape[1], x.shape[1]], x)
    k = _numbers("k", k, least=0, advice="check the ratios")
    num_examples = _numbers("num_examples", num_examples, least=1, advice="count each set's")
    if len(num_examples) != len(k):
        raise ValueError(
            f"num_examples must have a number for each of {len(k)} sets, got {len(num_examples)}; "
            "k has one for each"
        )
    _check_numbers("sets", sets, segments, len(k), f"k has {len(k)} sets")
    _check_numbers("experts", experts, segments, len(weight), f"weight has {len(weight)} experts")
    _check_batches(batches, segments, experts * len(k) + sets, "a set at an expert")
    op = choose("select_expert_importance", x.device, impl, x.dtype)
    return op.callable(
        *(x, g, segments, experts, sets, weight, k, num_examples),
        x_rows=x_rows,
        g_rows=g_rows,
        batches=batches,
        signed=bool(signed),
    )


def _tokens(name: str, rows: Tensor | None, of: Tensor) -> int:
    """How many tokens an input stands for, once `rows` are rows of it."""
    if rows is None:
        return len(of)
    check_tensor(name, rows)
    if rows.dtype != torch.int64 or rows.dim() != 1 or rows.device != of.device:
        raise ValueError(
            f"{name} must be int64 [N] on {of.device}, got {rows.dtype} {list(rows.shape)} on "
            f"{rows.device}; give each token its row"
        )
    check_memory(name, rows)
    if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= len(of)):
        raise ValueError(
            f"{name} must lie in 0..{len(of) - 1}, got {int(rows.min())} to {int(rows.max())}; "
            f"{name[0]} has {len(of)} rows"
        )
    return len(rows)


def _numbers(name: str, given: Any, *, least: int, advice: str) -> list[int]:
    found = [integer(f"each {name}", each) for each in _sequence(name, given)]
    if min(found, default=least) < least:
        raise ValueError(f"each {name} must be at least {least}, got {min(found)}; {advice}")
    return found


def _sequence(name: str, given: Any) -> Sequence[Any]:
    if isinstance(given, Tensor) or not isinstance(given, Sequence):
        raise InputTypeError(
            f"{name} must be a list with a number for each set, got {type(given).__name__}; use "
            f"[{name}]"
        )
    return given


def _check_weight(weight: Tensor, shape: list[int], x: Tensor) -> None:
    check_tensor("weight", weight)
    if not weight.is_floating_point():
        raise InputTypeError(
            f"weight must be floating point, got {weight.dtype}; pass the weight that was scored"
        )
    if list(weight.shape) != shape or weight.device != x.device:
        raise ValueError(
            f"weight must be {shape} on {x.device}, got {list(weight.shape)} on {weight.device}; "
            "pass the weight that the inputs were multiplied with"
        )
    check_memory("weight", weight)


def _check_numbers(name: str, numbers: Tensor, segments: Tensor, count: int, why: str) -> None:
    """A number below `count` for each segment: of its set, or of its expert."""
    _check_one_each(name, numbers, segments, name[:-1])
    if not len(segments):
        return
    least, most = int(numbers.min()), int(numbers.max())
    if least < 0 or most >= count:
        raise ValueError(f"{name} must lie in 0..{count - 1}, got {least} to {most}; {why}")


def _check_batches(
    batches: Tensor | None, segments: Tensor, groups: Tensor, described: str
) -> None:
    """Ascending among the segments that have one number in `groups`, int64 [S]."""
    if batches is None:
        return
    _check_one_each("batches", batches, segments, "batch")
    order = groups.argsort(stable=True)
    batches, groups = batches[order], groups[order]
    if bool(((batches[1:] < batches[:-1]) & (groups[1:] == groups[:-1])).any()):
        raise ValueError(
            f"batches must be in ascending order within {described}, got a lower one after a "
            "higher; give the examples in the order in which they were scored"
        )


def _check_one_each(name: str, numbers: Tensor, segments: Tensor, what: str) -> None:
    check_tensor(name, numbers)
    shape = (len(segments),)
    is_on_cpu = numbers.device.type == "cpu"
    if numbers.dtype != torch.int64 or tuple(numbers.shape) != shape or not is_on_cpu:
        raise ValueError(
            f"{name} must be int64 [{len(segments)}] on the CPU, one per segment, got "
            f"{numbers.dtype} {list(numbers.shape)} on {numbers.device}; give the number of each "
            f"example's {what}"
        )
    check_memory(name, numbers)


def _check_ascending(sets: Tensor) -> None:
    if bool((sets.diff() < 0).any()):
        raise ValueError(
            "sets must be in ascending order, got a lower one after a higher; sort the examples by "
            "set first"
        )
