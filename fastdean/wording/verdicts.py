"""What may be said about a figure, and in which words.

`judge` decides for an interval and its test; results keep what it says. `reading` decides what is
shown of an interval that was kept with its verdict, on a page, a card or in a sentence.
"""

from __future__ import annotations

from math import isfinite

NO_EFFECT = "no effect beyond noise"
NO_NEUTRAL = "no neutral value"
NO_INTERVAL = "no verdict without an interval"
NOT_JUDGED = "not judged"
HIGHER, LOWER = "higher", "lower"
ABOVE, BELOW = "above neutral", "below neutral"
FARTHER, CLOSER = "farther from neutral", "closer to neutral"
# With fewer examples the interval is too uncertain, and the sign-flip test has too few patterns.
FEWEST = 8
# A p-value above it claims nothing, adjusted for the tests that are read together with it.
LEVEL = 0.05

_WITHHELD = "no verdict "
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
    tests: int = 1,
) -> str:
    """`HIGHER` or `LOWER` where interval and test agree that something changed, else `NO_EFFECT`.

    There is no verdict, and the text says why, where n is below `FEWEST`, where the test cannot
    reach the level (its `least_p` is above it), and where there is no test. The level is
    1 - confidence, and at most `LEVEL`.

    Args:
        low, high: of the interval. One that holds `no_effect`, ends included, claims nothing.
        no_effect: the value that means "nothing changed"; None: `NO_NEUTRAL`.
        n: independent units: examples, or groups of examples that belong together.
        p_value, least_p: of the test, adjusted where it is one of several; None for an interval
            without one.
        tests: how many tests are read together.
    """
    if no_effect is None:
        return NO_NEUTRAL
    level = min(LEVEL, 1.0 - confidence)
    if n < FEWEST:
        return withheld(f"from n = {n}")
    if least_p is not None and least_p > level:
        return withheld(f"from n = {n}{f' in {tests} tests' if tests > 1 else ''}")
    if p_value is None:
        return withheld("from an interval without a test")
    if p_value <= level and low > no_effect:
        return HIGHER
    if p_value <= level and high < no_effect:
        return LOWER
    return NO_EFFECT


def reading(
    low: float | None,
    high: float | None,
    no_effect: float,
    verdict: object,
    p_adjusted: object = None,
) -> str:
    """What is shown of an interval and its verdict from a file or a caller.

    An interval that holds `no_effect` is never an effect, nor is one whose adjusted p-value is
    above `LEVEL`. One without a verdict is not judged, and without two finite ends there is
    `NO_INTERVAL`.

    Args:
        p_adjusted: for all tests of its table; None or no number: there was no other test.
    """
    if isinstance(verdict, str) and is_withheld(verdict):
        return verdict
    if low is None or high is None or not isfinite(low) or not isfinite(high):
        return NO_INTERVAL
    if low <= no_effect <= high or (isinstance(p_adjusted, int | float) and p_adjusted > LEVEL):
        return NO_EFFECT
    return verdict if isinstance(verdict, str) and verdict else NOT_JUDGED


def direction(verdict: object) -> int | None:
    """+1 or -1 of a verdict that claims an effect, 0 of `NO_EFFECT`, else None."""
    return _DIRECTIONS.get(verdict) if isinstance(verdict, str) else None


def withheld(why: str) -> str:
    """The verdict that there is none, such as "from n = 3"."""
    return f"{_WITHHELD}{why}"


def is_withheld(verdict: str) -> bool:
    """Whether a verdict says that there is none."""
    return verdict.startswith(_WITHHELD)


def reworded(verdict: str, lower: str, higher: str) -> str:
    """The verdict with other words for its two directions."""
    return {LOWER: lower, HIGHER: higher}.get(verdict, verdict)


def verb(verdict: str) -> str:
    """The verdict as the verb of a sentence: rose, fell, did not change beyond noise."""
    found = direction(verdict)
    if found is None:
        return "was not judged" if verdict == NOT_JUDGED else f"has {verdict}"
    return {1: "rose", -1: "fell", 0: "did not change beyond noise"}[found]
