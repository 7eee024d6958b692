"""Expert importance: acc[E, R, C], every example's product at each expert its tokens were sent to.

64 experts of 2048 x 1408, 8 for each token. Operations: 2 R C per token and expert it was sent to.
Bytes: x and g of those pairs, and the accumulator of every expert with tokens, read and written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness import lengths
from benchmarks.harness.cases import Case, Contender, implementation, norm_error, product
from fastdean.ops import accumulate_expert_importance_, accumulate_importance_

OP = "expert_importance"
SHAPE, EXAMPLES = (64, 8, 2048, 1408), (32, 8)  # experts, those of a token, outputs, inputs
TOY_SHAPE, TOY_EXAMPLES = (6, 2, 20, 12), (2,)
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Inputs:
    """acc fp32 [E, R, C], x [N, C], g [N, R], rows sorted by expert, and for each by example.

    Attributes:
        segments: int64 [S, 2], rows of one example's tokens at one expert; none is empty.
        experts: int64 [S], ascending.
        spans: (expert, start, end) of each segment, as Python numbers.
        groups: per expert with tokens its number and its examples' segments on the CPU.
    """

    acc: Tensor
    x: Tensor
    g: Tensor
    segments: Tensor
    experts: Tensor
    spans: tuple[tuple[int, int, int], ...]
    groups: tuple[tuple[int, Tensor], ...]


def cases(toy: bool) -> Iterator[Case]:
    for examples in TOY_EXAMPLES if toy else EXAMPLES:
        yield case(*(TOY_SHAPE if toy else SHAPE), examples)


def case(experts: int, active: int, rows: int, columns: int, examples: int) -> Case:
    counts = torch.tensor([length.tokens for length in lengths.beavertails(examples)])
    tokens = int(counts.sum())
    segments, numbers = _routed(counts, experts, active)
    pairs = tokens * active
    groups = tuple((each, segments[numbers == each]) for each in numbers.unique().tolist())
    spans = tuple(zip(numbers.tolist(), *segments.T.tolist(), strict=True))

    def make(generator: torch.Generator) -> Inputs:
        options = {"generator": generator, "device": generator.device}
        return Inputs(
            acc=torch.rand(experts, rows, columns, **options).mul_(8),
            x=torch.randn(pairs, columns, **options).to(DTYPE),
            g=torch.randn(pairs, rows, **options).to(DTYPE),
            segments=segments.to(generator.device),
            experts=numbers.to(generator.device),
            spans=spans,
            groups=groups,
        )

    op, by_expert = "accumulate_expert_importance_", "triton, expert by expert"
    return Case(
        OP,
        f"{experts} experts of {rows} x {columns}, {active} for each of {tokens} tokens, "
        f"{examples} examples of BeaverTails' lengths",
        "bf16",
        settings={
            "experts": experts,
            "active": active,
            "rows": rows,
            "columns": columns,
            "examples": examples,
            "tokens": tokens,
            "segments": len(segments),
        },
        operations=2 * pairs * rows * columns,
        bytes=pairs * (rows + columns) * DTYPE.itemsize + 8 * len(groups) * rows * columns,
        inputs=make,
        expected=expected,
        error=norm_error,
        contenders=(
            implementation(op, "triton", _ours),
            # The reference brings the routing to the host.
            implementation(op, "reference", _ours, capturable=False),
            implementation("accumulate_importance_", "triton", _expert_by_expert, by_expert),
            Contender("mm per segment", _mm_loop),
        ),
        floor=Contender("plain product", _plain_product, prepare=_plain_operands),
    )


def _routed(counts: Tensor, experts: int, active: int) -> tuple[Tensor, Tensor]:
    """(segments, experts) of examples with `counts` tokens: every token goes to `active` different
    experts, all alike; the same every time."""
    generator = torch.Generator().manual_seed(experts)
    owner = torch.arange(len(counts)).repeat_interleave(counts)
    picked = torch.rand(len(owner), experts, generator=generator).topk(active).indices
    pair = (picked * len(counts) + owner[:, None]).flatten()
    kinds, sizes = pair.unique(return_counts=True)
    ends = sizes.cumsum(0)
    return torch.stack([ends - sizes, ends], 1), kinds // len(counts)


def expected(inputs: Inputs) -> Tensor:
    result = inputs.acc.double()
    for expert, start, end in inputs.spans:
        result[expert] += (inputs.g[start:end].double().T @ inputs.x[start:end].double()).abs_()
    return result


def _ours(impl: str, inputs: Inputs) -> Tensor:
    return accumulate_expert_importance_(
        inputs.acc, inputs.x, inputs.g, inputs.segments, inputs.experts, impl=impl
    )


def _expert_by_expert(impl: str, inputs: Inputs) -> Tensor:
    """The op for one matrix, once for every expert."""
    for expert, segments in inputs.groups:
        accumulate_importance_(inputs.acc[expert], inputs.x, inputs.g, segments, impl=impl)
    return inputs.acc


def _mm_loop(inputs: Inputs) -> Tensor:
    buffer = torch.empty_like(inputs.acc[0])
    for expert, start, end in inputs.spans:
        product(inputs.g[start:end].T, inputs.x[start:end], out=buffer)
        inputs.acc[expert].add_(buffer.abs_())
    return inputs.acc


def _plain_operands(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The same rows, dealt out evenly (less a remainder below one row an expert)."""
    experts = len(inputs.acc)
    each = len(inputs.x) // experts
    g, x = (flat[: each * experts].unflatten(0, (experts, each)) for flat in (inputs.g, inputs.x))
    return g.transpose(1, 2), x, torch.empty_like(inputs.acc, dtype=DTYPE)


def _plain_product(operands: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The weight gradients of all experts, all examples together, as training computes them."""
    g, x, out = operands
    return torch.bmm(g, x, out=out)
