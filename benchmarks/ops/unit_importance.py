"""Unit importance: acc[C] += sum_b |sum_t a_t g_t| over one layer's 18944 units.

Bound by memory: bytes are those of a and g, read once; three operations per pair of elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import lengths
from benchmarks.harness.cases import Case, Contender, compiled, implementation
from fastdean.ops import accumulate_unit_importance_

SHAPE, TOY_SHAPE = (16384, 18944), (200, 48)


def cases(toy: bool) -> Iterator[Case]:
    tokens, units = TOY_SHAPE if toy else SHAPE
    segments = lengths.segments(lengths.filling(tokens))
    examples = len(segments)

    def make(generator: torch.Generator) -> SimpleNamespace:
        """acc fp32 [C]; a, g [N, C]; segments int64 [B, 2] on the CPU; owner [N]: each row's b."""
        options = {"generator": generator, "device": generator.device}
        owner = torch.arange(examples).repeat_interleave(segments.diff().flatten())
        return SimpleNamespace(
            acc=torch.rand(units, **options).mul_(8),
            a=torch.randn(tokens, units, **options).bfloat16(),
            g=torch.randn(tokens, units, **options).bfloat16(),
            segments=segments.clone(),
            owner=owner.to(generator.device),
        )

    def operands(each: SimpleNamespace) -> tuple[Any, ...]:
        return each.acc, each.a, each.g, each.owner, examples

    op, computed = "accumulate_unit_importance_", {"prepare": operands}
    yield Case(
        "unit_importance",
        f"{tokens} tokens, {units} units, {examples} examples of BeaverTails' lengths",
        "bf16",
        settings={"tokens": tokens, "units": units, "examples": examples},
        operations=3 * tokens * units,
        bytes=2 * 2 * tokens * units + 8 * units,
        inputs=make,
        expected=expected,
        contenders=(
            *(implementation(op, impl, _ours) for impl in ("triton", "reference")),
            Contender("torch", _expression, **computed),
            Contender("torch.compile", compiled(_expression), compiled=True, **computed),
        ),
    )


def expected(inputs: SimpleNamespace) -> Tensor:
    result = inputs.acc.double()
    for start, end in inputs.segments.tolist():
        result += (inputs.a[start:end].double() * inputs.g[start:end].double()).sum(0).abs_()
    return result


def _ours(impl: str, each: SimpleNamespace) -> Tensor:
    return accumulate_unit_importance_(each.acc, each.a, each.g, each.segments, impl=impl)


def _expression(operands: tuple[Any, ...]) -> Tensor:
    """Without a loop over the examples: each row's product is added to its example's sum."""
    acc, a, g, owner, examples = operands
    sums = acc.new_zeros(examples, acc.numel())
    sums.index_add_(0, owner, a.float() * g.float())
    return acc.add_(sums.abs_().sum(0))
