"""How many tokens a batch may have beside a model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastdean.data.batching import default_tokens_per_batch
from fastdean.models.experts.fused import chosen_experts, fused_experts
from fastdean.models.model_state import (
    input_device,
    text_config,
    weight_of,
)


def tokens_per_batch_of(model: nn.Module, device: torch.device | None = None) -> int:
    """How many tokens of this model go through one forward pass by default.

    Args:
        device: where it would compute; None: where it does.
    """
    matrices = ((weight.shape[0], weight.shape[1]) for weight in matrices_of(model))
    head = _head_of(model)
    size = None if head is None else tuple(head.shape)
    device = input_device(model) if device is None else device
    return default_tokens_per_batch(device, (m for m in matrices if m != size), _stacks_of(model))


def _stacks_of(model: nn.Module) -> Iterator[tuple[int, int, int, int]]:
    """Of the stacked weights of experts how many there are, how many a token goes through, and
    outputs and inputs of each."""
    chosen = chosen_experts(text_config(model))
    for module in model.modules():
        fused = fused_experts(module)
        if fused is None:
            continue
        for leaf in fused.weights:
            number, *sizes = weight_of(module, leaf).shape
            outputs, inputs = reversed(sizes) if fused.transposed else sizes
            # Some are given every token, with zeros for those that others were chosen for.
            through = min(chosen or number, number) if fused.routed else number
            yield number, through, outputs, inputs


def matrices_of(model: nn.Module) -> Iterator[Tensor]:
    """The two-dimensional parameters that tokens are multiplied with.

    All but the tables of embeddings, of which one may be the head as well.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    tables.discard(id(_head_of(model)))
    for weight in model.parameters():
        if weight.dim() == 2 and id(weight) not in tables:
            yield weight


def _head_of(model: nn.Module) -> Tensor | None:
    """The weight that makes the logits, as far as the model says."""
    return getattr(getattr(model, "get_output_embeddings", lambda: None)(), "weight", None)
