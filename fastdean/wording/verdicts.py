"""The verdict on a figure: its words, and when they are given.

Every interval, table and sentence of the package takes its verdict from here.
"""

from __future__ import annotations

NO_EFFECT = "no effect beyond noise"
NO_NEUTRAL = "no neutral value"
NOT_JUDGED = "not judged"
HIGHER, LOWER = "higher", "lower"
ABOVE, BELOW = "above neutral", "below neutral"
FARTHER, CLOSER = "farther from neutral", "closer to neutral"
# With fewer, an interval is too uncertain and the sign-flip test has too few patterns.
FEWEST = 8

_WITHHELD = "no verdict from "
_DIRECTIONS = {HIGHER: 1, ABOVE: 1, FARTHER: 1, LOWER: -1, BELOW: -1, CLOSER: -1, NO_EFFECT: 0}


def judge(
    low: float,
    high: float,
    no_effect: float | None,
    *,
    n: int,
    confidence: float,
    p_value: float | None,
    least_p: float | None,
) -> str:
    """`HIGHER` or `LOWER` where interval and test agree that something changed, else `NO_EFFECT`.

    Withheld in words where n is below `FEWEST`, where the test could not have reached the level
    1 - confidence whatever the values (its `least_p`), and where there is no test at all.

    Args:
        low, high: of the interval; holding `no_effect`, ends included, it claims nothing.
        no_effect: the value that means "nothing changed"; None: `NO_NEUTRAL`.
        n: independent units: examples, or groups of examples that belong together.
        p_value, least_p: of the test; None for an interval without one.
    """
    if no_effect is None:
        return NO_NEUTRAL
    level = 1.0 - confidence
    if n < FEWEST or (least_p is not None and least_p > level):
        return f"{_WITHHELD}n = {n}"
    if p_value is None:
        return f"{_WITHHELD}an interval without a test"
    if p_value <= level and low > no_effect:
        return HIGHER
    if p_value <= level and high < no_effect:
        return LOWER
    return NO_EFFECT


def reading(low: float, high: float, no_effect: float, verdict: object) -> str:
    """The words beside an interval that came with a verdict, from a file or a caller.

    An interval that holds "nothing changed" is no effect, whatever the verdict; one without a
    verdict is not judged.
    """
    if is_withheld(verdict):
        return verdict
    if low <= no_effect <= high:
        return NO_EFFECT
    return verdict if isinstance(verdict, str) and verdict else NOT_JUDGED


def direction(verdict: object) -> int | None:
    """+1 or -1 of a verdict that claims an effect, 0 of one that claims none, else None."""
    return _DIRECTIONS.get(verdict) if isinstance(verdict, str) else None


def is_withheld(verdict: object) -> bool:
    """Whether a verdict says that there is none."""
    return isinstance(verdict, str) and verdict.startswith(_WITHHELD)


def reworded(verdict: str, lower: str, higher: str) -> str:
    """The verdict with other words for its two directions."""
    return {LOWER: lower, HIGHER: higher}.get(verdict, verdict)
