"""Unit importance: acc[C] += sum_b |sum_t a_t g_t| over one layer's 18944 units.

Bound by memory: bytes are those of a and g, read once; three operations per pair of elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness import lengths
from benchmarks.harness.cases import Case, Contender, compiled, implementation, norm_error
from fastdean.ops import accumulate_unit_importance_

OP = "unit_importance"
SHAPE, TOY_SHAPE = (16384, 18944), (200, 48)
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Inputs:
    """acc fp32 [C]; a, g [N, C]; segments int64 [B, 2] on the CPU; owner int64 [N], a row's b."""

    acc: Tensor
    a: Tensor
    g: Tensor
    segments: Tensor
    owner: Tensor


def cases(toy: bool) -> Iterator[Case]:
    yield case(*(TOY_SHAPE if toy else SHAPE))


def case(tokens: int, units: int) -> Case:
    segments = lengths.segments(lengths.filling(tokens))
    examples = len(segments)

    def make(generator: torch.Generator) -> Inputs:
        options = {"generator": generator, "device": generator.device}
        counts = segments[:, 1] - segments[:, 0]
        return Inputs(
            acc=torch.rand(units, **options).mul_(8),
            a=torch.randn(tokens, units, **options).to(DTYPE),
            g=torch.randn(tokens, units, **options).to(DTYPE),
            segments=segments.clone(),
            owner=torch.arange(examples).repeat_interleave(counts).to(generator.device),
        )

    op = "accumulate_unit_importance_"
    return Case(
        OP,
        f"{tokens} tokens, {units} units, {examples} examples of BeaverTails' lengths",
        "bf16",
        settings={"tokens": tokens, "units": units, "examples": examples},
        operations=3 * tokens * units,
        bytes=2 * tokens * units * DTYPE.itemsize + 8 * units,
        inputs=make,
        expected=expected,
        error=norm_error,
        contenders=(
            *(implementation(op, impl, _ours) for impl in ("triton", "reference")),
            Contender("torch", _computed_by(_expression)),
            Contender("torch.compile", compiled_expression(), compiled=True),
        ),
    )


def expected(inputs: Inputs) -> Tensor:
    result = inputs.acc.double()
    for start, end in inputs.segments.tolist():
        result += (inputs.a[start:end].double() * inputs.g[start:end].double()).sum(0).abs_()
    return result


def _ours(impl: str, inputs: Inputs) -> Tensor:
    return accumulate_unit_importance_(inputs.acc, inputs.a, inputs.g, inputs.segments, impl=impl)


def _expression(acc: Tensor, a: Tensor, g: Tensor, owner: Tensor, examples: int) -> Tensor:
    """Without a loop over the examples: each row's product is added to its example's sum."""
    sums = acc.new_zeros(examples, acc.numel())
    sums.index_add_(0, owner, a.float() * g.float())
    return acc.add_(sums.abs_().sum(0))


def _computed_by(expression: Callable[..., Tensor]) -> Callable[[Inputs], Tensor]:
    return lambda each: expression(each.acc, each.a, each.g, each.owner, len(each.segments))


def compiled_expression(backend: str = "inductor") -> Callable[[Inputs], Tensor]:
    return _computed_by(compiled(_expression, backend))
