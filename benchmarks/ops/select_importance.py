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

from benchmarks.harness import lengths
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

SMALL, LARGE = (1536, 576), (18944, 3584)
RATIOS = (1e-5, 1e-3)
# Examples of BeaverTails' lengths, 76 tokens on average: 400, 1500 and 4000 tokens.
SMALL_EXAMPLES, LARGE_EXAMPLES, EXPERT_EXAMPLES = (5, 20, 53), (5, 53), 26
BATCH_TOKENS = 400
# Experts, those of a token, outputs, inputs.
EXPERTS = (64, 8, 1408, 2048)
TOY_SHAPE, TOY_EXAMPLES, TOY_RATIO, TOY_EXPERTS = (48, 32), 7, 1e-2, (6, 2, 20, 12)
# Rounding may exchange two entries at the border of many; of few it exchanges none.
_TOLERANCE = 2e-3
# None of them can be captured: a NaN has to raise.
_OURS = {"tolerance": _TOLERANCE, "capturable": False}


def cases(toy: bool) -> Iterator[Case]:
    if toy:
        yield case(*TOY_SHAPE, TOY_EXAMPLES, TOY_RATIO, "fp32")
        yield expert_case(*TOY_EXPERTS, 4, TOY_RATIO, "bf16")
        return
    for ratio, dtype in itertools.product(RATIOS, DTYPES):
        yield expert_case(*EXPERTS, EXPERT_EXAMPLES, ratio, dtype)
        for examples in SMALL_EXAMPLES:
            yield case(*SMALL, examples, ratio, dtype)
    for ratio, dtype, examples in itertools.product(RATIOS, DTYPES, LARGE_EXAMPLES):
        yield case(*LARGE, examples, ratio, dtype)


def case(rows: int, columns: int, examples: int, ratio: float, dtype: str) -> Case:
    segments = lengths.segments(lengths.beavertails(examples))
    tokens, k = int(segments[-1, 1]), int(ratio * rows * columns)

    def make(generator: torch.Generator) -> SimpleNamespace:
        made = _made((rows, columns), tokens, tokens, dtype, generator)
        made.segments, made.sets = segments.clone(), torch.zeros(examples, dtype=torch.int64)
        return made

    def fused(impl: str, each: SimpleNamespace) -> Tensor:
        operands = (each.x, each.g, each.segments, each.sets, each.weight, [k])
        return select_importance(*operands, impl=impl)[0][0]

    def dense(each: SimpleNamespace) -> Tensor:
        sums = torch.zeros(rows, columns, device=each.x.device)
        for batch in _batches(each.segments):
            accumulate_importance_(sums, each.x, each.g, batch)
        return select_top(sums, each.weight, examples, k)

    return Case(
        "select_importance",
        f"{rows} x {columns}, {tokens} tokens of {examples} examples, ratio {ratio:g}, k = {k}",
        dtype,
        settings=_settings(1, 1, rows, columns, examples, tokens, ratio, k),
        operations=2 * tokens * rows * columns,
        bytes=(tokens * (rows + columns) + rows * columns) * DTYPES[dtype].itemsize + 8 * k,
        inputs=make,
        expected=partial(_expected, examples, k),
        error=share_wrong,
        contenders=(
            *(
                implementation("select_importance", impl, fused, **_OURS)
                for impl in ("triton", "native", "reference")
            ),
            Contender("sums, then select_top", dense, **_OURS),
        ),
    )


def expert_case(
    experts: int, active: int, rows: int, columns: int, examples: int, ratio: float, dtype: str
) -> Case:
    counts = torch.tensor([length.tokens for length in lengths.beavertails(examples)])
    tokens, k = int(counts.sum()), int(ratio * rows * columns)
    segments, numbers = routed(counts, experts, active)
    pairs = tokens * active
    numbers_read = tokens * columns + pairs * rows + experts * rows * columns

    def make(generator: torch.Generator) -> SimpleNamespace:
        made = _made((experts, rows, columns), tokens, pairs, dtype, generator)
        made.segments, made.experts = segments.clone(), numbers.clone()
        made.sets = torch.zeros_like(numbers)
        # Which token a row stands for makes no difference to the time.
        made.x_rows = torch.arange(pairs, device=generator.device) % tokens
        return made

    def fused(impl: str, each: SimpleNamespace) -> Tensor:
        operands = (each.x, each.g, each.segments, each.experts, each.sets, each.weight)
        found = select_expert_importance(*operands, [k], [examples], x_rows=each.x_rows, impl=impl)
        return found[0][0]

    def dense(impl: str, each: SimpleNamespace) -> Tensor:
        sums = torch.zeros(experts, rows, columns, device=each.x.device)
        operands = (each.x[each.x_rows], each.g, each.segments, each.experts)
        accumulate_expert_importance_(sums, *operands, impl=impl)
        picked = [
            select_top(sums[e], each.weight[e], examples, k) + e * rows * columns
            for e in range(experts)
        ]
        return torch.cat(picked)

    accumulation = "accumulate_expert_importance_"
    return Case(
        "select_importance",
        f"{experts} experts of {rows} x {columns}, {active} for each of {tokens} tokens of "
        f"{examples} examples, ratio {ratio:g}, k = {k} each",
        dtype,
        settings=_settings(experts, active, rows, columns, examples, tokens, ratio, k),
        operations=2 * pairs * rows * columns,
        bytes=numbers_read * DTYPES[dtype].itemsize + 8 * experts * k,
        inputs=make,
        expected=partial(_expected, examples, k),
        error=share_wrong,
        contenders=(
            *(
                implementation("select_expert_importance", impl, fused, **_OURS)
                for impl in ("native", "reference")
            ),
            *(
                implementation(accumulation, impl, dense, f"{impl} sums, then select_top", **_OURS)
                for impl in ("native", "reference")
            ),
        ),
    )


def _settings(
    experts: int,
    active: int,
    rows: int,
    columns: int,
    examples: int,
    tokens: int,
    ratio: float,
    k: int,
) -> dict[str, int | float]:
    return {
        "experts": experts,
        "active": active,
        "rows": rows,
        "columns": columns,
        "examples": examples,
        "tokens": tokens,
        "ratio": ratio,
        "k": k,
    }


def _made(
    shape: tuple[int, ...], tokens: int, pairs: int, dtype: str, generator: torch.Generator
) -> SimpleNamespace:
    """x [tokens, C], g [pairs, R], weight of `shape`; rows and columns of different strength, as a
    model's gradients have them."""
    options = {"generator": generator, "device": generator.device}
    rows, columns = shape[-2:]
    x = torch.randn(tokens, columns, **options) * torch.randn(columns, **options).exp()
    g = torch.randn(pairs, rows, **options) * torch.randn(rows, **options).exp()
    weight = torch.randn(*shape, **options).mul_(0.02)
    x, g, weight = (each.to(DTYPES[dtype]) for each in (x, g, weight))
    return SimpleNamespace(x=x, g=g, weight=weight)


def _batches(segments: Tensor) -> list[Tensor]:
    """The segments in groups of about BATCH_TOKENS tokens."""
    number = segments[:, 0] // BATCH_TOKENS
    return [segments[number == each] for each in number.unique()]


def _expected(examples: int, k: int, each: SimpleNamespace) -> Tensor:
    """From sums in float64, one expert after the other."""
    stack = each.weight if each.weight.dim() == 3 else each.weight[None]
    experts = getattr(each, "experts", torch.zeros(len(each.segments), dtype=torch.int64))
    picked = []
    for number, weight in enumerate(stack):
        sums = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
        for start, end in each.segments[experts == number].tolist():
            x = each.x[each.x_rows[start:end]] if hasattr(each, "x_rows") else each.x[start:end]
            sums += (each.g[start:end].double().T @ x.double()).abs_()
        value = sums.mul_(weight.double().abs()).flatten()
        index = value.topk(min(k, int((value > 0).sum()))).indices
        picked.append(index.sort().values + number * weight.numel())
    return torch.cat(picked)
