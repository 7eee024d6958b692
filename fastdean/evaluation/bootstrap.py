"""Percentile bootstrap over examples: how far a figure moves when other examples had been drawn.

An interval covers the choice of examples and nothing else: not the choice of the data set they come
from, not the rounding of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

# Indices drawn at a time; bounds memory (8 bytes each) and leaves the draws as they are.
_DRAWS_PER_CHUNK = 4_000_000


@dataclass(frozen=True)
class Interval:
    """An estimate with its bootstrap interval.

    mean: the estimate over all n examples (a mean difference, or a ratio where said so).
    low, high: percentile bounds; NaN for n < 2, where nothing can be resampled.
    no_effect: the value that means "nothing changed": 0 for a difference, 1 for a ratio.
    replicates: the resampled values, in the order of the seed's draws; empty where nothing was
        resampled. Two intervals of the same n, resamples and seed drew the same examples.
    """

    mean: float
    low: float
    high: float
    n: int
    confidence: float
    resamples: int
    no_effect: float = 0.0
    replicates: Sequence[float] = field(default=(), repr=False, compare=False)

    def verdict(self) -> str:
        """Whether the interval, ends included, holds the value that means "nothing changed".

        Returns "no effect beyond noise", "higher", "lower", or "too few examples" for n < 2.
        """
        if self.n < 2:
            return "too few examples"
        if self.low > self.no_effect:
            return "higher"
        if self.high < self.no_effect:
            return "lower"
        return "no effect beyond noise"


def paired_bootstrap(
    differences: Tensor | np.ndarray | Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of the mean of paired differences (Efron & Tibshirani 1993).

    Args:
        differences: [n], after minus before for each example; n may be 0 or 1.
        confidence: in (0, 1).
        resamples: number of bootstrap samples, at least 1.
        seed: the same seed gives the same interval.

    Raises:
        ValueError: another shape, NaN or infinity, or options out of range.
    """
    values = torch.as_tensor(differences, dtype=torch.float64).detach().cpu()
    if values.ndim != 1:
        raise ValueError(
            f"differences must be of shape [n], got {list(values.shape)}; give one difference for "
            "each example"
        )
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).nonzero()[0])
        raise ValueError(
            f"differences must be finite, got {float(values[bad])} at index {bad}; drop that "
            "example"
        )
    return bootstrap_interval(
        lambda index: values[index].mean(dim=-1),
        len(values),
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )


def bootstrap_interval(
    statistic: Callable[[Tensor], Tensor],
    n: int,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    no_effect: float = 0.0,
    strata: Sequence[int] | None = None,
) -> Interval:
    """Percentile bootstrap interval of any statistic of n examples.

    Args:
        statistic: from example indices, int64 [k, n], to values, float64 [k]; row by row. One
            row with every index once gives the estimate itself.
        n: number of examples. For n = 0 the estimate is NaN and `statistic` is not called.
        confidence, resamples, seed: as in `paired_bootstrap`.
        no_effect: the value of the statistic that means "nothing changed".
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
    if not 0.0 < confidence < 1.0:
        raise ValueError(
            f"confidence must be between 0 and 1, got {confidence}; 0.95 is the usual choice"
        )
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}; 10000 is the default")
    estimate = float(statistic(torch.arange(n)[None])[0]) if n else math.nan
    if n and not math.isfinite(estimate):
        raise ValueError(
            f"statistic must be finite over all examples, got {estimate}; look for NaN or infinity "
            "in what the model gave for them"
        )
    drawn = np.empty(0) if n < 2 else _resampled(statistic, strata, resamples, seed).numpy()
    low, high = _percentiles(drawn, confidence)
    return Interval(estimate, low, high, n, confidence, resamples, no_effect, drawn)


def change_between(
    before: Interval, after: Interval, *, of: Callable[[np.ndarray], np.ndarray] = np.asarray
) -> Interval:
    """Interval of `of(after) - of(before)`, two estimates on the same examples.

    Each resample compares what the two make of the same drawn examples, as for paired differences,
    and that for any statistic.

    Args:
        before, after: of `bootstrap_interval` with the same n, resamples, strata and seed.
        of: a function of the estimate, value by value, such as its distance to a neutral value.
    Raises:
        ValueError: the two differ in n, resamples or confidence, or have no replicates.
    """
    for name in ("n", "resamples", "confidence"):
        values = getattr(before, name), getattr(after, name)
        if values[0] != values[1]:
            raise ValueError(
                f"before and after must have the same {name}, got {values[0]} and {values[1]}; "
                "measure both on the same examples with the same options"
            )
    if before.n >= 2 and not (len(before.replicates) == len(after.replicates) == before.resamples):
        raise ValueError(
            f"before and after must carry their {before.resamples} replicates, got "
            f"{len(before.replicates)} and {len(after.replicates)}; take both from "
            "bootstrap_interval"
        )
    drawn = of(np.asarray(after.replicates)) - of(np.asarray(before.replicates))
    low, high = _percentiles(drawn, before.confidence)
    moved = of(np.asarray(after.mean)) - of(np.asarray(before.mean))
    return Interval(
        float(moved), low, high, before.n, before.confidence, before.resamples, replicates=drawn
    )


def _percentiles(drawn: np.ndarray, confidence: float) -> tuple[float, float]:
    """NaN where nothing was drawn."""
    if not drawn.size:
        return math.nan, math.nan
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(drawn, [tail, 1.0 - tail])
    return float(low), float(high)


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
