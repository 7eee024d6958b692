"""What autograd is told of writes that went through a pointer."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def increment_versions(tensors: Sequence[torch.Tensor]) -> None:
    """Tells autograd of writes that it could not see."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:
        # Inference tensors carry no version counter; no harm in telling the others twice.
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])
