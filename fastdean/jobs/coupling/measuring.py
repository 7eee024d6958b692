"""What the masks of a run change in its model, as tables of plain numbers with their noise.

Every figure is taken on the model as it came and again under every mask, on the same examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from fastdean.evaluation import (
    Interval,
    Margins,
    Perplexity,
    compare_yes_no,
    layer_dependence,
    margin_interval,
    refuses,
)
from fastdean.evaluation.answers.records import ORIGINAL, Answered
from fastdean.evaluation.judging.beside import answers_table
from fastdean.evaluation.statistics.families import Change
from fastdean.jobs.bias import changes as bias_changes
from fastdean.jobs.bias import figures as bias_figures
from fastdean.jobs.coupling.asked import Asked
from fastdean.jobs.coupling.comparing import Changes, compared, family_of
from fastdean.jobs.coupling.figures import Figures, MeasuringSet, figures_of, noted
from fastdean.jobs.coupling.general_grid import GeneralGrid, grid_table
from fastdean.masks import NeuronMask
from fastdean.models.label_shift import label_shift

_PERMUTATIONS = 200
_HSIC: Mapping[str, Any] = {"estimator": "unbiased", "kernel": "gaussian", "bandwidth": "median"}


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
    grid: GeneralGrid | None = None,
    asked: Asked | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Margins and perplexity under every mask, HSIC of the hidden states under the main one.

    Masked language models have neither margins nor a perplexity here: they see the tokens they
    would be asked about.

    Args:
        masks: rule -> mask; one without weights is not measured. The model is restored after each.
        rule: the main one.
        timed: `timed(name)` is entered around each model's measurement.
        grid: masks of other general ratios, which are measured as well.
        asked: what is measured besides; None: nothing.
    Returns:
        The tables "margins", "perplexity" and "hsic", as far as there are examples for them and the
        model gives numbers, and sentences about what could not be measured. With several sets of
        texts there is a table for each, under "perplexities" in place of "perplexity". "tests" says
        how the tests of margins and perplexity were adjusted for each other; "general_grid" is the
        table of the grid, a family of its own.
    """
    options = {"tokens_per_batch": tokens_per_batch, "progress": progress}
    notes: list[str] = []
    if label_shift(model) == 0:
        notes.append(
            "Margins and perplexity were not measured: a masked language model sees the tokens it "
            "would be asked about."
        )
    with timed("measure unmasked model"):
        origin = figures_of(model, examples, options, notes)
    after = {}
    for name, mask in masks.items():
        if len(mask):
            with timed(f"measure {name} mask"):
                after[name] = figures_of(
                    model, examples, options, notes, mask, repr(name), origin, name == rule
                )
    besides = _Besides.of(asked, model, {n: masks[n] for n in after}, notes, seed)
    family = family_of(examples, len(after), besides.changes)
    alone = len(examples.texts) == 1
    changes = compared(origin, after, family, seed, notes, alone=alone, others=besides.changes)

    results: dict[str, Any] = {
        "margins": {
            topic: _margin_table(topic, margins, changes, after, masks, seed)
            for topic, margins in origin.margins.items()
        }
    }
    results |= besides.tables(changes, family.confidence_of_each)
    if family.tests and (origin.margins or origin.perplexity or besides.changes):
        results["tests"] = family.to_dict()
    tables = {
        name: _perplexity_table(name, found, changes) for name, found in origin.perplexity.items()
    }
    if len(examples.texts) > 1:
        results["perplexities"] = tables
    elif tables:
        (results["perplexity"],) = tables.values()
    states = after[rule].states if rule in after else None
    if origin.states is not None and states is not None:
        with noted(notes, "HSIC"):
            results["hsic"] = _hsic_table(origin.states, states, examples.coupled, seed)
    if grid is not None:
        results["general_grid"] = grid_table(
            grid, model, examples, options, notes, origin, after.get(rule), timed, seed
        )
    return results, notes


# What the change of the share of refusals is called among the others.
_REFUSALS = "refusals"


@dataclass(frozen=True)
class _Besides:
    """What was asked for besides: the figures of each model, and how they changed.

    Attributes:
        origin: of the model as it came.
        changes: by figure and mask.
        after: the figures under each mask, by figure and mask.
        answers: of every model.
    """

    origin: bias_figures.Found
    changes: dict[str, dict[Any, Change]]
    after: dict[str, bias_figures.Found]
    answers: list[Answered]

    @classmethod
    def of(
        cls,
        asked: Asked | None,
        model: nn.Module,
        masks: Mapping[str, NeuronMask],
        notes: list[str],
        seed: int,
    ) -> _Besides:
        if asked is None:
            return cls({}, {}, {}, [])
        taken = asked.figures(model, "origin", notes)
        names = asked.names(taken)
        answers = asked.answers(model, ORIGINAL, notes)
        before = [refuses(each.answer) for each in answers]
        changes: dict[str, dict[Any, Change]] = {}
        found_after: dict[str, bias_figures.Found] = {}
        for name, mask in masks.items():
            under_mask = asked.figures(model, name, notes, mask, taken)
            for figure, (number, title) in names.items():
                after = under_mask.get(number, {}).get(title)
                if after is not None:
                    by_mask = changes.setdefault(figure, {})
                    by_mask[name] = bias_changes.change_of(taken[number][title], after, seed)
                    found_after.setdefault(figure, {})[name] = after
            if answers:
                found = asked.answers(model, name, notes, mask)
                answers = [*answers, *found]
                if len(found) == len(before):
                    by_mask = changes.setdefault(_REFUSALS, {})
                    after_it = [refuses(each.answer) for each in found]
                    by_mask[name] = partial(_refused, before, after_it, seed)
        origin = {figure: taken[number][title] for figure, (number, title) in names.items()}
        return cls(origin, changes, found_after, answers)

    def tables(self, changes: Changes, confidence: float) -> dict[str, Any]:
        """The results "price" and "answers", where they were asked for.

        Args:
            confidence: of each test's interval.
        """
        price = {
            name: {
                "unit": figures["unit"],
                "neutral": figures["neutral"],
                "definition": "; ".join(figures["notes"]),
                "origin": {key: figures[key] for key in ("value", "low", "high", "n")},
                "masks": {
                    mask: change
                    | bias_changes.moved_items(figures, self.after[name][mask], confidence)
                    for mask, change in changes.others.get(name, {}).items()
                },
            }
            for name, figures in self.origin.items()
        }
        found: dict[str, Any] = {"price": price} if price else {}
        if self.answers:
            found["answers"] = answers_table(
                self.answers, changes=changes.others.get(_REFUSALS, {})
            )
        return found


def _refused(before: list[bool], after: list[bool], seed: int, confidence: float) -> Interval:
    return compare_yes_no(before, after, confidence=confidence, seed=seed)


def _margin_table(
    topic: str,
    before: Margins,
    changes: Changes,
    after: Mapping[str, Figures],
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
                **change,
                "share_positive": after[name].margins[topic].share_positive,
                "weights": len(masks[name]),
            }
            for name, change in changes.margins[topic].items()
        },
    }


def _perplexity_table(of: str, before: Perplexity, changes: Changes) -> dict[str, Any]:
    return {
        "set": of,
        "text": f"targets of the {of} rows that are measured on",
        "n": len(before.token_counts),
        "tokens": before.tokens,
        "origin": before.value,
        "masks": changes.perplexity[of],
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
