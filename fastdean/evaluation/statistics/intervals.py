"""Intervals of means and shares, with their tests: Student's t, and Clopper and Pearson.

An interval covers the choice of examples and nothing else: not the choice of the data set, not the
rounding of the model. docs/methods.md has the rules and their simulated error rates.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdean.default_device import cpu_by_default
from fastdean.evaluation.statistics.sign_flips import EXACT, sign_flip_test
from fastdean.wording.mendable import InputTypeError
from fastdean.wording.numbers import require_real
from fastdean.wording.printable import error_line
from fastdean.wording.verdicts import judge

Values = Tensor | np.ndarray | Sequence[float]

STUDENT_T = "student-t"
STUDENT_T_OF_LOGS = "student-t of logs"
CLOPPER_PEARSON = "clopper-pearson"
WON_LESS_LOST = "clopper-pearson of won and lost"
BOOTSTRAP = "percentile bootstrap"


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval.

    mean: the estimate over all examples (a mean, a mean difference, or a ratio where said so).
    low, high: bounds; NaN for n < 2, and of a bootstrap without any spread.
    n: independent units: examples, or groups of examples that belong together.
    method: `STUDENT_T` and the like.
    no_effect: the value that means "nothing changed": 0 for a difference, 1 for a ratio; None where
        there is no such value.
    p_value, test: of the test that a verdict needs as well, and its name; None without a test.
    least_p: the smallest p-value that the test can give.
    values, weights: float64 [n]; the estimate is sum(values) / sum(weights). Of a bootstrap, where
        they are given, what decides the statistic of an example.
    whole: of a share, the value of an example that counts in full; None for other estimates.
    resamples, replicates: of a bootstrap.
    """

    mean: float
    low: float
    high: float
    n: int
    confidence: float
    method: str
    no_effect: float | None = 0.0
    p_value: float | None = None
    test: str | None = None
    least_p: float | None = None
    values: np.ndarray | None = field(default=None, repr=False, compare=False)
    weights: np.ndarray | None = field(default=None, repr=False, compare=False)
    whole: float | None = field(default=None, repr=False)
    resamples: int = 0
    replicates: Sequence[float] = field(default=(), repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Estimate, interval, test and verdict as JSON values; what is not finite is None."""
        mean, low, high = (
            value if math.isfinite(value) else None for value in (self.mean, self.low, self.high)
        )
        return {
            "mean": mean,
            "low": low,
            "high": high,
            "interval_method": self.method,
            "p_value": self.p_value,
            "test": self.test,
            "verdict": self.verdict(),
        }

    def verdict(self) -> str:
        """ "higher", "lower" or "no effect beyond noise", or that there is none; see `verdicts`."""
        return judge(
            self.low,
            self.high,
            self.no_effect,
            n=self.n,
            confidence=self.confidence,
            p_value=self.p_value,
            least_p=self.least_p,
        )


def mean_interval(
    values: Values,
    *,
    weights: Values | None = None,
    no_effect: float | None = 0.0,
    logs: bool = False,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Student's t interval of a mean, with the sign-flip test.

    Equivalent, without weights:

        mean -+ t(n - 1, confidence) * values.std() / sqrt(n)

    With weights the estimate is the ratio sum(values) / sum(weights), as for sums and counts of
    groups, and the spread is that of its linearisation, (values - ratio * weights) / mean(weights)
    (Cochran 1977, 6.3): groups of any size may be told apart, examples within one need not be
    independent.

    Args:
        values: [n], a number for each unit, such as after minus before; n may be 0 or 1.
        weights: [n], positive; None: 1 for each.
        no_effect: the mean (the ratio, with `logs`) that means "nothing changed"; None: there is no
            such value, and nothing is tested.
        logs: the values are logs, and estimate and bounds are taken as exp of those of the logs.
        confidence: in (0, 1).
        seed: of the test's draws; the interval itself has no chance in it.

    Raises:
        ValueError: another shape, NaN or infinity, weights that are not positive, options out of
            range, or a ratio that overflows.
    """
    found = _finite(values, "values")
    sizes = None if weights is None else _finite(weights, "weights")
    if sizes is not None and (len(sizes) != len(found) or not (sizes > 0).all()):
        raise ValueError(
            f"weights must be positive and as many as values ({len(found)}), got {len(sizes)} with "
            f"the smallest {sizes.min(initial=math.inf):g}; give the size of each group"
        )
    check_confidence(confidence)
    if no_effect is not None and (not math.isfinite(no_effect) or (logs and no_effect <= 0)):
        raise ValueError(
            f"no_effect must be a finite number{', above 0 with logs' if logs else ''}, got "
            f"{no_effect}; pass None where there is no such value"
        )
    n = len(found)
    weight = np.ones(n) if sizes is None else sizes
    # What overflows is refused below.
    with np.errstate(over="ignore", invalid="ignore"):
        estimate = float(found.sum() / weight.sum()) if n else math.nan
        spread = float(((found - estimate * weight) / weight.mean()).std(ddof=1)) if n > 1 else 0.0
    low, high = math.nan, math.nan
    if n > 1:
        half = student_quantile(n - 1, confidence) * spread / math.sqrt(n)
        low, high = estimate - half, estimate + half
    if n and not all(map(math.isfinite, (estimate, low, high)[: 1 if n == 1 else 3])):
        raise ValueError(
            f"values must have a mean and a spread that float64 can hold, got up to "
            f"{abs(found).max():.4g}; measure them in another unit"
        )
    null = None if no_effect is None else math.log(no_effect) if logs else no_effect
    test = {} if null is None or n < 2 else _test(found - null * weight, seed)
    if logs:
        estimate, low, high = (_exp(value) for value in (estimate, low, high))
        if math.isinf(estimate):
            raise ValueError(
                f"ratio must be finite, got {estimate}; the mean of its logs is "
                f"{found.sum() / weight.sum():.4g}"
            )
    method = STUDENT_T_OF_LOGS if logs else STUDENT_T
    return Interval(
        estimate, low, high, n, confidence, method, no_effect, values=found, weights=sizes, **test
    )


def share_interval(
    values: Values,
    whole: float = 1.0,
    *,
    no_effect: float | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Exact interval (Clopper & Pearson 1934) of the share of examples that count in full.

    Args:
        values: [n], `whole` or 0, or whole / 2 for a tie, which counts as half.
        whole: 1, or 100 for per cent.
        no_effect: the share that an indifferent model has. Half of `whole` is tested exactly, by
            the binomial distribution of the examples without a tie.
        confidence, seed: as in `mean_interval`.

    Returns:
        With ties the interval is that of wins minus losses, see `share_change_interval`.

    Raises:
        ValueError: other values, and what `mean_interval` raises.
    """
    _require_whole(whole)
    found = _finite(values, "values")
    if not is_share(found, whole):
        raise ValueError(
            f"values must be 0, {whole / 2:g} or {whole:g}, got "
            f"{found[~np.isin(found, [0, whole / 2, whole])][0]:g}; use mean_interval"
        )
    middle = whole / 2.0
    return _signed(found, middle, middle, whole, no_effect, confidence, seed)


def share_change_interval(
    differences: Values, whole: float = 1.0, *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Interval of the change of a share over the same examples, with McNemar's exact test.

    The change is a difference of two shares of the examples: that of those that were won and that
    of those that were lost. Each has its Clopper-Pearson interval; they are put together by their
    distances to the estimates and their correlation (Newcombe 1998, method 10, with exact in place
    of score intervals). With no example unchanged that is Clopper and Pearson's own.

    Args:
        differences: [n], after minus before: -whole, 0 or whole. Others, as ties leave them, are
            taken by `mean_interval`, cut to -whole and whole: no share changes by more.
        whole, confidence, seed: as in `share_interval`.
    """
    _require_whole(whole)
    found = _finite(differences, "differences")
    if not np.isin(found, [-whole, 0.0, whole]).all():
        mean = mean_interval(found, confidence=confidence, seed=seed)
        return replace(mean, low=max(mean.low, -whole), high=min(mean.high, whole))
    return _signed(found, 0.0, whole, whole, 0.0, confidence, seed)


def _require_whole(whole: float) -> None:
    require_real("whole", whole)
    if not 0.0 < whole < math.inf:
        raise ValueError(
            f"whole must be a number above 0, got {whole}; pass 1, or 100 for per cent"
        )


def is_share(values: np.ndarray, whole: float) -> bool:
    """Whether every value is 0, `whole`, or the half of it."""
    return bool(np.isin(values, [0.0, whole / 2.0, whole]).all())


@cpu_by_default
def by_unit(values: Tensor, units: Sequence[Hashable]) -> tuple[Tensor, Tensor]:
    """Sum and number of the values of each unit, float64 [units], in the order of appearance."""
    numbers = {unit: number for number, unit in enumerate(dict.fromkeys(units))}
    owner = torch.tensor([numbers[unit] for unit in units], dtype=torch.int64)
    sums = torch.zeros(len(numbers), dtype=torch.float64)
    counts = torch.bincount(owner, minlength=len(numbers)).double()
    return sums.index_add_(0, owner, values.double().cpu()), counts


def student_quantile(freedom: int, confidence: float = 0.95) -> float:
    """t with P(|T| < t) = confidence for `freedom` degrees of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1.0 + confidence) / 2.0))


def check_confidence(confidence: float) -> None:
    """Raise ValueError or TypeError unless it is a number in (0, 1)."""
    require_real("confidence", confidence)
    if not 0.0 < confidence < 1.0:
        raise ValueError(
            f"confidence must be between 0 and 1, got {confidence}; 0.95 is the usual choice"
        )


def _signed(
    found: np.ndarray,
    middle: float,
    step: float,
    whole: float,
    no_effect: float | None,
    confidence: float,
    seed: int,
) -> Interval:
    """Of values that are `middle`, or `step` more or less: the interval of their mean."""
    check_confidence(confidence)
    n = len(found)
    estimate = float(found.mean()) if n else math.nan
    won, lost = int((found > middle).sum()), int((found < middle).sum())
    low, high = math.nan, math.nan
    if n > 1:
        low, high = (middle + step * end for end in _won_less_lost(won, lost, n, confidence))
    test = {} if no_effect is None or n < 2 else _test(found - no_effect, seed)
    if middle == 0 and test.get("test") == EXACT:
        test["test"] = "exact McNemar"
    method = CLOPPER_PEARSON if won + lost == n and middle else WON_LESS_LOST
    return Interval(
        estimate, low, high, n, confidence, method, no_effect, values=found, whole=whole, **test
    )


def _test(differences: np.ndarray, seed: int) -> dict[str, Any]:
    """The sign-flip test, as fields of an `Interval`."""
    flips = sign_flip_test(differences, seed=seed)
    return {"p_value": flips.p_value, "test": flips.method, "least_p": flips.least_p}


def _won_less_lost(won: int, lost: int, n: int, confidence: float) -> tuple[float, float]:
    """Interval of P(won) - P(lost), which exclude each other."""
    shares = won / n, lost / n
    (won_low, won_high), (lost_low, lost_high) = (
        _clopper_pearson(count, n, confidence) for count in (won, lost)
    )
    odds = won * lost / ((n - won) * (n - lost)) if max(won, lost) < n else 1.0
    correlation = -math.sqrt(odds)

    def reach(first: float, second: float) -> float:
        return math.sqrt(max(0.0, first**2 - 2.0 * correlation * first * second + second**2))

    difference = shares[0] - shares[1]
    low = difference - reach(shares[0] - won_low, lost_high - shares[1])
    high = difference + reach(won_high - shares[0], shares[1] - lost_low)
    return max(-1.0, low), min(1.0, high)


def _clopper_pearson(count: int, n: int, confidence: float) -> tuple[float, float]:
    from scipy.special import betaincinv

    tail = (1.0 - confidence) / 2.0
    low = float(betaincinv(count, n - count + 1, tail)) if count else 0.0
    high = float(betaincinv(count + 1, n - count, 1.0 - tail)) if count < n else 1.0
    return low, high


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _finite(values: Values, name: str) -> np.ndarray:
    """float64 [n] on the CPU."""
    try:
        # Imaginary parts would be dropped.
        if "complex" in str(getattr(values, "dtype", "")):
            raise TypeError("complex ones")
        found = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach().numpy()
    except (TypeError, ValueError, OverflowError) as error:
        raise InputTypeError(
            f"{name} must be numbers that float64 can hold, got others ({error_line(error)}); give "
            "one for each example"
        ) from None
    if found.ndim != 1:
        raise ValueError(
            f"{name} must be of shape [n], got {list(found.shape)}; give one number for each "
            "example"
        )
    bad = np.flatnonzero(~np.isfinite(found))
    if len(bad):
        raise ValueError(
            f"{name} must be finite, got {found[bad[0]]} at index {bad[0]}; drop that example"
        )
    return found
