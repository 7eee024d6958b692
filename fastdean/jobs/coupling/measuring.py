"""What the masks of a run change in its model, as tables of plain numbers with their noise.

Every figure is taken on the model as it came and again under every mask, on the same examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from torch import Tensor, nn

from fastdean.data.examples import Example
from fastdean.evaluation import (
    Margins,
    Perplexity,
    compare_margins,
    compare_perplexity,
    last_token_states,
    layer_dependence,
    margin_interval,
    perplexity,
    prompts_only,
    response_margins,
)
from fastdean.masks import NeuronMask
from fastdean.models.forward import label_shift

_PERMUTATIONS = 200
_HSIC: Mapping[str, Any] = {"estimator": "unbiased", "kernel": "gaussian", "bandwidth": "median"}
# The unbiased estimator of HSIC is not defined on fewer.
_FEWEST_STATES = 4


@dataclass(frozen=True)
class MeasuringSet:
    """What is measured on; each part may be empty.

    Attributes:
        pairs: set -> (safe, unsafe) examples that share their prompt.
        texts: set -> examples whose targets' perplexity is taken.
        coupled: the two sets of `pairs` whose representations' dependence is taken.
    """

    pairs: Mapping[str, list[tuple[Example, Example]]]
    texts: Mapping[str, list[Example]]
    coupled: tuple[str, str]


@dataclass
class _Figures:
    """The figures of one model, as far as they could be taken; all finite but the states."""

    margins: dict[str, Margins] = field(default_factory=dict)
    perplexity: dict[str, Perplexity] = field(default_factory=dict)
    states: dict[str, Tensor] | None = None


def measure(
    model: nn.Module,
    masks: Mapping[str, NeuronMask],
    rule: str,
    examples: MeasuringSet,
    *,
    seed: int = 0,
    timed: Callable[[str], AbstractContextManager],
    tokens_per_batch: int | None = None,
    progress: bool = True,
) -> tuple[dict[str, Any], list[str]]:
    """Margins and perplexity under every mask, HSIC of the hidden states under the main one.

    Masked language models have neither margins nor a perplexity here: they see the tokens they
    would be asked about.

    Args:
        masks: rule -> mask; one without weights is not measured. The model is restored after each.
        rule: the main one.
        timed: `timed(name)` is entered around each model's measurement.
    Returns:
        The tables "margins", "perplexity" and "hsic", as far as there are examples for them and the
        model gives numbers, and sentences about what could not be measured. With several sets of
        texts there is a table for each, under "perplexities" in place of "perplexity".
    """
    options = {"tokens_per_batch": tokens_per_batch, "progress": progress}
    notes: list[str] = []
    if label_shift(model) == 0:
        notes.append(
            "Margins and perplexity were not measured: a masked language model sees the tokens it "
            "would be asked about."
        )
    with timed("measure unmasked model"):
        origin = _figures(model, examples, options, notes)
    after = {}
    for name, mask in masks.items():
        if len(mask):
            with timed(f"measure {name} mask"), mask.applied(model):
                after[name] = _figures(
                    model, examples, options, notes, name, origin, with_states=name == rule
                )

    results: dict[str, Any] = {
        "margins": {
            topic: _margin_table(topic, margins, after, masks, seed)
            for topic, margins in origin.margins.items()
        }
    }
    tables = {
        name: _perplexity_table(name, found, after, seed, notes, alone=len(examples.texts) == 1)
        for name, found in origin.perplexity.items()
    }
    if len(examples.texts) > 1:
        results["perplexities"] = tables
    elif tables:
        (results["perplexity"],) = tables.values()
    states = after[rule].states if rule in after else None
    if origin.states is not None and states is not None:
        with _noted(notes, "HSIC"):
            results["hsic"] = _hsic_table(origin.states, states, examples.coupled, seed)
    return results, notes


def _figures(
    model: nn.Module,
    examples: MeasuringSet,
    options: Mapping[str, Any],
    notes: list[str],
    mask: str | None = None,
    origin: _Figures | None = None,
    with_states: bool = True,
) -> _Figures:
    """What can be measured of the model; under a mask, of that what its origin has too."""
    under = "" if mask is None else f" under {mask!r}"
    found = _Figures()
    if label_shift(model) == 1:
        for topic in examples.pairs if origin is None else origin.margins:
            if examples.pairs[topic]:
                with _noted(notes, f"The {topic} margin{under}"):
                    found.margins[topic] = _margins(model, examples.pairs[topic], options)
        for name in examples.texts if origin is None else origin.perplexity:
            where = f" on {name}" if len(examples.texts) > 1 else ""
            if examples.texts[name]:
                with _noted(notes, f"Perplexity{where}{under}"):
                    found.perplexity[name] = _perplexity(model, examples.texts[name], options)
    if with_states and (origin is None or origin.states is not None):
        with _noted(notes, f"HSIC{under}"):
            found.states = _states(model, examples, options)
    return found


def _margins(
    model: nn.Module, pairs: list[tuple[Example, Example]], options: Mapping[str, Any]
) -> Margins:
    found = response_margins(model, pairs, **options)
    bad = int((~found.values.isfinite()).sum())
    if bad:
        raise ValueError(
            f"log-probabilities must be finite, got others for {bad} of {len(pairs)} pairs; "
            "another dtype may hold them"
        )
    return found


def _perplexity(
    model: nn.Module, examples: list[Example], options: Mapping[str, Any]
) -> Perplexity:
    found = perplexity(model, examples, **options)
    if not isfinite(found.value):
        raise ValueError(
            f"perplexity must be finite, got {found.value}; another dtype may hold the "
            "log-probabilities"
        )
    return found


def _states(
    model: nn.Module, examples: MeasuringSet, options: Mapping[str, Any]
) -> dict[str, Tensor] | None:
    """The last prompt token's hidden states, of equally many prompts of either coupled set."""
    count = min(len(examples.pairs[topic]) for topic in examples.coupled)
    if count < _FEWEST_STATES:
        return None
    return {
        topic: last_token_states(
            model, prompts_only([safe for safe, _ in examples.pairs[topic][:count]]), **options
        )
        for topic in examples.coupled
    }


def _margin_table(
    topic: str,
    before: Margins,
    after: Mapping[str, _Figures],
    masks: Mapping[str, NeuronMask],
    seed: int,
) -> dict[str, Any]:
    interval = margin_interval(before, seed=seed)
    return {
        "pairs": len(before),
        # What the intervals count: pairs of one prompt are one unit.
        "n": interval.n,
        "unit": before.unit,
        "confidence": interval.confidence,
        "interval_method": interval.method,
        "share_positive": before.share_positive,
        "origin": {"mean": interval.mean, "low": interval.low, "high": interval.high},
        "masks": {
            name: {
                **compare_margins(before, figures.margins[topic], seed=seed).to_dict(),
                "share_positive": figures.margins[topic].share_positive,
                "weights": len(masks[name]),
            }
            for name, figures in after.items()
            if topic in figures.margins
        },
    }


def _perplexity_table(
    of: str,
    before: Perplexity,
    after: Mapping[str, _Figures],
    seed: int,
    notes: list[str],
    *,
    alone: bool,
) -> dict[str, Any]:
    rows = {}
    where = "" if alone else f" on {of}"
    for name, figures in after.items():
        found = figures.perplexity.get(of)
        if found is None:
            continue
        # A ratio can overflow where neither perplexity does.
        with _noted(notes, f"Perplexity{where} under {name!r}"):
            change = compare_perplexity(before, found, seed=seed).to_dict()
            rows[name] = {"value": found.value, "ratio": change.pop("mean"), **change}
    return {
        "set": of,
        "text": f"targets of the {of} rows that are measured on",
        "n": len(before.token_counts),
        "tokens": before.tokens,
        "origin": before.value,
        "masks": rows,
    }


def _hsic_table(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], sets: tuple[str, str], seed: int
) -> dict[str, Any]:
    layers_before = layer_dependence(
        *(before[name] for name in sets), permutations=_PERMUTATIONS, seed=seed, **_HSIC
    )
    layers_after = layer_dependence(*(after[name] for name in sets), **_HSIC)
    return {
        **_HSIC,
        "sets": list(sets),
        "n": layers_before[0].n,
        "permutations": _PERMUTATIONS,
        "pairing": "by position in the shuffled sources; the prompts are unrelated, so the pairing "
        "is arbitrary",
        "layers": [
            {
                "layer": number,
                "before": was.value,
                "after": now.value,
                "null_low": was.null_low,
                "null_high": was.null_high,
            }
            for number, (was, now) in enumerate(zip(layers_before, layers_after, strict=True))
        ],
    }


@contextmanager
def _noted(notes: list[str], what: str) -> Iterator[None]:
    """A figure that cannot be taken is reported; it must not cost the others of a long run."""
    try:
        yield
    except ValueError as error:
        notes.append(f"{what} was not measured: {error}.")
