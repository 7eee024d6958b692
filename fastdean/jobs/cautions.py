"""What a reader of the second method's figures must be told before they trust them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

# Below this share of the classes in the text, its figures are those of a few words.
_FEW_SEEN = 0.5


def about_classes(classes: int, table: Mapping[str, Any]) -> list[str]:
    """Of the measured text.

    Args:
        classes: how many there are.
        table: of `jobs.collapse.collapse_figures`.
    """
    seen = table["classes seen"]
    if seen == 0:
        return ["None of the words occurs in the measured text: no metric is defined."]
    if seen < _FEW_SEEN * classes:
        return [
            f"Only {seen} of {classes} classes occur in the measured text, in "
            f"{table['tokens of a class']} tokens: the metrics are theirs alone, and have no "
            "interval. Measure on more text."
        ]
    return []


def about_precision(model: nn.Module) -> list[str]:
    """Of a training: whether its steps are kept."""
    dtype = next(model.parameters()).dtype
    if dtype.itemsize >= torch.float32.itemsize:
        return []
    return [
        f"The model was trained in {str(dtype).removeprefix('torch.')}: steps that are small "
        "beside a weight are rounded away. Train in float32."
    ]


def about_regularizer(
    strength: float, control: str | None, history: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Of a training: whether its regulariser had anything to do.

    Args:
        control: "random", "frequency" or None.
        history: of `debias.fine_tune`.
    """
    if strength == 0:
        return []
    said = []
    terms = [entry["collapse"] for entry in history if entry["collapse"] is not None]
    idle = sum(term == 0 for term in terms)
    if terms and idle == len(terms):
        said.append(
            "The regulariser's term was 0 in every step: fewer than two of its words occurred in "
            "the training text. The model was trained as without it."
        )
    elif idle:
        said.append(f"The regulariser's term was 0 in {idle} of {len(terms)} steps.")
    if control is not None:
        said.append(
            f"The regularised words are a control ({control}): what this run changes is not due to "
            "the words that were asked for, whose metrics are shown."
        )
    return said
