"""What a training is judged by besides bias: collapse and fluency, on nothing it was trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from experiments.debias.subject import Subject
from fastdean.collapse import collapse_metrics
from fastdean.data.examples import IGNORE_INDEX, Example, encode
from fastdean.evaluation import perplexity
from fastdean.models.label_shift import label_shift

UNC3, NC3 = "(U)NC3, std", "NC3, mean"
PERPLEXITY, MASKED_LOSS = "perplexity of held-out text", "masked loss of held-out text"
_HIDDEN_SHARE = 0.15
_SEED = 19


class Figure(NamedTuple):
    """`value`: None where it could not be measured, or is infinite; `neutral`: what an unbiased
    model has; None where there is no such value."""

    value: float | None
    unit: str = ""
    neutral: float | None = None


def metrics_of(figures: Mapping[str, Figure]) -> dict[str, dict[str, Any]]:
    """What a record holds of figures by name."""
    finite = {
        name: figure.value if figure.value is not None and math.isfinite(figure.value) else None
        for name, figure in figures.items()
    }
    return {
        "figures": finite,
        "units": {name: figure.unit for name, figure in figures.items()},
        "neutral": {name: figure.neutral for name, figure in figures.items()},
    }


def held_out_figures(subject: Subject) -> dict[str, Figure]:
    """Of the subject's model, on the rows held out, always in the same order.

    Collapse is that of the gender words, whatever words were regularised.
    """
    model, examples = subject.model, encode(subject.held_out, subject.tokenizer)
    options: dict[str, Any] = {"shift": subject.shift, "progress": False}
    collapse = collapse_metrics(model, examples, subject.words(), **options).values
    found = {
        UNC3: Figure(collapse["unc3_std"].value),
        NC3: Figure(collapse["nc3_mean"].value),
    }
    if label_shift(model) == 1:
        found[PERPLEXITY] = Figure(perplexity(model, examples, progress=False).value)
    else:
        hidden = with_hidden_tokens(examples, subject.tokenizer)
        loss = perplexity(model, hidden, progress=False).nll_per_token
        found[MASKED_LOSS] = Figure(loss, "nats")
    return found


def with_hidden_tokens(examples: Sequence[Example], tokenizer: Any) -> list[Example]:
    """Each text with 15 % of its own tokens masked, at least one; always the same ones."""
    generator = torch.Generator().manual_seed(_SEED)
    special = torch.tensor(tokenizer.all_special_ids)
    found = []
    for example in examples:
        places = (~torch.isin(example.input_ids, special)).nonzero().squeeze(1)
        order = torch.randperm(len(places), generator=generator)
        chosen = places[order[: max(1, round(_HIDDEN_SHARE * len(places)))]]
        shown, labels = example.input_ids.clone(), torch.full_like(example.labels, IGNORE_INDEX)
        shown[chosen] = tokenizer.mask_token_id
        labels[chosen] = example.input_ids[chosen]
        found.append(Example(shown, labels))
    return found
