"""What a training is judged by: collapse, fluency and bias, on nothing that was trained on."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from experiments.debias.subject import Subject
from fastdean.collapse import collapse_metrics
from fastdean.data.examples import IGNORE_INDEX, Example, encode
from fastdean.evaluation import perplexity
from fastdean.evaluation.bias import bec_pro_rows
from fastdean.evaluation.bias.bec_pro import TEMPLATES
from fastdean.evaluation.bias.crows_pairs import BIAS_TYPES
from fastdean.evaluation.bias.occupations import PERSONS
from fastdean.evaluation.bias.rows import Row, benchmark_rows
from fastdean.jobs.bias import MEASURES, results_of
from fastdean.models.forward import label_shift

UNC3, NC3 = "(U)NC3, std", "NC3, mean"
PERPLEXITY, MASKED_LOSS = "perplexity of held-out text", "masked loss of held-out text"
_GENDER = "gender"
_HIDDEN_SHARE = 0.15
_SEED = 19
# Intervals over examples are not shown: the ones that count here are over seeds.
_RESAMPLES = 100


class Figure(NamedTuple):
    """`value`: None where it could not be measured, or is infinite; `neutral`: what an unbiased
    model has; None where there is no such value."""

    value: float | None
    unit: str = ""
    neutral: float | None = None


class HeldOut:
    """Callable: model -> its figures by name, always in the same order.

    Collapse is that of the gender words, whatever words were regularised.

    Args:
        asked: bias measures, "name" or "name=FILE", as `fastdean debias` takes them.
        rows: at most so many of BEC-Pro's own sentences, and of the gender pairs of CrowS-Pairs.
    """

    def __init__(self, subject: Subject, asked: Sequence[str], rows: int) -> None:
        self._tokenizer = subject.tokenizer
        self._classes = subject.words()
        self.examples = encode(subject.held_out, subject.tokenizer)
        self._hidden = _with_hidden_tokens(self.examples, subject.tokenizer)
        parts = [entry.partition("=") for entry in asked]
        self._bias = [(name, bias_source(name, file or None, rows)) for name, _, file in parts]

    def __call__(self, model: nn.Module) -> dict[str, Figure]:
        collapse = collapse_metrics(model, self.examples, self._classes, progress=False).values
        found = {UNC3: (collapse["unc3_std"].value,), NC3: (collapse["nc3_mean"].value,)}
        if label_shift(model) == 1:
            found[PERPLEXITY] = (perplexity(model, self.examples, progress=False).value,)
        else:
            loss = perplexity(model, self._hidden, progress=False).nll_per_token
            found[MASKED_LOSS] = (loss, "nats")
        for name, source in self._bias:
            arguments = [] if source is None else [source]
            options = {"resamples": _RESAMPLES, "progress": False}
            measured = MEASURES[name][0](model, self._tokenizer, *arguments, **options)
            for each in results_of(measured):
                found[each.name] = (each.value, each.unit, each.neutral)
        return {name: Figure(_finite(value), *rest) for name, (value, *rest) in found.items()}


def bias_source(name: str, file: str | None, rows: int) -> Any:
    """What a measure is given: rows, the file as it is, or None for the measure's own default."""
    if name == "crows_pairs":
        return _gender_pairs(file or "nyu-mll/crows_pairs", rows)
    if name == "bec_pro" and file is None:
        return bec_pro_subset(rows)
    return file


def bec_pro_subset(limit: int) -> list[dict[str, str]]:
    """BEC-Pro's own sentences, with every occupation and both genders, at most `limit`.

    Whole combinations of a template and a pair of persons, in an order that mixes both.
    """
    combinations = list(itertools.product(TEMPLATES, PERSONS))
    each = len(bec_pro_rows(templates=TEMPLATES[:1], persons=PERSONS[:1]))
    if limit < each:
        raise ValueError(
            f"bias-rows must be at least {each}, a sentence of each gender for every occupation of "
            f"BEC-Pro, got {limit}; pass more, or other measures with --bias"
        )
    random.Random(_SEED).shuffle(combinations)
    return [
        row
        for template, pair in combinations[: limit // each]
        for row in bec_pro_rows(templates=[template], persons=[pair])
    ]


def _gender_pairs(source: str, limit: int) -> list[Row]:
    # The hub's copy holds numbers in place of names.
    names = (_GENDER, BIAS_TYPES.index(_GENDER))
    found = [row for row in benchmark_rows(source, split="test") if row.get("bias_type") in names]
    if not found:
        raise ValueError(
            f"crows_pairs must have pairs of bias_type {_GENDER!r}, got none in {source}; give the "
            "benchmark's own file"
        )
    return found[:limit]


def _with_hidden_tokens(examples: Sequence[Example], tokenizer: Any) -> list[Example]:
    """Each text with 15 % of its own tokens masked, at least one; always the same ones.

    Empty where the tokenizer has no mask token.
    """
    if tokenizer.mask_token_id is None:
        return []
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


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
