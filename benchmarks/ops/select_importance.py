"""Accumulate and select in one: the exact top k of |W| * sum_b |G_b^T X_b| / n.

On a CPU: an MLP matrix of SmolLM2-135M and of a 7B model in fp32 and bf16, and 64 experts of
1408 x 2048 with 8 for each token. Beside it what it stands for: dense sums, one call for each batch
of about 400 tokens, and one selection at the end. Operations: 2 R C per token (and expert). Bytes:
X, G and the weight, read once, and the indices written.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.harness.cases import Case, Contender, implementation
from benchmarks.harness.models import DTYPES
from benchmarks.ops.importance import routed
from benchmarks.ops.selection import share_wrong
from fastdean.ops import (
    accumulate_expert_importance_,
    accumulate_importance_,
    select_expert_importance,
    select_importance,
    select_top,
)

# Experts, those of a token, outputs, inputs: single matrices, and a layer of experts.
SMALL, LARGE, EXPERTS = (1, 1, 1536, 576), (1, 1, 18944, 3584), (64, 8, 1408, 2048)
RATIOS = (1e-5, 1e-3)
# Examples of BeaverTails' lengths, 76 tokens on average: 400, 1500 and 4000 tokens.
SMALL_EXAMPLES, LARGE_EXAMPLES, EXPERT_EXAMPLES = (5, 20, 53), (5, 53), 26
BATCH_TOKENS = 400
TOY, TOY_EXPERTS, TOY_RATIO = (1, 1, 48, 32), (6, 2, 20, 12), 1e-2
# Rounding may exchange two entries at the border of many; of few it exchanges none.
_TOLERANCE = 2e-3
# None of them can be captured: a NaN has to raise.
_OURS = {"tolerance": _TOLERANCE, "capturable": False}


def cases(toy: bool) -> Iterator[Case]:
    if toy:
        yield case(*TOY, 7, TOY_RATIO, "fp32")
        yield case(*TOY_EXPERTS, 4, TOY_RATIO, "bf16")
        return
    for ratio, dtype in itertools.product(RATIOS, DTYPES):
        yield case(*EXPERTS, EXPERT_EXAMPLES, ratio, dtype)
        for examples in SMALL_EXAMPLES:
            yield case(*SMALL, examples, ratio, dtype)
    for ratio, dtype, examples in itertools.product(RATIOS, DTYPES, LARGE_EXAMPLES):
        yield case(*LARGE, examples, ratio, dtype)


def case(
    experts: int, active: int, rows: int, columns: int, examples: int, ratio: float, dtype: str
) -> Case:
    """Of `experts` matrices, each token with `active` of them; of one, the op for one matrix."""
    tokens, segments, numbers = routed(examples, experts, active)
    pairs, numel = tokens * active, rows * columns
    k = int(ratio * numel)

    def make(generator: torch.Generator) -> SimpleNamespace:
        """x [N, C], g [pairs, R], weight [E, R, C]; rows and columns of different strength, as a
        model's gradients have them."""
        options = {"generator": generator, "device": generator.device}
        x = torch.randn(tokens, columns, **options) * torch.randn(columns, **options).exp()
        g = torch.randn(pairs, rows, **options) * torch.randn(rows, **options).exp()
        weight = torch.randn(experts, rows, columns, **options).mul_(0.02)
        x, g, weight = (each.to(DTYPES[dtype]) for each in (x, g, weight))
        return SimpleNamespace(
            x=x,
            g=g,
            weight=weight,
            segments=segments.clone(),
            experts=numbers.clone(),
            sets=torch.zeros_like(numbers),
            # Which token a row stands for makes no difference to the time.
            x_rows=torch.arange(pairs, device=generator.device) % tokens,
        )

    def fused(impl: str, each: SimpleNamespace) -> Tensor:
        operands = (each.x, each.g, each.segments, each.sets, each.weight[0], [k])
        return select_importance(*operands, impl=impl)[0][0]

    def dense(each: SimpleNamespace) -> Tensor:
        sums = torch.zeros(rows, columns, device=each.x.device)
        for batch in _batches(each.segments):
            accumulate_importance_(sums, each.x, each.g, batch)
        return select_top(sums, each.weight[0], examples, k)

    def fused_experts(impl: str, each: SimpleNamespace) -> Tensor:
        operands = (each.x, each.g, each.segments, each.experts, each.sets, each.weight)
        found = select_expert_importance(*operands, [k], [examples], x_rows=each.x_rows, impl=impl)
        return found[0][0]

    def dense_experts(impl: str, each: SimpleNamespace) -> Tensor:
        sums = torch.zeros(experts, rows, columns, device=each.x.device)
        operands = (each.x[each.x_rows], each.g, each.segments, each.experts)
        accumulate_expert_importance_(sums, *operands, impl=impl)
        picked = [select_top(sums[e], each.weight[e], examples, k) for e in range(experts)]
        return torch.cat([index + e * numel for e, index in enumerate(picked)])

    impls = ("native", "reference")
    if experts == 1:
        matrices, of_each = f"{rows} x {columns}, ", ""
        contenders = (
            *(implementation("select_importance", i, fused, **_OURS) for i in ("triton", *impls)),
            Contender("sums, then select_top", dense, **_OURS),
        )
    else:
        matrices, of_each = (
            f"{experts} experts of {rows} x {columns}, {active} for each of ",
            " each",
        )
        op, sums_op = "select_expert_importance", "accumulate_expert_importance_"
        names = {impl: f"{impl} sums, then select_top" for impl in impls}
        contenders = (
            *(implementation(op, i, fused_experts, **_OURS) for i in impls),
            *(implementation(sums_op, i, dense_experts, names[i], **_OURS) for i in impls),
        )
    return Case(
        "select_importance",
        f"{matrices}{tokens} tokens of {examples} examples, ratio {ratio:g}, k = {k}{of_each}",
        dtype,
        settings={
            "experts": experts,
            "active": active,
            "rows": rows,
            "columns": columns,
            "examples": examples,
            "tokens": tokens,
            "ratio": ratio,
            "k": k,
        },
        operations=2 * pairs * numel,
        bytes=(tokens * columns + pairs * rows + experts * numel) * DTYPES[dtype].itemsize
        + 8 * experts * k,
        inputs=make,
        expected=partial(_expected, examples, k),
        error=share_wrong,
        contenders=contenders,
    )


def _batches(segments: Tensor) -> list[Tensor]:
    """The segments in groups of about BATCH_TOKENS tokens."""
    number = segments[:, 0] // BATCH_TOKENS
    return [segments[number == each] for each in number.unique()]


def _expected(examples: int, k: int, each: SimpleNamespace) -> Tensor:
    """From sums in float64, one expert after the other."""
    picked = []
    for number, weight in enumerate(each.weight):
        sums = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
        for start, end in each.segments[each.experts == number].tolist():
            x = each.x[each.x_rows[start:end]]
            sums += (each.g[start:end].double().T @ x.double()).abs_()
        value = sums.mul_(weight.double().abs()).flatten()
        index = value.topk(min(k, int((value > 0).sum()))).indices
        picked.append(index.sort().values + number * weight.numel())
    return torch.cat(picked)
