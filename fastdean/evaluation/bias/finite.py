"""That what a model gave are numbers: no comparison with NaN may become a preference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastdean.models.model_state import unwrap


def require_finite(
    model: nn.Module, found: Tensor, name: Callable[[int], str] = "row {}".format
) -> None:
    """Raise ValueError, naming the model and the first such row, for NaN or infinity in `found`.

    Args:
        found: [n, ...], what the model gave for each of n rows.
        name: of a row, from its number counted from 1.
    """
    bad = ~torch.isfinite(found).flatten(1 if found.dim() > 1 else 0)
    rows = bad.any(1) if found.dim() > 1 else bad
    if not bool(rows.any()):
        return
    first = int(rows.nonzero()[0])
    value = float(found[first][~torch.isfinite(found[first])].flatten()[0])
    raise ValueError(
        f"model must give finite numbers, got {value} from {type(unwrap(model)).__name__} for "
        f"{name(first + 1)}; look for NaN in its weights, or load it in float32"
    )
