"""Autograd is told of writes that it could not see: through a pointer, or by a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def note_writes(tensors: Sequence[Tensor]) -> None:
    """Count up the version of each tensor, by which autograd knows that its values changed."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:
        # Inference tensors have no version counter. To count the others twice does no harm.
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])
