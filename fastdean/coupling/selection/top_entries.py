"""The top entries of each matrix, and how many a ratio makes."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import ROUND_UP, Context, Decimal

import torch
from torch import Tensor

from fastdean.coupling.results.scores import Scores
from fastdean.ops.reference import importance
from fastdean.ops.selection import select_top


def top_entries(scores: Scores, ratio: float, min_k: int, scope: str) -> dict[str, Tensor]:
    """Name of a matrix -> its top entries, int64 ascending, on the device of its sums."""
    if scope == "model":
        return _top_of_model(scores, ratio, min_k)
    return {
        name: scores.select(name, count(entry.competing, ratio, min_k))
        for name, entry in scores.entries.items()
    }


def _top_of_model(scores: Scores, ratio: float, min_k: int) -> dict[str, Tensor]:
    """The top r of all matrices together; ties go to the earlier matrix, then the lower index."""
    if scores.is_sparse:
        raise ValueError(
            "scope='model' must have dense scores, got scores made with keep_top; the model's top "
            "entries may all lie in one matrix, so score without keep_top"
        )
    if min_k:
        raise ValueError(
            "min_k must be 0 with scope='model', where no matrix has a share of its own"
        )
    scores = scores.scoped("tensor")
    k = int(ratio * sum(entry.numel for entry in scores.entries.values()))
    # A matrix can hold no more of the top k than its own top k.
    candidates = {name: scores.select(name, min(k, e.numel)) for name, e in scores.entries.items()}
    values = [_importance_at(scores, name, index) for name, index in candidates.items()]
    everything = torch.cat([part.to(values[0].device) for part in values])
    taken = torch.zeros_like(everything, dtype=torch.bool)
    taken[select_top(everything, None, 1, k)] = True
    parts = taken.split([index.numel() for index in candidates.values()])
    return {
        name: index[part.to(index.device)]
        for (name, index), part in zip(candidates.items(), parts, strict=True)
    }


def _importance_at(scores: Scores, name: str, index: Tensor) -> Tensor:
    """Importance of some entries of a dense score, fp32 [M]."""
    entry = scores.entries[name]
    factor = entry.factor
    if factor is not None:
        factor = factor.flatten()[index.to(factor.device)]
    return importance(entry.sums.flatten()[index], factor, scores.num_examples)


def count(numel: int, ratio: float, min_k: int) -> int:
    """k, how many of a matrix's `numel` entries a top set takes."""
    return min(numel, max(int(ratio * numel), min_k))


def smallest_ratio(largest: int) -> float:
    """The smallest ratio of two significant digits that selects one of `largest` entries."""
    return float(Context(prec=2, rounding=ROUND_UP).divide(Decimal(1), Decimal(largest)))


def nothing_selected_error(
    ratio: float, largest: int, scope: str, *, of_experts: bool = False
) -> ValueError:
    """The error for a ratio that selects none of the `largest` entries compared at once.

    Args:
        of_experts: these are those of one of several experts in a matrix.
    """
    in_one = "the largest expert" if of_experts else "the largest matrix"
    where, otherwise = (in_one, ", or set min_k=1") if scope == "matrix" else ("all matrices", "")
    return ValueError(
        f"ratio must select at least one entry, got {ratio:g}, which selects none of the "
        f"{largest:,} of {where}; the smallest that would is {smallest_ratio(largest):g}{otherwise}"
    )


def three_ratios(ratio: float | Sequence[float]) -> tuple[float, float, float]:
    ratios = tuple(ratio) if isinstance(ratio, list | tuple) else (ratio,) * 3
    if len(ratios) != 3 or not all(is_ratio(r) for r in ratios):
        raise ValueError(
            "ratio must be one number above 0 and at most 1, or three (first, second, general), "
            f"got {ratio!r}; give it as a number"
        )
    return ratios


def is_ratio(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
