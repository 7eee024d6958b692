"""Finish and select: the exact top k of |W| * sums / n, for one MLP matrix of Qwen2-7B.

Bytes: W and the sums, read once, and the indices written; bound by memory at every k here.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.harness.cases import Case, Contender, implementation
from fastdean.ops import select_top

SHAPE, RATIOS = (18944, 3584), (1e-5, 5e-7, 1e-6, 1e-4, 1e-3, 1e-2)
TOY_SHAPE, TOY_RATIOS = (64, 48), (1e-3, 1e-2)
# A power of two: dividing by it rounds nothing, so that a baseline may leave the division out.
_EXAMPLES = 128


def cases(toy: bool) -> Iterator[Case]:
    for ratio in TOY_RATIOS if toy else RATIOS:
        yield case(*(TOY_SHAPE if toy else SHAPE), ratio)


def case(rows: int, columns: int, ratio: float) -> Case:
    numel = rows * columns
    k = int(ratio * numel)

    # None of them can be captured: a NaN has to raise.
    ours = {"tolerance": 0.0, "capturable": False}

    def run(impl: str, inputs: SimpleNamespace) -> Tensor:
        return select_top(inputs.sums, inputs.weight, _EXAMPLES, k, impl=impl)

    def topk(inputs: SimpleNamespace) -> Tensor:
        value = inputs.weight.abs().float().mul_(inputs.sums)
        return value.flatten().topk(k, sorted=False).indices

    return Case(
        "selection",
        f"{rows} x {columns}, ratio {ratio:g}, k = {k}",
        "bf16",
        settings={"rows": rows, "columns": columns, "ratio": ratio, "k": k},
        operations=2 * numel,
        bytes=numel * (4 + 2) + 8 * k,
        inputs=partial(_made, rows, columns),
        expected=partial(_expected, k),
        error=share_wrong,
        contenders=(
            *(
                implementation("select_top", impl, run, **ours)
                for impl in ("triton", "native", "reference")
            ),
            # It may take another one of several equal entries at the threshold.
            Contender("torch.topk", topk, tolerance=1e-5, capturable=False),
        ),
    )


def _made(rows: int, columns: int, generator: torch.Generator) -> SimpleNamespace:
    """sums fp32 [R, C], not negative; weight [R, C].

    Rows and columns are of different strength, as a model's gradients have them: the scores then
    cover many powers of two.
    """
    options = {"generator": generator, "device": generator.device}
    strength = torch.randn(rows, 1, **options).exp() * torch.randn(1, columns, **options).exp()
    sums = torch.randn(rows, columns, **options).abs_().mul_(strength)
    weight = torch.randn(rows, columns, **options).mul_(0.02).bfloat16()
    return SimpleNamespace(sums=sums, weight=weight)


def _expected(k: int, inputs: SimpleNamespace) -> Tensor:
    value = (inputs.sums * inputs.weight.float().abs() / _EXAMPLES).flatten()
    order = value.argsort(descending=True, stable=True)[:k]
    return order[value[order] > 0].sort().values


def share_wrong(result: Tensor, expected: Tensor) -> float:
    """Share of the expected indices that are missing; 1 where the numbers differ."""
    if result.shape != expected.shape:
        return 1.0
    return 1 - float(torch.isin(expected, result).double().mean())
