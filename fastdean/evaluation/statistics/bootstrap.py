"""Percentile bootstrap over examples, for statistics that are no means of them.

Its intervals are too narrow: even for means of normal values a 95 % interval held the true one in
79 % of simulated samples of 4, 89 % of 8 and 93 % of 16 to 64. So it has no test, and no verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdean.default_device import cpu_by_default
from fastdean.evaluation.statistics.intervals import BOOTSTRAP, Interval, check_confidence
from fastdean.wording.numbers import require_seed, require_whole

# Indices drawn at a time; bounds memory (8 bytes each) and leaves the draws as they are.
_DRAWS_PER_CHUNK = 4_000_000


@cpu_by_default
def bootstrap_interval(
    statistic: Callable[[Tensor], Tensor],
    n: int,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    no_effect: float | None = 0.0,
    strata: Sequence[int] | None = None,
) -> Interval:
    """Percentile bootstrap interval of any statistic of n examples (Efron & Tibshirani 1993).

    Args:
        statistic: from example indices, int64 [k, n], to values, float64 [k]; row by row. One
            row with every index once gives the estimate itself.
        n: number of examples. For n = 0 the estimate is NaN and `statistic` is not called.
        confidence: in (0, 1).
        resamples: number of bootstrap samples, at least 1.
        seed: the same seed gives the same interval.
        no_effect: the value of the statistic that means "nothing changed"; None: there is none.
        strata: sizes of groups of consecutive examples, n in sum. Each is resampled within itself,
            so that the first size of a row's indices are always examples of the first group.

    Raises:
        ValueError: options out of range, or an estimate that is NaN or infinite.
    """
    strata = [n] if strata is None else list(strata)
    if any(size < 0 for size in strata) or sum(strata) != n:
        raise ValueError(
            f"strata must be sizes that sum to n = {n}, got {strata}; give the size of every group"
        )
    check_confidence(confidence)
    require_seed(seed)
    require_whole("resamples", resamples)
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}; 10000 is the default")
    estimate = float(statistic(torch.arange(n)[None])[0]) if n else math.nan
    if n and not math.isfinite(estimate):
        raise ValueError(
            f"statistic must be finite over all examples, got {estimate}; look for NaN or infinity "
            "in what the model gave for them"
        )
    drawn = np.empty(0) if n < 2 else _resampled(statistic, strata, resamples, seed).numpy()
    return bootstrapped(estimate, drawn, n, confidence, resamples, no_effect)


def bootstrapped(
    estimate: float,
    drawn: np.ndarray,
    n: int,
    confidence: float,
    resamples: int,
    no_effect: float | None = 0.0,
) -> Interval:
    """The interval of an estimate with its resampled values, none where n < 2.

    Values between which there is no width, as where no example changed, say nothing of how far
    chance moves the estimate: low and high are NaN then.
    """
    low, high = math.nan, math.nan
    if drawn.size:
        tail = (1.0 - confidence) / 2.0
        low, high = map(float, np.quantile(drawn, [tail, 1.0 - tail]))
        if low == high:
            low, high = math.nan, math.nan
    made_of: dict[str, Any] = {"resamples": resamples, "replicates": drawn}
    return Interval(estimate, low, high, n, confidence, BOOTSTRAP, no_effect, **made_of)


def _resampled(
    statistic: Callable[[Tensor], Tensor], strata: Sequence[int], resamples: int, seed: int
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = [size for size in strata if size]
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    rows_per_chunk = max(1, _DRAWS_PER_CHUNK // sum(sizes))
    chunks = []
    for start in range(0, resamples, rows_per_chunk):
        rows = min(rows_per_chunk, resamples - start)
        draws = [
            first + torch.randint(size, (rows, size), generator=generator)
            for first, size in zip(firsts, sizes, strict=True)
        ]
        chunks.append(statistic(torch.cat(draws, dim=1)))
    return torch.cat(chunks)
