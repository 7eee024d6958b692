"""A model that gives NaN or infinity is refused: a comparison with NaN is no preference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastdean.models.model_state import unwrap


def require_finite(
    model: nn.Module, outputs: Tensor, name: Callable[[int], str] = "row {}".format
) -> None:
    """Raise ValueError for NaN or infinity, with the model and the first such row.

    Args:
        outputs: [n, ...], the model's numbers for each of n rows.
        name: of a row, from its number counted from 1.
    """
    bad = (~torch.isfinite(outputs)).nonzero()
    if not len(bad):
        return
    first, value = int(bad[0, 0]), float(outputs[tuple(bad[0])])
    raise ValueError(
        f"model must give finite numbers, got {value} from {type(unwrap(model)).__name__} for "
        f"{name(first + 1)}; look for NaN in its weights, or load it in float32"
    )
