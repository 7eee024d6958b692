"""From values to pixels and to the round values that label them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from fastdean.report.quantities import decimal, measured, ratio

# Below it, the parts of a number are no numbers any more.
_TINY = 1e-290


@dataclass(frozen=True)
class Axis:
    """Values low..high onto pixels start..end, linearly or by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def around(cls, values: Iterable[object], start: float, end: float, log: bool = False) -> Axis:
        """An axis whose ends are round values outside of the measured ones."""
        known = [value for value in values if measured(value) and (value > _TINY or not log)]
        if log:
            known = [math.log10(value) for value in known]
        low, high = (min(known), max(known)) if known else (0.0, 1.0)
        if log:
            return cls(10 ** (low - 0.15), 10 ** (high + 0.15), start, end, log=True)
        if high - low <= max(_TINY, 1e-12 * max(abs(low), abs(high))):
            margin = abs(low) / 2 if abs(low) > _TINY else 0.5
            low, high = low - margin, high + margin
        step = _round_step((high - low) / 4)
        low, high = step * math.floor(low / step + 1e-9), step * math.ceil(high / step - 1e-9)
        return cls(low, high, start, end)

    def place(self, value: float) -> float:
        """The pixel of `value`."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """At most about `most` round values of the axis with their labels."""
        if self.log:
            return self._decades(most)
        step = _round_step((self.high - self.low) / most)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [(step * i, _tick_label(step * i, step)) for i in range(first, last + 1)]

    def _decades(self, most: int) -> list[tuple[float, str]]:
        lowest, highest = math.log10(self.low), math.log10(self.high)
        exponents = range(math.floor(lowest), math.ceil(highest) + 1)
        digits = (1,) if highest - lowest > 2 else (1, 2, 5)
        values = [float(f"{digit}e{exponent}") for exponent in exponents for digit in digits]
        inside = [value for value in values if self.low <= value <= self.high]
        return [(value, ratio(value)) for value in inside[:: math.ceil(len(inside) / most) or 1]]


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= least * (1 - 1e-9))


def _tick_label(value: float, step: float) -> str:
    if abs(value) < step / 2:
        return "0"
    if step < 1e-4 or step >= 1e5:
        return decimal(float(f"{value:.3g}"), 2)
    places = max(0, math.ceil(-math.log10(step) - 1e-9))
    return f"{value:,.{places}f}".replace("-", "−")
