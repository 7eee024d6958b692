"""The class of the representation at each position of a batch."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fastdean.collapse.classes import CollapseClasses
from fastdean.collapse.matching import at_offset
from fastdean.data.examples import IGNORE_INDEX
from fastdean.default_device import cpu_by_default
from fastdean.models.label_shift import label_shift
from fastdean.models.model_state import unwrap

Shift = Literal["next", "same", "published"]

_NO_TOKEN = -1


def check_shift(shift: Shift) -> Shift:
    """Raise ValueError for an unknown shift."""
    if shift not in get_args(Shift):
        raise ValueError(
            f"shift must be one of {', '.join(get_args(Shift))}, got {shift!r}; default_shift "
            "gives the one that fits a model"
        )
    return shift


@cpu_by_default
def default_shift(model: nn.Module) -> Shift:
    """ "next" for causal language models, "same" for masked ones.

    Raises:
        ValueError: as `label_shift`.
    """
    otherwise = f"pass shift=, one of {', '.join(get_args(Shift))}"
    return "next" if label_shift(unwrap(model), otherwise) else "same"


def position_labels(
    classes: CollapseClasses,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    shift: Shift,
) -> Tensor:
    """The class of the representation at each position, without waiting for the device.

    A representation stands for the token it predicts:

    - "next": the token at t + 1, where both positions are inside the attention mask. `labels` are
      ignored, so that prompts count too. Texts packed into one row without padding between them
      are read as one text.
    - "same": the token at t, inside the mask, or the id in `labels` that a mask token hides.
    - "published": `input_ids` at t + 1, whatever the model, the mask and the labels are.

    A word of several pieces counts only if all of them are inside the mask of one row.

    Args:
        input_ids: integers [B, T].
        attention_mask: [B, T], 0 on padding; None: no padding.
        labels: integers [B, T], -100 where nothing is predicted.
        shift: see above; `default_shift` gives it for a model.
    Returns:
        int64 [B, T], 0..K-1 or -1, on the device of `input_ids`.
    Raises:
        ValueError: an unknown shift, or shapes that differ.
        TypeError: ids that are not integers.
    Source: the code of arXiv 2410.04472 does "published", also for bidirectional models.
    """
    check_shift(shift)
    for name, tensor in (("attention_mask", attention_mask), ("labels", labels)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(
                f"{name} must have the shape of input_ids, {list(input_ids.shape)}, got "
                f"{list(tensor.shape)}; pass one value for each token"
            )
    if shift == "published":
        return at_offset(classes.labels(input_ids), 1)
    ids = input_ids
    if shift == "same" and labels is not None:
        ids = torch.where(labels != IGNORE_INDEX, labels, ids)
    inside = None if attention_mask is None else attention_mask != 0
    found = classes.labels(ids if inside is None else torch.where(inside, ids, _NO_TOKEN))
    if shift == "same":
        return found
    found = at_offset(found, 1)
    return found if inside is None else torch.where(inside, found, -1)
