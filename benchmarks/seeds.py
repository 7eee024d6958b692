"""What a few seeds say about a mean: Student's t interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_CONFIDENCE = 0.95
_BISECTIONS = 60
_LARGEST_QUANTILE = 1e3


@dataclass(frozen=True)
class SeedMean:
    """Mean over n seeds; `low` and `high` are None for a single one."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> SeedMean:
        """mean -+ t(n - 1) * std / sqrt(n), 95 %; std unbiased. At least one value."""
        mean, n = statistics.fmean(values), len(values)
        if n < 2:
            return cls(mean, None, None, n)
        half = student_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n)
        return cls(mean, mean - half, mean + half, n)

    @property
    def holds_zero(self) -> bool:
        """Whether the interval does, ends included; False where there is none."""
        return self.low is not None and self.low <= 0 <= self.high


def student_quantile(freedom: int) -> float:
    """t with P(|T| < t) = 0.95 for `freedom` degrees of freedom, at least 1."""
    low, high = 0.0, _LARGEST_QUANTILE
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, freedom) < _CONFIDENCE else (low, middle)
    return (low + high) / 2


def _inside(t: float, freedom: int) -> float:
    """P(|T| < t), by the finite series in the angle atan(t / sqrt(freedom)).

    Source: Abramowitz and Stegun, Handbook of mathematical functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2 == 1
    total, term = 0.0, cosine if odd else 1.0
    for power in range(1 if odd else 0, freedom - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
