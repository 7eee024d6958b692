"""Expert importance: acc[E, R, C], every example's product at each expert its tokens were sent to.

64 experts of 2048 x 1408, 8 for each token. Operations: 2 R C per token and expert it was sent to.
Bytes: x and g of those pairs, and the accumulator of every expert with tokens, read and written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness import lengths
from benchmarks.harness.cases import Case, Contender, implementation, norm_error, product
from benchmarks.harness.lengths import Length
from fastdean.ops import accumulate_expert_importance_, accumulate_importance_

OP = "expert_importance"
SHAPE = (64, 8, 2048, 1408)  # experts, experts a token is sent to, outputs, inputs
EXAMPLES = (32, 8)
TOY_SHAPE = (6, 2, 20, 12)
TOY_EXAMPLES = (2,)
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Routing:
    """Rows sorted by expert, and for each expert by example.

    Attributes:
        segments: int64 [S, 2], rows of one example's tokens at one expert; none is empty.
        experts: int64 [S], ascending.
        rows: number of rows.
    """

    segments: Tensor
    experts: Tensor
    rows: int

    @classmethod
    def at_random(cls, chosen: Sequence[Length], experts: int, active: int) -> Routing:
        """Every token goes to `active` different experts, all experts alike; always the same."""
        generator = torch.Generator().manual_seed(experts)
        counts = torch.tensor([length.tokens for length in chosen])
        owner = torch.arange(len(chosen)).repeat_interleave(counts)
        picked = torch.rand(len(owner), experts, generator=generator).topk(active).indices
        pair = (picked * len(chosen) + owner[:, None]).flatten()
        kinds, sizes = pair.unique(return_counts=True)
        ends = sizes.cumsum(0)
        return cls(torch.stack([ends - sizes, ends], 1), kinds // len(chosen), pair.numel())


@dataclass(frozen=True)
class Inputs:
    """acc fp32 [E, R, C], x [N, C], g [N, R]; the routing on their device, and as Python numbers.

    `groups`: per expert with tokens its number and its examples' segments on the CPU.
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
    chosen = lengths.beavertails(examples)
    routing = Routing.at_random(chosen, experts, active)
    reached = int(routing.experts.unique().numel())
    input_bytes = routing.rows * (rows + columns) * DTYPE.itemsize
    tokens = sum(length.tokens for length in chosen)
    return Case(
        op=OP,
        name=(
            f"{experts} experts of {rows} x {columns}, {active} for each of {tokens} tokens, "
            f"{examples} examples of BeaverTails' lengths"
        ),
        dtype="bf16",
        settings={
            "experts": experts,
            "active": active,
            "rows": rows,
            "columns": columns,
            "examples": examples,
            "tokens": tokens,
            "segments": len(routing.segments),
        },
        operations=2 * routing.rows * rows * columns,
        bytes=input_bytes + 8 * reached * rows * columns,
        inputs=_maker(experts, rows, columns, routing),
        input_bytes=input_bytes + 4 * experts * rows * columns,
        expected=expected,
        error=norm_error,
        contenders=(
            implementation("accumulate_expert_importance_", "triton", _ours("triton")),
            # The reference brings the routing to the host.
            implementation(
                "accumulate_expert_importance_",
                "reference",
                _ours("reference"),
                capturable=False,
            ),
            _expert_by_expert("triton"),
            Contender("mm per segment", _mm_loop, needs_bytes=8 * rows * columns),
        ),
        floor=Contender("plain product", _plain_product, prepare=_plain_operands(experts)),
    )


def _maker(experts: int, rows: int, columns: int, routing: Routing) -> Callable[..., Inputs]:
    numbers = routing.experts.tolist()
    spans = tuple(
        (expert, start, end)
        for expert, (start, end) in zip(numbers, routing.segments.tolist(), strict=True)
    )
    groups = tuple(
        (expert, routing.segments[routing.experts == expert]) for expert in sorted(set(numbers))
    )

    def make(generator: torch.Generator) -> Inputs:
        options = {"generator": generator, "device": generator.device}
        return Inputs(
            acc=torch.rand(experts, rows, columns, **options).mul_(8),
            x=torch.randn(routing.rows, columns, **options).to(DTYPE),
            g=torch.randn(routing.rows, rows, **options).to(DTYPE),
            segments=routing.segments.to(generator.device),
            experts=routing.experts.to(generator.device),
            spans=spans,
            groups=groups,
        )

    return make


def expected(inputs: Inputs) -> Tensor:
    result = inputs.acc.double()
    for expert, start, end in inputs.spans:
        result[expert] += (inputs.g[start:end].double().T @ inputs.x[start:end].double()).abs_()
    return result


def _ours(impl: str) -> Callable[[Inputs], Tensor]:
    def run(inputs: Inputs) -> Tensor:
        return accumulate_expert_importance_(
            inputs.acc, inputs.x, inputs.g, inputs.segments, inputs.experts, impl=impl
        )

    return run


def _expert_by_expert(impl: str) -> Contender:
    """The op for one matrix, once for every expert."""

    def run(inputs: Inputs) -> Tensor:
        for expert, segments in inputs.groups:
            accumulate_importance_(inputs.acc[expert], inputs.x, inputs.g, segments, impl=impl)
        return inputs.acc

    return implementation("accumulate_importance_", impl, run, name=f"{impl}, expert by expert")


def _mm_loop(inputs: Inputs) -> Tensor:
    buffer = torch.empty_like(inputs.acc[0])
    for expert, start, end in inputs.spans:
        product(inputs.g[start:end].T, inputs.x[start:end], out=buffer)
        inputs.acc[expert].add_(buffer.abs_())
    return inputs.acc


def _plain_operands(experts: int) -> Callable[[Inputs], tuple[Tensor, Tensor, Tensor]]:
    """The same rows, dealt out evenly (less a remainder below one row an expert)."""

    def prepare(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        each = inputs.x.shape[0] // experts
        g, x = (
            flat[: each * experts].view(experts, each, flat.shape[1])
            for flat in (inputs.g, inputs.x)
        )
        return g.transpose(1, 2), x, torch.empty_like(inputs.acc, dtype=DTYPE)

    return prepare


def _plain_product(operands: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The weight gradients of all experts, all examples together, as training computes them."""
    g, x, out = operands
    return torch.bmm(g, x, out=out)
