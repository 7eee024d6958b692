"""Exact selection of the most important entries."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from fastdean.ops._dispatch import choose
from fastdean.ops.memory import check_memory, check_surroundings, check_tensor
from fastdean.wording.mendable import InputTypeError


def select_top(
    sums: Tensor, weight: Tensor | None, num_examples: int, k: int, *, impl: str | None = None
) -> Tensor:
    """Flat indices of the k entries of highest importance, ascending.

    Equivalent to, for finite input:

        value = reference.importance(sums, weight, num_examples).flatten()
        order = value.argsort(descending=True, stable=True)
        (order[value[order] > 0][:k]).sort().values

    Only entries with positive importance can be selected, so fewer than k indices may come back.
    Ties go to the lowest flat index.

    Args:
        sums, weight, num_examples: see `reference.importance`.
        k: how many at most; 0 gives an empty result.
        impl: None (by device), "reference", "triton" or "native" (CPU).
    Returns:
        int64 [min(k, positive entries)] on the device of `sums`.
    Raises:
        ValueError: an importance is NaN or infinite, k is negative, or the shapes differ.
    """
    _check_matrix(sums, weight)
    k, num_examples = integer("k", k), integer("num_examples", num_examples)
    if k < 0 or num_examples < 1:
        raise ValueError(
            f"k must be at least 0 and num_examples at least 1, got {k} and {num_examples}; "
            "check the ratio and the number of examples"
        )
    dtype = sums.dtype if weight is None else weight.dtype
    return choose("select_top", sums.device, impl, dtype).callable(sums, weight, num_examples, k)


def _check_matrix(sums: Tensor, weight: Tensor | None) -> None:
    check_surroundings()
    given = {"sums": sums} if weight is None else {"sums": sums, "weight": weight}
    for name, tensor in given.items():
        check_tensor(name, tensor)
        check_memory(name, tensor)
    if sums.dtype != torch.float32:
        raise InputTypeError(f"sums must be torch.float32, got {sums.dtype}; accumulate in fp32")
    if weight is not None and not weight.is_floating_point():
        raise InputTypeError(
            f"weight must be floating point, got {weight.dtype}; pass the weight that was scored"
        )
    if weight is not None and weight.shape != sums.shape:
        raise ValueError(
            f"weight must have the shape of sums, {list(sums.shape)}, got {list(weight.shape)}; "
            "pass the weight that was scored"
        )


def integer(name: str, value: Any) -> int:
    """Takes NumPy's integers too, but no tensor, which would reach a kernel as a pointer."""
    if isinstance(value, bool | Tensor) or not hasattr(type(value), "__index__"):
        raise InputTypeError(f"{name} must be an integer, got {type(value).__name__}; use int()")
    return operator.index(value)
