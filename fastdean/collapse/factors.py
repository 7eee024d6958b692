"""The factors that a schedule gives a regulariser's strength, and how a saved state knows them.

A schedule is a function, which no file can hold. So each factor is recorded as it is used, in spans
[first step, last step, factor], and another schedule is one that gives other factors for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from fastdean.files.declared import Lists, Real, Row, Whole, unfit

Schedule = Callable[[int], float]

# No training has as many passes; a larger number was never a step.
STEP = Whole(most=1 << 40)
SPANS = Lists(Row((STEP, STEP, Real())))
# How many of the recorded steps a schedule is asked for, about, besides the ends of the spans.
_MOST_ASKED = 100_000


def factor_at(schedule: Schedule | None, step: int) -> float:
    """The schedule's factor, which must be finite; 1 without a schedule."""
    if schedule is None:
        return 1.0
    factor = float(schedule(step))
    if not math.isfinite(factor):
        raise ValueError(f"schedule must give a finite factor, got {factor} for step {step}")
    return factor


def record(spans: list[list[Any]], step: int, factor: float) -> None:
    """Lengthen the last span by the step, or begin another."""
    last = spans[-1] if spans else None
    if last is not None and last[2] == factor and last[1] <= step <= last[1] + 1:
        last[1] = step
    else:
        spans.append([step, step, factor])


def gives(schedule: Schedule | None, spans: Sequence[Sequence[Any]]) -> bool:
    """Whether the schedule has the factors of the spans, at all of their steps.

    Of more than 100,000 steps it is asked for about as many, and for both ends of each span.
    """
    stride = max(1, _length(spans) // _MOST_ASKED)
    if schedule is None:
        return all(factor == 1.0 for _, _, factor in spans)
    try:
        return all(
            factor_at(schedule, step) == factor
            for first, last, factor in spans
            for step in chain(range(first, last, stride), [last])
        )
    # A schedule that is a table has an end.
    except (LookupError, ArithmeticError):
        return False


def check_spans(spans: Sequence[Sequence[Any]], step: int, advice: str) -> None:
    """Raise `Unfit` unless the spans go forward and hold no more steps than were begun."""
    for place, (first, last, _) in enumerate(spans):
        if first > last:
            where = f"factors[{place}]"
            raise unfit("stored", where, "a span forward", f"{first} to {last}", advice)
    if (length := _length(spans)) > step + 1:
        expected = f"spans of at most the {step} steps done"
        raise unfit("stored", "factors", expected, f"spans of {length}", advice)


def _length(spans: Sequence[Sequence[Any]]) -> int:
    return sum(last - first + 1 for first, last, _ in spans)
