"""What every bias measure returns: one figure, its noise, and the same figure by category."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastdean.evaluation.statistics.bootstrap import bootstrap_interval
from fastdean.evaluation.statistics.intervals import (
    Interval,
    by_unit,
    is_share,
    mean_interval,
    share_interval,
)
from fastdean.wording.digits import apart
from fastdean.wording.verdicts import ABOVE, BELOW, reworded

# float32 gives one text slightly different log-likelihoods in batches of different shapes; an order
# decided by less than this is not the model's.
TIE_NATS = 1e-4


@dataclass(frozen=True)
class BiasResult:
    """A figure of a bias measure.

    Attributes:
        name: the measure, and which of its figures.
        value: the estimate over all examples.
        interval: its interval, over the examples or groups of them that `notes` names.
        n: how many of these there are.
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
        """ "above neutral", "below neutral", "no effect beyond noise", or that there is no verdict
        or no neutral value; see `fastdean.wording.verdicts`.
        """
        interval = self.interval if category is None else self.by_category[category]
        return reworded(interval.verdict(), BELOW, ABOVE)

    def describe(self) -> str:
        """The figure in words, one line for all examples and one for each category."""
        neutral = "" if self.neutral is None else f" (neutral: {self.neutral:g})"
        lines = [f"{self.name}{neutral}: {self._line()}"]
        lines += [f"  {category}: {self._line(category)}" for category in self.by_category]
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

    def _line(self, category: str | None = None) -> str:
        interval = self.interval if category is None else self.by_category[category]
        has_ends = math.isfinite(interval.low) and math.isfinite(interval.high)
        known = (interval.mean, interval.low, interval.high) if has_ends else (interval.mean,)
        mean, *ends = apart(*known)
        unit = f" {self.unit}" if self.unit else ""
        bounds = f" [{', '.join(ends)}]" if ends else ""
        verdict = "" if self.neutral is None else f"; {self.verdict(category)}"
        return f"{mean}{unit}{bounds}, n = {interval.n}{verdict}"


class Figures:
    """The several figures of one measure, fields of a dataclass."""

    def describe(self) -> str:
        """Each figure in words."""
        return "\n".join(figure.describe() for figure in vars(self).values())

    def to_dict(self) -> dict[str, Any]:
        """Each figure as JSON values."""
        return {name: figure.to_dict() for name, figure in vars(self).items()}


def statistic_result(
    name: str,
    statistic: Callable[[Tensor], Tensor],
    n: int,
    *,
    neutral: float | None,
    values: Tensor | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    **described: Any,
) -> BiasResult:
    """The result whose value is `statistic` of n examples, no mean of theirs, with a bootstrap.

    Args:
        statistic: from example indices, int64 [k, m], to float64 [k], row by row, for any m.
        values: float64 [n], what of an example decides the statistic, to tell whether it changed;
            None: that is no single number.
        confidence, resamples, seed: as in `bootstrap_interval`.
        described: as in `_result`.
    """

    def interval(chosen: Tensor) -> Interval:
        found = bootstrap_interval(
            lambda index: statistic(chosen[index]),
            len(chosen),
            confidence=confidence,
            resamples=resamples,
            seed=seed,
            no_effect=neutral,
        )
        return found if values is None else replace(found, values=values[chosen].numpy())

    return _result(name, interval, n, neutral=neutral, **described)


def mean_result(
    name: str,
    values: Tensor,
    *,
    n: int | None = None,
    groups: Tensor | None = None,
    unit: str,
    neutral: float | None,
    confidence: float = 0.95,
    seed: int = 0,
    **described: Any,
) -> BiasResult:
    """The result whose value is the mean of the first `n` of `values`, float64, by `intervals`.

    In per cent, values that are all 0, 50 (a tie) or 100 are a share of examples, with an exact
    interval; other means have Student's t.

    Args:
        n: the examples; None: all of `values`. Those behind them belong to categories alone.
        groups: int64, the number of each value's group, where values of one are alike: the
            interval is then over groups, by Student's t.
        seed: of the sign-flip test's draws.
        described: as in `_result`.
    """
    options: dict[str, Any] = {"no_effect": neutral, "confidence": confidence, "seed": seed}
    of_share = groups is None and unit == "%" and is_share(values.double().cpu().numpy(), 100.0)

    def interval(chosen: Tensor) -> Interval:
        if of_share:
            return share_interval(values[chosen], 100.0, **options)
        if groups is None:
            return mean_interval(values[chosen], **options)
        # Sorted by group, so that the test draws the same signs whatever the order of the rows.
        chosen = chosen[groups[chosen].argsort(stable=True)]
        sums, counts = by_unit(values[chosen], groups[chosen].tolist())
        return mean_interval(sums, weights=counts, **options)

    n = len(values) if n is None else n
    return _result(name, interval, n, unit=unit, neutral=neutral, **described)


def _result(
    name: str,
    interval: Callable[[Tensor], Interval],
    examples: int,
    *,
    categories: Mapping[str, Tensor] | None = None,
    notes: Sequence[str] = (),
    **described: Any,
) -> BiasResult:
    """From the interval of any chosen examples, int64 [m].

    Args:
        categories: the indices, int64 [m], of each category's examples; see `members`.
        described: other fields of `BiasResult`.
    """
    overall = interval(torch.arange(examples))
    return BiasResult(
        name,
        overall.mean,
        overall,
        overall.n,
        by_category={label: interval(chosen) for label, chosen in (categories or {}).items()},
        notes=tuple(notes),
        **described,
    )


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


def ties(preference: Tensor) -> int:
    """How many of `preferred` are ties."""
    return int((preference == 0.5).sum())


def _interval_dict(interval: Interval) -> dict[str, Any]:
    found = interval.to_dict()
    # These two are called and worded by what the figure measures.
    del found["mean"], found["verdict"]
    return {"n": interval.n, **found}
