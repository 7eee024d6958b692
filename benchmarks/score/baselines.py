"""What `fastdean.score` is measured against: the same sums, computed by plain training-style loops.

All return what `score` keeps: parameter name -> sum over examples of |dL/dW|, before the product
with |W|. Causal language models only.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdean.coupling.targets.target import Target
from fastdean.data.examples import IGNORE_INDEX, Example
from fastdean.models.model_state import fresh_leaves, frozen, input_device


def published_sums(
    model: nn.Module, examples: Sequence[Example], targets: Sequence[Target]
) -> dict[str, Tensor]:
    """The procedure of DEAN's released code: one layer at a time over all examples.

    One example per backward, the model's own `labels=` loss, sums in the dtype of the weight.
    Autograd itself leaves out the backward pass below the layer.
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

    Logits are computed at target rows only where the model offers it (`logits_to_keep`), `.grad` is
    reused for the absolute value, and sums are fp32.
    """
    device = input_device(model)
    with _only_trainable(model, targets) as weights:
        sums = {n: torch.zeros_like(w, dtype=torch.float32) for n, w in weights.items()}
        for example in examples:
            _loss(model, example, device).backward()
            for name, weight in weights.items():
                sums[name] += weight.grad.abs_()
                weight.grad = None
    return sums


def vmap_sums(
    model: nn.Module, examples: Sequence[Example], targets: Sequence[Target], chunk: int
) -> dict[str, Tensor]:
    """Per-example gradients of `chunk` examples at a time: `torch.func.vmap` of `grad`, sums fp32.

    All gradients of a chunk lie in memory together, in the weight's dtype. Padding stands on the
    right, where a causal model does not see it. Attention is torch's unfused form, the only one
    that vmap takes without going through the examples one by one.
    """
    device = input_device(model)
    weights = {target.parameter: target.module.weight.detach() for target in targets}
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}

    def loss(weights: Mapping[str, Tensor], ids: Tensor, labels: Tensor) -> Tensor:
        inputs = {
            "input_ids": ids[None],
            "position_ids": torch.arange(ids.numel(), device=device)[None],
            "use_cache": False,
        }
        logits = torch.func.functional_call(model, weights, args=(), kwargs=inputs).logits[0, :-1]
        total = functional.cross_entropy(
            logits.float(), labels[1:], ignore_index=IGNORE_INDEX, reduction="sum"
        )
        return total / (labels[1:] != IGNORE_INDEX).sum()

    gradients_of = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    with frozen(model), sdpa_kernel(SDPBackend.MATH):
        for first in range(0, len(examples), chunk):
            ids, labels = _padded(examples[first : first + chunk], device)
            for name, gradient in gradients_of(weights, ids, labels).items():
                sums[name] += gradient.abs_().sum(0, dtype=torch.float32)
    return sums


def vmap_chunk(weights: Sequence[Tensor]) -> int:
    """How many examples' gradients of these weights fit into the free memory beside their sums,
    with two fifths left to activations and the allocator. On a CPU, where nobody can tell, 4."""
    device = weights[0].device
    if device.type != "cuda":
        return 4
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    entries = sum(weight.numel() for weight in weights)
    return max(0, int((0.6 * free - 4 * entries) / (weights[0].element_size() * entries)))


def _padded(examples: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, labels), [B, T] each; padded labels are no targets."""
    ids, labels = (
        nn.utils.rnn.pad_sequence([getattr(e, name) for e in examples], True, padding)
        for name, padding in (("input_ids", 0), ("labels", IGNORE_INDEX))
    )
    return ids.to(device), labels.to(device)


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
    """Inside, the targets' weights alone require a gradient; outside, the model is as it was."""
    weights = {target.parameter: target.module.weight for target in targets}
    with frozen(model), fresh_leaves(model, list(weights.values())) as leaves:
        yield dict(zip(weights, leaves, strict=True))
