"""A figure with its interval and its verdict, as the page writes, reads and draws it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastdean.report.quantities import estimate, measured
from fastdean.wording.verdicts import direction, reading


@dataclass(frozen=True)
class Estimate:
    """One row of an interval plot. Values that were not measured are None or NaN.

    `verdict` is what the results say of it, see `fastdean.wording.verdicts`.
    """

    name: str
    value: object
    low: object
    high: object
    verdict: object = None

    @classmethod
    def of(cls, name: str, numbers: Mapping | None, key: str = "value") -> Estimate:
        """From the entry of a result; `key` is its value's."""
        numbers = numbers or {}
        return cls(name, *(numbers.get(each) for each in (key, "low", "high", "verdict")))

    @property
    def is_known(self) -> bool:
        """Whether both ends are."""
        return measured(self.low) and measured(self.high)

    def written(self, no_effect: float) -> tuple[str, str]:
        """The value and its interval as text, a difference with its sign."""
        return estimate(self.value, self.low, self.high, neutral=no_effect)

    def reading(self, no_effect: float) -> str:
        """What may be said about it in words."""
        if not self.is_known and not measured(self.value):
            return "not measured"
        low, high = (end if measured(end) else None for end in (self.low, self.high))
        return reading(low, high, no_effect, self.verdict)

    def is_effect(self, no_effect: float) -> bool:
        """Whether `reading` claims an effect."""
        return bool(direction(self.reading(no_effect)))

    def sentence(self, no_effect: float) -> str:
        """All of it, for a reader who does not see the plot."""
        return f"{self.name}: {' '.join(self.written(no_effect))}, {self.reading(no_effect)}."
