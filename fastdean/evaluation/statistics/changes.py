"""What changed between two estimates on the same examples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fastdean.evaluation.statistics.bootstrap import bootstrapped
from fastdean.evaluation.statistics.intervals import (
    BOOTSTRAP,
    Interval,
    mean_interval,
    share_change_interval,
    share_interval,
)


def change_between(before: Interval, after: Interval, *, seed: int = 0) -> Interval:
    """Interval of after - before, example by example.

    A change of means is the mean of the differences, one of shares is that of won and lost
    examples. A bootstrap compares the two on each resample.

    Args:
        before, after: of one function of `intervals`, or of `bootstrap_interval` with the same
            options, over the same examples.
        seed: of the test's draws.
    Raises:
        ValueError: the two differ in n, confidence, method, weights or resamples, or lack the
            values they were made of.
    """
    _require_comparable(before, after)
    if before.method == BOOTSTRAP:
        return _bootstrapped_change(before, after, np.asarray)
    old, new = _made_of(before, after)
    return _combined(before, after, new - old, 0.0, seed)


def change_of_distance(
    before: Interval, after: Interval, neutral: float, *, seed: int = 0
) -> Interval:
    """Interval of abs(after - neutral) - abs(before - neutral): below 0 is closer to neutral.

    Of means no resampling is needed. With d = after - before and s = after + before - 2 neutral
    the change is sign(s d) min(abs(s), abs(d)): both are means over the same examples, with
    intervals and tests of their own. The interval is what the change can be with s and d in
    theirs, and the larger p-value counts: closer or farther is only said where the direction of
    the change and the side of neutral are both beyond noise (an intersection-union test, Berger
    1982, so that the level holds). Far from neutral it is the interval of d.

    Args and errors: as in `change_between`.
    """
    _require_comparable(before, after)
    if before.method == BOOTSTRAP:
        return _bootstrapped_change(before, after, lambda value: abs(value - neutral))
    old, new = _made_of(before, after)
    moved = _combined(before, after, new - old, 0.0, seed)
    side = _combined(before, after, new + old, 2.0 * neutral, seed)
    corners = [
        _distance_change(s, d)
        for s, d in itertools.product((side.low, side.high), (moved.low, moved.high))
    ]
    known = not any(map(math.isnan, corners))
    # Both have a p-value where the corners are known.
    decisive = max(moved, side, key=lambda interval: interval.p_value or 0.0)
    return Interval(
        abs(after.mean - neutral) - abs(before.mean - neutral),
        min(corners) if known else math.nan,
        max(corners) if known else math.nan,
        moved.n,
        moved.confidence,
        f"{moved.method}, change and side",
        p_value=decisive.p_value,
        test=decisive.test,
        least_p=decisive.least_p,
    )


def of_confidence(interval: Interval, confidence: float, *, seed: int = 0) -> Interval:
    """The same estimate with an interval of another confidence, from the values it was made of.

    Args:
        interval: of `mean_interval`, `share_interval` or `bootstrap_interval`.
        seed: of the test's draws.
    Raises:
        ValueError: it lacks those values, or confidence is not in 0..1.
    """
    if interval.method == BOOTSTRAP:
        drawn = np.asarray(interval.replicates)
        return bootstrapped(
            interval.mean, drawn, interval.n, confidence, interval.resamples, interval.no_effect
        )
    values, _ = _made_of(interval, interval)
    options: dict[str, Any] = {
        "no_effect": interval.no_effect,
        "confidence": confidence,
        "seed": seed,
    }
    if interval.whole is not None:
        return share_interval(values, interval.whole, **options)
    return mean_interval(values, weights=interval.weights, **options)


def _distance_change(s: float, d: float) -> float:
    """abs(a) - abs(b) of s = a + b and d = a - b."""
    return math.copysign(1.0, s) * math.copysign(1.0, d) * min(abs(s), abs(d))


def _combined(
    before: Interval, after: Interval, values: np.ndarray, offset: float, seed: int
) -> Interval:
    """Interval of a sum or a difference of the two, less `offset` per example."""
    options: dict[str, Any] = {"confidence": before.confidence, "seed": seed}
    if before.whole is not None and before.whole == after.whole:
        return share_change_interval(values - offset, before.whole, **options)
    weights = before.weights
    shift = offset if weights is None else offset * weights
    return mean_interval(values - shift, weights=weights, **options)


def _bootstrapped_change(
    before: Interval, after: Interval, of: Callable[[np.ndarray], np.ndarray]
) -> Interval:
    drawn = of(np.asarray(after.replicates)) - of(np.asarray(before.replicates))
    moved = float(of(np.asarray(after.mean)) - of(np.asarray(before.mean)))
    return bootstrapped(moved, drawn, before.n, before.confidence, before.resamples)


def _require_comparable(before: Interval, after: Interval) -> None:
    for name in ("n", "resamples", "confidence"):
        values = getattr(before, name), getattr(after, name)
        if values[0] != values[1]:
            raise ValueError(
                f"before and after must have the same {name}, got {values[0]} and {values[1]}; "
                "measure both on the same examples with the same options"
            )
    if (before.method == BOOTSTRAP) != (after.method == BOOTSTRAP):
        raise ValueError(
            f"before and after must have intervals of one kind, got {before.method!r} and "
            f"{after.method!r}; measure both with the same function"
        )
    drawn = before.method == BOOTSTRAP and before.n >= 2
    if drawn and not len(before.replicates) == len(after.replicates) == before.resamples:
        raise ValueError(
            f"before and after must carry their {before.resamples} replicates, got "
            f"{len(before.replicates)} and {len(after.replicates)}; take both from "
            "bootstrap_interval"
        )


def _made_of(before: Interval, after: Interval) -> tuple[np.ndarray, np.ndarray]:
    """The values of each, of one unit after the other."""
    old, new = before.values, after.values
    if old is None or new is None or not len(old) == len(new) == before.n:
        counts = ["none" if values is None else str(len(values)) for values in (old, new)]
        raise ValueError(
            f"before and after must carry the {before.n} values they were made of, got "
            f"{' and '.join(counts)}; take both from mean_interval or share_interval"
        )
    weight, other = (np.ones(i.n) if i.weights is None else i.weights for i in (before, after))
    if not np.array_equal(weight, other):
        raise ValueError(
            "before and after must have the same weights, got others; measure both on the same "
            "groups of examples"
        )
    return old, new
