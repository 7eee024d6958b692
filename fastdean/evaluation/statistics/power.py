"""Power: the smallest change that a design of this size and spread finds, most of the time."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from fastdean.evaluation.statistics.intervals import (
    STUDENT_T,
    STUDENT_T_OF_LOGS,
    WON_LESS_LOST,
    Interval,
    student_quantile,
)
from fastdean.wording.numbers import require_real, require_whole
from fastdean.wording.verdicts import FEWEST

POWER = 0.8
# Steps of a bisection; each halves what is left.
_HALVINGS = 60
_SPREADS = 4000
# Bernstein: a binomial count is this many spreads, and their square, away with p < 1e-21.
_MOST_SPREADS = 10.0


def detectable_change(interval: Interval, power: float = POWER) -> float | None:
    """The smallest change that is found in a share `power` of samples like this one.

    The test is two-sided at the level 1 - interval.confidence. Of a mean it is Student's t, with
    the spread of these differences; of a change of a share it is McNemar's, with the share of
    examples that changed here, see `detectable_share_change`. A ratio's change is itself a ratio
    above 1. None where there is no such test, no spread, or too few examples for a verdict.

    Raises:
        ValueError, TypeError: a power that is not between 0 and 1.
    """
    _require_between("power", power, POWER)
    if interval.n < FEWEST or interval.p_value is None:
        return None
    if interval.method == WON_LESS_LOST and interval.values is not None and interval.whole:
        discordant = float((interval.values != 0).mean())
        found = detectable_share_change(interval.n, discordant, 1 - interval.confidence, power)
        return None if found is None else interval.whole * found
    if interval.method not in (STUDENT_T, STUDENT_T_OF_LOGS):
        return None
    ends = interval.low, interval.high
    if interval.method == STUDENT_T_OF_LOGS:
        if ends[0] <= 0.0 or math.isinf(ends[1]):
            return None
        ends = math.log(ends[0]), math.log(ends[1])
    freedom = interval.n - 1
    error = (ends[1] - ends[0]) / 2 / student_quantile(freedom, interval.confidence)
    if not error > 0.0:
        return None
    change = error * _noncentrality(freedom, interval.confidence, power)
    if interval.method == STUDENT_T:
        return change
    return math.exp(change) if change < 700.0 else None


def detectable_share_change(
    n: int, discordant: float, level: float = 0.05, power: float = POWER
) -> float | None:
    """The smallest change of a share that McNemar's exact test finds with this power.

    Equivalent: the smallest c for which, with D ~ Binomial(n, max(discordant, c)) examples that
    change and Binomial(D, (1 + c / discordant) / 2) of them won, the two-sided test is at most at
    `level` in a share `power` of samples. Where the examples that change are fewer than c, all of
    them are won.

    Args:
        n: examples.
        discordant: the share of them that change, in 0..1.
        level, power: between 0 and 1.

    Returns:
        A share in 0..1; None where n examples cannot reach the level even if all are won.

    Raises:
        ValueError, TypeError: anything else.
    """
    require_whole("n", n)
    require_real("discordant", discordant)
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}; count the examples")
    if not 0.0 <= discordant <= 1.0:
        raise ValueError(
            f"discordant must lie in 0..1, got {discordant}; give the share of examples that change"
        )
    _require_between("level", level, 0.05)
    _require_between("power", power, POWER)
    if 2.0 ** (1 - n) > level:
        return None

    def found(change: float) -> float:
        return _mcnemar_power(n, max(discordant, change), change, level)

    return _smallest(lambda change: found(change) >= power, 0.0, 1.0)


def _require_between(name: str, value: float, usual: float) -> None:
    require_real(name, value)
    if not 0.0 < value < 1.0:
        raise ValueError(
            f"{name} must be between 0 and 1, got {value}; {usual} is the usual choice"
        )


def _mcnemar_power(n: int, discordant: float, change: float, level: float) -> float:
    """Power of the exact test where a share `discordant` changes, won less lost being `change`."""
    from scipy.special import bdtr, bdtrik, gammaln, xlog1py, xlogy

    # Farther than this from the mean nothing is likely: of a million, some thousands are left.
    mean = n * discordant
    reach = _MOST_SPREADS * math.sqrt(mean * (1.0 - discordant)) + _MOST_SPREADS**2
    first, last = max(0, math.floor(mean - reach)), min(n, math.ceil(mean + reach))
    changed = np.arange(first, last + 1, dtype=np.float64)
    log_p = gammaln(n + 1) - gammaln(changed + 1) - gammaln(n - changed + 1)
    p_changed = np.exp(log_p + xlogy(changed, discordant) + xlog1py(n - changed, -discordant))
    likely = (p_changed > 1e-12) & (2.0 ** (1 - changed) <= level)
    changed, p_changed = changed[likely], p_changed[likely]
    # The most that may go the other way; its inverse is of a continuous argument, and rounded.
    most = np.floor(bdtrik(level / 2, changed, 0.5))
    most -= bdtr(most, changed.astype(np.int64), 0.5) > level / 2
    most += bdtr(most + 1, changed.astype(np.int64), 0.5) <= level / 2
    whole = changed.astype(np.int64)
    won = min(1.0, (1.0 + change / discordant) / 2.0)
    extreme = bdtr(most, whole, won) + bdtr(most, whole, 1.0 - won)
    return float((p_changed * extreme).sum())


@lru_cache(maxsize=256)
def _noncentrality(freedom: int, confidence: float, power: float) -> float:
    """How many standard errors a mean must be from zero to be found by the t test."""
    from scipy.special import gammaincinv, ndtr

    quantile = student_quantile(freedom, confidence)
    # Over the estimated spread, by its quantiles: scipy's noncentral t has no value far out.
    shares = (np.arange(_SPREADS) + 0.5) / _SPREADS
    bounds = quantile * np.sqrt(2.0 / freedom * gammaincinv(freedom / 2.0, shares))

    def is_found(nc: float) -> bool:
        return bool((ndtr(nc - bounds) + ndtr(-nc - bounds)).mean() >= power)

    return _smallest(is_found, 0.0, 4.0 * quantile + 40.0)


def _smallest(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The smallest value in low..high at which `holds`, which holds at `high`, begins to."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
