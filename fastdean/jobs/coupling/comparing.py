"""What masks changed against the model as it came: one family of tests, as plain numbers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from fastdean.evaluation import (
    Family,
    Interval,
    compare_margins,
    compare_perplexity,
    divergence_interval,
)
from fastdean.evaluation.statistics.families import Change, at, tests_of
from fastdean.jobs.coupling.figures import Figures, MeasuringSet, noted


@dataclass(frozen=True)
class Changes:
    """By set, and then by mask.

    Attributes:
        family: of all tests of margins and perplexity together.
        margins: changes of the mean margin.
        perplexity: ratios, each with "value" and, as "kl", the divergence.
        others: of what was asked for besides, by name.
    """

    family: Family
    margins: Mapping[str, dict[Any, dict[str, Any]]]
    perplexity: Mapping[str, dict[Any, dict[str, Any]]]
    others: Mapping[str, dict[Any, dict[str, Any]]]


# By what is compared, and by mask.
Others = Mapping[str, Mapping[Any, Change]]


def family_of(examples: MeasuringSet, masks: int, others: Others | None = None) -> Family:
    """The tests of so many masks on these sets, whatever comes of them.

    Args:
        others: what is compared besides.
    """
    sets = [*examples.pairs.values(), *examples.texts.values()]
    besides = sum(tests_of(by_mask.values()) for by_mask in (others or {}).values())
    return Family(masks * sum(1 for each in sets if each) + besides)


def compared(
    origin: Figures,
    after: Mapping[Any, Figures],
    family: Family,
    seed: int,
    notes: list[str],
    *,
    alone: bool,
    others: Others | None = None,
) -> Changes:
    """Every mask's figures against those of the model as it came.

    Args:
        after: mask -> its figures.
        others: as `family_of` took them.
        alone: whether there is one set of texts, which a note then need not name.
    """
    options: dict[str, Any] = {"confidence": family.confidence_of_each, "seed": seed}
    intervals: dict[Hashable, Interval] = {}
    for mask, figures in after.items():
        for topic, found_margins in figures.margins.items():
            moved = compare_margins(origin.margins[topic], found_margins, **options)
            intervals["margin", topic, mask] = moved
        for text, found in figures.perplexity.items():
            where = "" if alone else f" on {text}"
            # A ratio can overflow where neither perplexity does.
            with noted(notes, f"Perplexity{where} under {mask!r}"):
                ratio = compare_perplexity(origin.perplexity[text], found, **options)
                intervals["perplexity", text, mask] = ratio
    for name, by_mask in (others or {}).items():
        for mask, other in by_mask.items():
            intervals["other", name, mask] = at(other, family)
    judged = family.judged(intervals)
    margins: dict[str, dict[Any, dict[str, Any]]] = {topic: {} for topic in origin.margins}
    ratios: dict[str, dict[Any, dict[str, Any]]] = {text: {} for text in origin.perplexity}
    for mask, figures in after.items():
        for topic in figures.margins:
            margins[topic][mask] = judged["margin", topic, mask]
        for text, found in figures.perplexity.items():
            change = dict(judged.get(("perplexity", text, mask), {}))
            if not change:
                continue
            row = {"value": found.value, "ratio": change.pop("mean"), **change}
            if text in figures.divergence:
                row["kl"] = _kl(figures, text, len(after), seed)
            ratios[text][mask] = row
    told = {
        name: {mask: judged["other", name, mask] for mask in by_mask}
        for name, by_mask in (others or {}).items()
    }
    return Changes(family, margins, ratios, told)


def _kl(figures: Figures, text: str, masks: int, seed: int) -> dict[str, Any]:
    """The divergence with an interval that holds together with those of the other masks."""
    interval = divergence_interval(
        figures.divergence[text], confidence=Family(masks).confidence_of_each, seed=seed
    )
    found = interval.to_dict()
    return {key: found[key] for key in ("mean", "low", "high", "interval_method")}
