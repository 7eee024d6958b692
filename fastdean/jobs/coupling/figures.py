"""What a run measures of one model: margins, perplexity, divergence and hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from torch import Tensor, nn

from fastdean.data.examples import Example
from fastdean.evaluation import (
    Divergence,
    Margins,
    Perplexity,
    last_token_states,
    perplexity,
    perplexity_and_divergence,
    prompts_only,
    response_margins,
)
from fastdean.masks import NeuronMask
from fastdean.models.label_shift import label_shift

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
class Figures:
    """The figures of one model, as far as they could be taken; all finite but the states.

    Attributes:
        divergence: of an edited model, from the one that came.
    """

    margins: dict[str, Margins] = field(default_factory=dict)
    perplexity: dict[str, Perplexity] = field(default_factory=dict)
    divergence: dict[str, Divergence] = field(default_factory=dict)
    states: dict[str, Tensor] | None = None


def figures_of(
    model: nn.Module,
    examples: MeasuringSet,
    options: Mapping[str, Any],
    notes: list[str],
    mask: NeuronMask | None = None,
    name: str = "",
    origin: Figures | None = None,
    with_states: bool = True,
) -> Figures:
    """What can be measured of the model; under a mask, of that what its origin has too.

    Args:
        name: what the notes call the mask.
    """
    under = "" if mask is None else f" under {name}"
    found = Figures()
    with nullcontext() if mask is None else mask.applied(model):
        if label_shift(model) == 1:
            for topic in examples.pairs if origin is None else origin.margins:
                if examples.pairs[topic]:
                    with noted(notes, f"The {topic} margin{under}"):
                        found.margins[topic] = _margins(model, examples.pairs[topic], options)
        if with_states and (origin is None or origin.states is not None):
            with noted(notes, f"HSIC{under}"):
                found.states = _states(model, examples, options)
    if label_shift(model) == 1:
        for text in examples.texts if origin is None else origin.perplexity:
            where = f" on {text}" if len(examples.texts) > 1 else ""
            if examples.texts[text]:
                with noted(notes, f"Perplexity{where}{under}"):
                    _take_perplexity(found, text, model, examples.texts[text], options, mask)
    return found


def _take_perplexity(
    found: Figures,
    text: str,
    model: nn.Module,
    examples: list[Example],
    options: Mapping[str, Any],
    mask: NeuronMask | None,
) -> None:
    if mask is None:
        measured = perplexity(model, examples, **options)
    else:
        measured, moved = perplexity_and_divergence(
            model, examples, edited=lambda: mask.applied(model), **options
        )
        # Infinite where the edit makes a token impossible; the perplexity may still be a number.
        if isfinite(moved.value):
            found.divergence[text] = moved
    if not isfinite(measured.value):
        found.divergence.pop(text, None)
        raise ValueError(
            f"perplexity must be finite, got {measured.value}; another dtype may hold the "
            "log-probabilities"
        )
    found.perplexity[text] = measured


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


@contextmanager
def noted(notes: list[str], what: str) -> Iterator[None]:
    """A figure that cannot be taken is reported; it must not cost the others of a long run."""
    try:
        yield
    except ValueError as error:
        notes.append(f"{what} was not measured: {error}.")
