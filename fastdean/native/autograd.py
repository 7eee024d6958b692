"""Version counters of tensors that were written through a pointer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def increment_versions(tensors: Sequence[Tensor]) -> None:
    """Tells autograd of writes that it could not see."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:
        # Inference tensors have no version counter. To count the others twice does no harm.
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])
