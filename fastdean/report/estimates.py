"""A figure with its interval and its verdict, as the page writes, reads and draws it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastdean.report.quantities import count, decimal, estimate, measured, percent
from fastdean.wording.verdicts import direction, reading


@dataclass(frozen=True)
class Estimate:
    """One row of an interval plot. Values that were not measured are None or NaN.

    `verdict` is what the results say of it, see `fastdean.wording.verdicts`; `p_adjusted` its
    p-value for all tests of its family. `changed` is how many items a change is made of changed,
    and `changed_most` how many of all such items do at most, in %.
    """

    name: str
    value: object
    low: object
    high: object
    verdict: object = None
    p_adjusted: object = None
    changed: object = None
    changed_most: object = None

    @classmethod
    def of(cls, name: str, numbers: Mapping | None, key: str = "value") -> Estimate:
        """From the entry of a result; `key` is its value's."""
        numbers = numbers or {}
        keys = (key, "low", "high", "verdict", "p_holm", "changed", "changed_most")
        return cls(name, *(numbers.get(each) for each in keys))

    @property
    def is_known(self) -> bool:
        """Whether both ends are."""
        return measured(self.low) and measured(self.high)

    @property
    def is_of_no_item(self) -> bool:
        """Whether no item changed, and the interval has no width, as if that were certain."""
        return self.changed == 0 and measured(self.changed_most) and self.low == self.high

    def written(self, no_effect: float) -> tuple[str, str]:
        """The value and its interval as text, a difference with its sign.

        Of a change of no item, how many of all such items may change stands in place of an interval
        without width.
        """
        value, ends = estimate(self.value, self.low, self.high, neutral=no_effect)
        if self.is_of_no_item:
            ends = f"at most {decimal(self.changed_most, 2)} % of items change"
        return value, ends

    def reading(self, no_effect: float) -> str:
        """What may be said about it in words."""
        if not self.is_known and not measured(self.value):
            return "not measured"
        low, high = (end if measured(end) else None for end in (self.low, self.high))
        p_adjusted = self.p_adjusted if measured(self.p_adjusted) else None
        return reading(low, high, no_effect, self.verdict, p_adjusted)

    def told(self, no_effect: float) -> str:
        """`reading`, and whether no item changed."""
        said = self.reading(no_effect)
        return f"{said}; no item changed" if self.is_of_no_item else said

    def is_effect(self, no_effect: float) -> bool:
        """Whether `reading` claims an effect."""
        return bool(direction(self.reading(no_effect)))

    def sentence(self, no_effect: float) -> str:
        """All of it, for a reader who does not see the plot."""
        return f"{self.name}: {' '.join(self.written(no_effect))}, {self.told(no_effect)}."


def family_words(tests: Mapping | None) -> str | None:
    """How figures that are tested together were adjusted for each other; None: they were not."""
    number = (tests or {}).get("tests")
    if not tests or not measured(number):
        return None
    confidence, each, power = (
        tests.get(key) for key in ("confidence", "confidence_of_each", "power")
    )
    return (
        f"All {count(number)} tests are one family: p is Holm's, adjusted for the others, and the "
        f"intervals hold together with {percent(confidence)} confidence (Bonferroni: each by "
        f"itself with {percent(each)}). No effect is claimed where p exceeds 0.05. “Detects” is "
        f"the smallest change that the design finds in {percent(power)} of samples like this one, "
        "with as much spread."
    )


def tested(numbers: Mapping, no_effect: float) -> list[str]:
    """The cells below `TESTED` of a figure's table; what is detected is told from `no_effect`."""
    detects = numbers.get("detects")
    enough = (n for n in range(3, 12) if decimal(detects, n) != decimal(no_effect, n))
    return [decimal(numbers.get("p_holm"), 2), decimal(detects, next(enough, 3))]


TESTED = ["p (Holm)", "Detects"]
