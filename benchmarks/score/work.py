"""`score` as a case: who computes its sums, and the work that none of them can avoid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

import fastdean
from benchmarks.harness.cases import Case, Contender
from benchmarks.harness.rates import MatrixShape
from benchmarks.score.baselines import loop_sums, published_sums, vmap_sums
from fastdean.batching import default_tokens_per_batch
from fastdean.data import Example
from fastdean.model_state import input_device
from fastdean.targets import Target, find_targets


@dataclass(frozen=True)
class ScoreWork:
    """The work of one `score` run: (2 + 2) P T + 2 P_target T operations.

    Left out, so that the floor stays one: attention's own products, everything elementwise, the
    embedding's lookup. Counted a little too high: the backward pass through the lowest scored
    layer, whose inputs need no gradient.

    Attributes:
        tokens: all tokens of all examples.
        target_tokens: rows that have to predict a target; only these pass through the head.
        layer_parameters: entries of the matrices of all decoder layers (forward).
        gradient_parameters: those of the lowest scored layer and of all above it (gradient of
            activations).
        target_parameters: entries of the scored matrices (gradient of weights).
        head_parameters: entries of the output embedding.
        element_bytes: bytes of one weight.
    """

    tokens: int
    target_tokens: int
    layer_parameters: int
    gradient_parameters: int
    target_parameters: int
    head_parameters: int
    element_bytes: int

    @property
    def operations(self) -> int:
        per_token = self.layer_parameters + self.gradient_parameters + self.target_parameters
        return 2 * per_token * self.tokens + 4 * self.head_parameters * self.target_tokens

    @property
    def bytes(self) -> int:
        """Every weight read once."""
        return self.element_bytes * (self.layer_parameters + self.head_parameters)


def score_case(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    target_modules: str | Sequence[str] = "mlp",
    layers: int = 2,
    vmap_examples: int = 0,
    op: str = "score",
    name: str = "score",
    dtype: str = "",
    model_name: str = "",
) -> Case:
    """`score` on a causal language model against its baselines.

    Args:
        layers: how many layers the layer-at-a-time procedure is run on; see `spread`.
        vmap_examples: of how many examples `torch.func.vmap` holds the gradients at a time; 0
            leaves it out.
        op, name, dtype, model_name: of the case.
    Raises:
        ValueError: a target lies outside the decoder layers, or `layers` is below 2.
    """
    targets = find_targets(model, target_modules)
    scored_layers = sorted({t.layer_index for t in targets if t.layer_index is not None})
    if any(target.layer_index is None for target in targets):
        raise ValueError(
            f"targets must lie in the decoder layers, got {target_modules!r}; "
            "leave out what the layer-at-a-time procedure cannot reach"
        )
    measured = spread(scored_layers, layers)
    some = [target for target in targets if target.layer_index in measured]

    def published(chosen: Sequence[Example]) -> Mapping[str, Tensor]:
        return published_sums(model, chosen, some)

    def loop(chosen: Sequence[Example]) -> Mapping[str, Tensor]:
        return loop_sums(model, chosen, targets)

    def vmap(chosen: Sequence[Example]) -> Mapping[str, Tensor]:
        return vmap_sums(model, chosen, targets, vmap_examples)

    def ours(chosen: Sequence[Example]) -> Mapping[str, Tensor]:
        scores = fastdean.score(model, chosen, target_modules=target_modules, progress=False)
        return {parameter: entry.sums for parameter, entry in scores.entries.items()}

    partial = len(measured) < len(scored_layers)
    work = score_work(model, examples, targets)
    return Case(
        op,
        name,
        dtype,
        settings={
            "model": model_name,
            "examples": len(examples),
            "tokens": work.tokens,
            "target_tokens": work.target_tokens,
            "sums_bytes": 4 * work.target_parameters,
        },
        operations=work.operations,
        bytes=work.bytes,
        shapes=matrix_shapes(model, targets, work),
        contenders=(
            Contender(
                "published",
                published,
                scale=len(scored_layers) / len(measured),
                extrapolated=f"{len(measured)} of {len(scored_layers)} layers" if partial else None,
            ),
            Contender("loop", loop),
            *([Contender("vmap", vmap)] if vmap_examples else []),
            Contender("fastdean", ours, ours=True),
        ),
    )


def spread(layers: Sequence[int], count: int) -> list[int]:
    """`count` of the layers (at most all), evenly spaced from the first to the last.

    The backward pass of a layer-at-a-time run ends at its layer, so its cost falls linearly with
    depth; the mean over layers that lie symmetrically about the middle is then the mean over all.

    Raises:
        ValueError: fewer than two are asked for.
    """
    if count < 2:
        raise ValueError(
            f"layers must be at least 2, got {count}; "
            "the cost depends on depth, so one layer says nothing about the others"
        )
    count = min(count, len(layers))
    step = (len(layers) - 1) / max(1, count - 1)
    return [layers[round(i * step)] for i in range(count)]


def score_work(
    model: nn.Module, examples: Sequence[Example], targets: Sequence[Target]
) -> ScoreWork:
    matrices = find_targets(model, "all")
    lowest = min(target.layer_index for target in targets)
    weight = targets[0].module.weight
    return ScoreWork(
        tokens=sum(len(example) for example in examples),
        target_tokens=sum(example.num_targets(shift=1) for example in examples),
        layer_parameters=_entries(matrices),
        gradient_parameters=_entries(m for m in matrices if m.layer_index >= lowest),
        target_parameters=_entries(targets),
        head_parameters=model.get_output_embeddings().weight.numel(),
        element_bytes=weight.element_size(),
    )


def _entries(targets: Iterable[Target]) -> int:
    return sum(target.module.weight.numel() for target in targets)


def matrix_shapes(
    model: nn.Module, targets: Sequence[Target], work: ScoreWork
) -> tuple[MatrixShape, ...]:
    """The distinct products of one batch, as `score` cuts batches by default."""
    rows = min(work.tokens, default_tokens_per_batch(input_device(model)))
    head_rows = max(1, round(rows * work.target_tokens / work.tokens))
    lowest = min(target.layer_index for target in targets)
    matrices = find_targets(model, "all")
    forward = _count(matrices)
    backward = _count(m for m in matrices if m.layer_index >= lowest)
    scored = _count(targets)
    layers = [
        MatrixShape(*size, rows, number, backward[size], scored[size])
        for size, number in sorted(forward.items())
    ]
    head = model.get_output_embeddings().weight
    return (*layers, MatrixShape(head.shape[0], head.shape[1], head_rows, 1, 1, 0))


def _count(targets: Iterable[Target]) -> Counter[tuple[int, int]]:
    return Counter((target.num_outputs, target.num_inputs) for target in targets)
