"""`score` as a case: who computes its sums, and the work that none of them can avoid.

A run takes (2 + 2) P T + 2 P_target T operations. Left out, so that the floor stays one: the
products of attention itself, everything elementwise, the embedding's lookup.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

import fastdean
from benchmarks.harness.cases import Case, Contender
from benchmarks.harness.rates import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT
from benchmarks.score.baselines import loop_sums, published_sums, vmap_sums
from fastdean.coupling.targets.finding import find_targets
from fastdean.data.examples import Example
from fastdean.models.batch_size import tokens_per_batch_of

NAMES = ("published", "loop", "vmap", "fastdean")


def score_case(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    target_modules: str | Sequence[str] = "mlp",
    layers: int = 2,
    contenders: Collection[str] = NAMES,
    vmap_examples: int = 4,
    tokens_per_batch: int | None = None,
    op: str = "score",
    name: str = "score",
    dtype: str = "fp32",
    model_name: str = "",
) -> Case:
    """`score` on a causal language model against its baselines.

    Args:
        layers: how many layers the layer-at-a-time procedure is run on; see `spread`.
        vmap_examples: of how many examples `torch.func.vmap` holds the gradients at a time.
        tokens_per_batch: of `score`; None: its default.
    """
    targets = find_targets(model, target_modules)
    if any(target.layer_index is None for target in targets):
        raise ValueError(
            f"targets must lie in the decoder layers, got {target_modules!r}; "
            "leave out what the layer-at-a-time procedure cannot reach"
        )
    scored_layers = sorted({target.layer_index for target in targets})
    measured = spread(scored_layers, layers)
    some = [target for target in targets if target.layer_index in measured]

    options = {"target_modules": target_modules, "tokens_per_batch": tokens_per_batch}
    part = f"{len(measured)} of {len(scored_layers)} layers"
    every = [
        Contender(
            "published",
            lambda chosen: published_sums(model, chosen, some),
            scale=len(scored_layers) / len(measured),
            extrapolated=None if len(measured) == len(scored_layers) else part,
        ),
        Contender("loop", lambda chosen: loop_sums(model, chosen, targets)),
        Contender("vmap", lambda chosen: vmap_sums(model, chosen, targets, vmap_examples)),
        Contender("fastdean", lambda chosen: our_sums(model, chosen, **options), ours=True),
    ]
    matrices = find_targets(model, "all")
    head = model.get_output_embeddings().weight
    # Of the lowest scored layer and of all above it: what has gradients of activations.
    above = [target for target in matrices if target.layer_index >= scored_layers[0]]
    tokens, target_tokens, rows, products = first_products(model, examples, tokens_per_batch)
    for kind, group in ((FORWARD, matrices), (INPUT_GRADIENT, above), (WEIGHT_GRADIENT, targets)):
        products.update((kind, each.num_outputs, each.num_inputs, rows) for each in group)
    entries = [
        sum(target.module.weight.numel() for target in group)
        for group in (matrices, above, targets)
    ]
    return Case(
        op,
        name,
        dtype,
        settings={
            "model": model_name,
            "examples": len(examples),
            "tokens": tokens,
            "target_tokens": target_tokens,
            # What the result itself takes.
            "sums_bytes": 4 * entries[2],
        },
        operations=2 * sum(entries) * tokens + 4 * head.numel() * target_tokens,
        # Every weight read once.
        bytes=targets[0].module.weight.element_size() * (entries[0] + head.numel()),
        products=products,
        contenders=tuple(each for each in every if each.name in contenders),
    )


def first_products(
    model: nn.Module, examples: Sequence[Example], tokens_per_batch: int | None = None
) -> tuple[int, int, int, Counter[tuple[str, int, int, int]]]:
    """(tokens, those to predict from, rows of a batch, the head's products of one)."""
    tokens = sum(map(len, examples))
    target_tokens = sum(example.num_targets(shift=1) for example in examples)
    rows = min(tokens, tokens_per_batch or tokens_per_batch_of(model))
    # Only rows that have to predict a target pass through the head.
    head_rows = max(1, round(rows * target_tokens / tokens))
    size = (*model.get_output_embeddings().weight.shape, head_rows)
    return tokens, target_tokens, rows, Counter((kind, *size) for kind in (FORWARD, INPUT_GRADIENT))


def our_sums(model: nn.Module, examples: Sequence[Example], **options: Any) -> Mapping[str, Tensor]:
    scores = fastdean.score(model, examples, **options, progress=False)
    return {parameter: entry.sums for parameter, entry in scores.entries.items()}


def spread(layers: Sequence[int], count: int) -> list[int]:
    """`count` of the layers (at most all), evenly spaced from the first to the last.

    The backward pass of a layer-at-a-time run ends at its layer, so its cost falls linearly with
    depth; the mean over layers that lie symmetrically about the middle is then the mean over all.
    """
    if count < 2:
        raise ValueError(
            f"layers must be at least 2, got {count}; "
            "the cost depends on depth, so one layer says nothing about the others"
        )
    count = min(count, len(layers))
    step = (len(layers) - 1) / max(1, count - 1)
    return [layers[round(i * step)] for i in range(count)]
