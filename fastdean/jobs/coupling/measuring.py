"""What the masks of a run change in its model, as tables of plain numbers with their noise.

Every figure is taken on the model as it came and again under every mask, on the same examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from fastdean.evaluation import Margins, Perplexity, layer_dependence, margin_interval
from fastdean.jobs.coupling.comparing import Changes, compared, family_of
from fastdean.jobs.coupling.figures import Figures, MeasuringSet, figures_of, noted
from fastdean.jobs.coupling.general_grid import GeneralGrid, grid_table
from fastdean.masks import NeuronMask
from fastdean.models.forward import label_shift

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
) -> tuple[dict[str, Any], list[str]]:
    """Margins and perplexity under every mask, HSIC of the hidden states under the main one.

    Masked language models have neither margins nor a perplexity here: they see the tokens they
    would be asked about.

    Args:
        masks: rule -> mask; one without weights is not measured. The model is restored after each.
        rule: the main one.
        timed: `timed(name)` is entered around each model's measurement.
        grid: masks of other general ratios, which are measured as well.
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
    family = family_of(examples, len(after))
    alone = len(examples.texts) == 1
    changes = compared(origin, after, family, seed, notes, alone=alone)

    results: dict[str, Any] = {
        "margins": {
            topic: _margin_table(topic, margins, changes, after, masks, seed)
            for topic, margins in origin.margins.items()
        }
    }
    if family.tests and (origin.margins or origin.perplexity):
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
