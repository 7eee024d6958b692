"""What every bias measure returns: one figure, its noise, and the same figure by category."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdean.evaluation.bootstrap import Interval, bootstrap_interval

# float32 gives one text slightly different log-likelihoods in batches of different shapes; an order
# decided by less than this is not the model's.
TIE_NATS = 1e-4


@dataclass(frozen=True)
class BiasResult:
    """A figure of a bias measure.

    Attributes:
        name: the measure, and which of its figures.
        value: the estimate over all examples.
        interval: its bootstrap interval, over the examples (see `notes` for what was resampled).
        n: how many examples that is.
        unit: of `value` and of the intervals.
        neutral: what an unbiased model has; None where the measure names no such value.
        by_category: the same figure of each category's own examples.
        figures: numbers that belong to `value` without being it, such as ties or a p-value.
        notes: choices a reader must know to compare the figure with another.
    """

    name: str
    value: float
    interval: Interval
    n: int
    unit: str
    neutral: float | None
    by_category: Mapping[str, Interval] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def verdict(self, category: str | None = None) -> str:
        """Where the interval lies: "no effect beyond noise" if it holds the neutral value, ends
        included; else "above neutral" or "below neutral"; "no neutral value" for a measure without
        one.

        "too few examples" where chance alone puts all n on one side of neutral more often than the
        interval may err, 2^(1 - n) > 1 - confidence: below n = 6 for 95 %. The bootstrap of few
        examples that happen to agree has no width and would call anything an effect.
        """
        interval = self.interval if category is None else self.by_category[category]
        if self.neutral is None:
            return "no neutral value"
        if 2.0 ** (1 - interval.n) > 1.0 - interval.confidence:
            return "too few examples"
        words = {"higher": "above neutral", "lower": "below neutral"}
        return words.get(interval.verdict(), interval.verdict())

    def describe(self) -> str:
        """The figure in words, one line for all examples and one for each category."""
        neutral = "" if self.neutral is None else f" (neutral: {self.neutral:g})"
        unit = f" {self.unit}" if self.unit else ""
        lines = [f"{self.name}{neutral}: {self._line(self.interval, unit)}{self._verdict()}"]
        lines += [
            f"  {category}: {self._line(interval, unit)}{self._verdict(category)}"
            for category, interval in self.by_category.items()
        ]
        lines += [f"  {name}: {value:g}" for name, value in self.figures.items()]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values; a bound that does not exist (n < 2) is None."""
        return {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "neutral": self.neutral,
            "verdict": self.verdict(),
            **_interval_dict(self.interval),
            "confidence": self.interval.confidence,
            "resamples": self.interval.resamples,
            "by_category": {
                category: {
                    "value": interval.mean,
                    **_interval_dict(interval),
                    "verdict": self.verdict(category),
                }
                for category, interval in self.by_category.items()
            },
            "figures": dict(self.figures),
            "notes": list(self.notes),
        }

    @staticmethod
    def _line(interval: Interval, unit: str) -> str:
        bounds = "" if interval.n < 2 else f" [{interval.low:.4g}, {interval.high:.4g}]"
        return f"{interval.mean:.4g}{unit}{bounds}, n = {interval.n}"

    def _verdict(self, category: str | None = None) -> str:
        return "" if self.neutral is None else f"; {self.verdict(category)}"


def resampled(
    name: str,
    statistic: Callable[[Tensor], Tensor],
    n: int,
    *,
    unit: str,
    neutral: float | None,
    categories: Mapping[str, Tensor] | None = None,
    figures: Mapping[str, float] | None = None,
    notes: Iterable[str] = (),
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> BiasResult:
    """The result whose value is `statistic` of n examples.

    Args:
        statistic: from example indices, int64 [k, m], to float64 [k], row by row, for any m.
        categories: the indices, int64 [m], of each category's examples; see `members`.
        confidence, resamples, seed: as in `bootstrap_interval`.
    """

    def interval(chosen: Tensor) -> Interval:
        return bootstrap_interval(
            lambda index: statistic(chosen[index]),
            len(chosen),
            confidence=confidence,
            resamples=resamples,
            seed=seed,
            no_effect=0.0 if neutral is None else neutral,
        )

    overall = interval(torch.arange(n))
    return BiasResult(
        name=name,
        value=overall.mean,
        interval=overall,
        n=n,
        unit=unit,
        neutral=neutral,
        by_category={name: interval(chosen) for name, chosen in (categories or {}).items()},
        figures=dict(figures or {}),
        notes=tuple(notes),
    )


def resampled_mean(name: str, values: Tensor, **options: Any) -> BiasResult:
    """The result whose value is the mean of `values`, float64 [n]; options as in `resampled`."""
    return resampled(name, lambda index: values[index].mean(dim=-1), len(values), **options)


def members(*labellings: Sequence[str]) -> dict[str, Tensor]:
    """Which examples carry each label, int64 [m], in the order in which the labels first appear.

    Several labellings of the same examples stand one after the other; an empty label is none.
    """
    found: dict[str, list[int]] = {}
    for labels in labellings:
        for index, label in enumerate(labels):
            if label:
                found.setdefault(label, []).append(index)
    return {label: torch.tensor(indices) for label, indices in found.items()}


def preferred(first: Tensor, second: Tensor) -> Tensor:
    """1 where `first` exceeds `second`, 0 where it is less, 0.5 where they tie (`TIE_NATS`).

    NaN where the difference is NaN: no answer is not an answer.
    """
    difference = first - second
    order = torch.where(difference.abs() <= TIE_NATS, 0.5, (difference > 0).double())
    return torch.where(difference.isnan(), torch.nan, order)


def _interval_dict(interval: Interval) -> dict[str, float | int | None]:
    bounds = {"low": interval.low, "high": interval.high}
    return {
        **{name: None if math.isnan(bound) else bound for name, bound in bounds.items()},
        "n": interval.n,
    }
