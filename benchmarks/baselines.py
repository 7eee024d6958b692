"""What `fastdean.score` is measured against: the same sums, computed by plain training-style loops.

Both return what `score` keeps: parameter name -> sum over examples of |dL/dW|, before the product
with |W|. Causal language models only.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdean.data import IGNORE_INDEX, Example
from fastdean.model_state import input_device
from fastdean.targets import Target


def published_sums(
    model: nn.Module, examples: Sequence[Example], targets: Sequence[Target]
) -> dict[str, Tensor]:
    """The procedure of DEAN's released code: one layer at a time over all examples.

    One example per backward, the model's own `labels=` loss, sums in the dtype of the weight. Only
    the layer's target weights require a gradient, so autograd itself leaves out the backward pass
    below the layer.
    """
    device = input_device(model)
    sums: dict[str, Tensor] = {}
    for layer in sorted({target.layer_index for target in targets}):
        with _only_trainable(model, [t for t in targets if t.layer_index == layer]) as weights:
            sums |= {name: torch.zeros_like(weight) for name, weight in weights.items()}
            for example in examples:
                ids, labels = (row.to(device)[None] for row in (example.input_ids, example.labels))
                model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
                for name, weight in weights.items():
                    sums[name] += weight.grad.abs()
                    weight.grad = None
    return sums


def loop_sums(
    model: nn.Module, examples: Sequence[Example], targets: Sequence[Target]
) -> dict[str, Tensor]:
    """The best plain loop we know: all targets in one pass, one example per backward, no padding.

    Nothing but the targets requires a gradient, logits are computed at target rows only where the
    model offers it (`logits_to_keep`), `.grad` is reused for the absolute value, and sums are fp32.
    """
    device = input_device(model)
    with _only_trainable(model, targets) as weights:
        sums = {
            name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()
        }
        for example in examples:
            _loss(model, example, device).backward()
            for name, weight in weights.items():
                sums[name] += weight.grad.abs_()
                weight.grad = None
    return sums


def _loss(model: nn.Module, example: Example, device: torch.device) -> Tensor:
    """Cross-entropy in nats, mean over the example's targets."""
    ids, labels = example.input_ids.to(device), example.labels.to(device)[1:]
    rows = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=rows).logits[0]
    else:
        logits = model(input_ids=ids[None], use_cache=False).logits[0, rows]
    return functional.cross_entropy(logits.float(), labels[rows])


@contextmanager
def _only_trainable(
    model: nn.Module, targets: Sequence[Target]
) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, only the targets' weights require a gradient; the flags come back afterwards."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    weights = {target.parameter: target.module.weight for target in targets}
    try:
        model.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        yield weights
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
        for weight in weights.values():
            weight.grad = None
