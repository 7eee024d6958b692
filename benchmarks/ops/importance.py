"""Weight importance, acc[R, C] += sum_b |G_b^T X_b|, and the same at every expert of a layer.

Matrices: on a GPU those of Qwen2-7B in bf16; on a CPU the MLP's of SmolLM2-135M and of a 1B model,
in fp32 and bf16. Experts: 64 of 2048 x 1408, 8 for each token, rows sorted by expert and for each
by example. Operations: 2 R C per row. Bytes: x and g once, the accumulator (of experts with tokens)
read and written.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.harness import lengths
from benchmarks.harness.cases import Case, Contender, compiled, implementation, product
from benchmarks.harness.models import DTYPES
from fastdean.ops import accumulate_expert_importance_, accumulate_importance_

# Gate and up, down, query and output, key and value: rows are outputs, columns inputs.
SHAPES = ((18944, 3584), (3584, 18944), (3584, 3584), (512, 3584))
EXAMPLES = (32, 8, 64)
# None: BeaverTails' lengths. Of all numbers of examples first those that something is aimed at for.
TOKENS = ((None, 256, 512), (128, 64, 32))
# One case each: compiling a loop over the examples takes longer than everything else of a case.
_COMPILED = {(SHAPES[0], EXAMPLES[0], None), (SHAPES[0], EXAMPLES[0], 256)}
CPU_SHAPES = ((1536, 576), (576, 1536), (8192, 2048), (2048, 8192))
# Examples and tokens of each: about as many tokens in every case.
CPU_LENGTHS = ((7, None), (32, 16), (8, 64), (4, 128), (2, 256), (1, 512))
TOY_SHAPES, TOY_EXAMPLES, TOY_TOKENS = ((48, 32), (16, 32)), 3, (None, 8)
# Experts, those of a token, outputs, inputs.
EXPERTS, EXPERT_EXAMPLES = (64, 8, 2048, 1408), (32, 8)
TOY_EXPERTS, TOY_EXPERT_EXAMPLES = (6, 2, 20, 12), (2,)


def cases(toy: bool) -> Iterator[Case]:
    """The cases in the order of their worth: a run that ends early has seen every shape."""
    if toy:
        for tokens, shape in itertools.product(TOY_TOKENS, TOY_SHAPES):
            yield case(*shape, TOY_EXAMPLES, tokens)
        return
    for group in TOKENS:
        for examples, tokens, shape in itertools.product(EXAMPLES, group, SHAPES):
            compiles = (shape, examples, tokens) in _COMPILED
            yield case(*shape, examples, tokens, compiles=compiles, device_type="cuda")
    for (examples, tokens), dtype, shape in itertools.product(CPU_LENGTHS, DTYPES, CPU_SHAPES):
        yield case(*shape, examples, tokens, dtype=dtype, device_type="cpu")


def expert_cases(toy: bool) -> Iterator[Case]:
    for examples in TOY_EXPERT_EXAMPLES if toy else EXPERT_EXAMPLES:
        yield expert_case(*(TOY_EXPERTS if toy else EXPERTS), examples)


def case(
    rows: int,
    columns: int,
    examples: int,
    tokens: int | None,
    *,
    dtype: str = "bf16",
    compiles: bool = False,
    device_type: str = "",
) -> Case:
    """`tokens` per example; None: BeaverTails' lengths."""
    segments = lengths.segments(lengths.chosen(examples, tokens))
    total = int(segments[-1, 1])
    kind = "BeaverTails' lengths" if tokens is None else f"{tokens} tokens each"
    compiled_ones = [
        Contender("torch.compile", compiled(_expression), prepare=_spanned, compiled=True)
    ]
    impls = ("triton", "native", "reference")
    return Case(
        "importance",
        f"{rows} x {columns}, {examples} examples, {kind}",
        dtype,
        settings={
            "rows": rows,
            "columns": columns,
            "examples": examples,
            "lengths": "beavertails" if tokens is None else "fixed",
            "tokens_per_example": total / examples,
            "tokens": total,
        },
        operations=2 * total * rows * columns,
        bytes=total * (rows + columns) * DTYPES[dtype].itemsize + 8 * rows * columns,
        inputs=partial(_made, (rows, columns), dtype, [...] * examples, segments),
        expected=expected,
        contenders=(
            *(implementation("accumulate_importance_", impl, _ours) for impl in impls),
            Contender("mm per example", mm_loop),
            Contender("bmm, padded", _bmm, prepare=_padded),
            *(compiled_ones if compiles else ()),
        ),
        floor=Contender("plain product", _plain_product, prepare=_plain_operands),
        device_type=device_type,
    )


def expert_case(experts: int, active: int, rows: int, columns: int, examples: int) -> Case:
    tokens, segments, numbers = routed(examples, experts, active)
    pairs, used = tokens * active, numbers.unique().tolist()

    def make(generator: torch.Generator) -> SimpleNamespace:
        shape = (experts, rows, columns)
        made = _made(shape, "bf16", numbers.tolist(), segments, generator)
        made.experts = numbers.to(generator.device)
        # Per expert with tokens its examples' segments on the CPU.
        made.groups = {each: segments[numbers == each] for each in used}
        made.segments = segments.to(generator.device)
        return made

    op, by_expert = "accumulate_expert_importance_", "triton, expert by expert"
    return Case(
        "expert_importance",
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
        bytes=2 * pairs * (rows + columns) + 8 * len(used) * rows * columns,
        inputs=make,
        expected=expected,
        contenders=(
            implementation(op, "triton", _ours_of_experts),
            # The reference brings the routing to the host.
            implementation(op, "reference", _ours_of_experts, capturable=False),
            implementation("accumulate_importance_", "triton", _expert_by_expert, by_expert),
            Contender("mm per segment", mm_loop),
        ),
        floor=Contender("plain product", _plain_product, prepare=_dealt_out),
    )


def routed(examples: int, experts: int, active: int) -> tuple[int, Tensor, Tensor]:
    """(tokens, segments, experts) of examples of BeaverTails' lengths: every token goes to `active`
    different experts, all alike; the same every time. Segments int64 [S, 2], none empty; experts
    [S], ascending."""
    counts = torch.tensor([length.tokens for length in lengths.beavertails(examples)])
    generator = torch.Generator().manual_seed(experts)
    owner = torch.arange(len(counts)).repeat_interleave(counts)
    picked = torch.rand(len(owner), experts, generator=generator).topk(active).indices
    pair = (picked * len(counts) + owner[:, None]).flatten()
    kinds, sizes = pair.unique(return_counts=True)
    ends = sizes.cumsum(0)
    return len(owner), torch.stack([ends - sizes, ends], 1), kinds // len(counts)


def _made(
    shape: Sequence[int],
    dtype: str,
    places: Sequence[Any],
    segments: Tensor,
    generator: torch.Generator,
) -> SimpleNamespace:
    """acc fp32 of `shape`, x [N, C], g [N, R], segments int64 [S, 2] on the CPU; of each segment
    its (place in acc, start, end) in `spans`, and that part of acc itself in `parts`."""
    options = {"generator": generator, "device": generator.device}
    total, (rows, columns) = int(segments[-1, 1]), shape[-2:]
    # Not zeros: what a contender leaves out shows against what was there before.
    acc = torch.rand(*shape, **options).mul_(8)
    spans = [(place, *span) for place, span in zip(places, segments.tolist(), strict=True)]
    return SimpleNamespace(
        acc=acc,
        x=torch.randn(total, columns, **options).to(DTYPES[dtype]),
        g=torch.randn(total, rows, **options).to(DTYPES[dtype]),
        segments=segments.clone(),
        spans=spans,
        parts=[(acc[place], start, end) for place, start, end in spans],
    )


def expected(inputs: SimpleNamespace) -> Tensor:
    result = inputs.acc.double()
    for place, start, end in inputs.spans:
        result[place] += (inputs.g[start:end].double().T @ inputs.x[start:end].double()).abs_()
    return result


def _ours(impl: str, each: SimpleNamespace) -> Tensor:
    return accumulate_importance_(each.acc, each.x, each.g, each.segments, impl=impl)


def _ours_of_experts(impl: str, each: SimpleNamespace) -> Tensor:
    operands = (each.acc, each.x, each.g, each.segments, each.experts)
    return accumulate_expert_importance_(*operands, impl=impl)


def _expert_by_expert(impl: str, each: SimpleNamespace) -> Tensor:
    """The op for one matrix, once for every expert."""
    for expert, segments in each.groups.items():
        accumulate_importance_(each.acc[expert], each.x, each.g, segments, impl=impl)
    return each.acc


def mm_loop(inputs: SimpleNamespace) -> Tensor:
    """One product in fp32 per segment, its absolute value in place, and the sum."""
    buffer = torch.empty_like(inputs.parts[0][0])
    for part, start, end in inputs.parts:
        product(inputs.g[start:end].T, inputs.x[start:end], out=buffer)
        part.add_(buffer.abs_())
    return inputs.acc


def _padded(inputs: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor]:
    """(acc, g [B, R, T], x [B, T, C]): a loader's padded batch has this form already."""
    g, x = (pad_sequence([e[i:j] for _, i, j in inputs.spans], True) for e in (inputs.g, inputs.x))
    return inputs.acc, g.transpose(1, 2), x


def _bmm(operands: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    acc, g, x = operands
    return acc.add_(product(g, x).abs_().sum(0))


def _spanned(inputs: SimpleNamespace) -> tuple[Any, ...]:
    return inputs.acc, inputs.x, inputs.g, tuple((start, end) for _, start, end in inputs.spans)


def _expression(operands: tuple[Any, ...]) -> Tensor:
    """That of the op's docstring."""
    acc, x, g, spans = operands
    for start, end in spans:
        acc += (g[start:end].T.float() @ x[start:end].float()).abs()
    return acc


def _plain_operands(inputs: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor]:
    g, x = inputs.g, inputs.x
    if x.device.type == "cpu":
        # Products in bf16 are far slower than in fp32 on a CPU without instructions for them.
        g, x = g.float(), x.float()
    return g.T, x, x.new_empty(g.shape[1], x.shape[1])


def _dealt_out(inputs: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor]:
    """The same rows, dealt out evenly to the experts (less a remainder below one row each)."""
    experts = len(inputs.acc)
    each = len(inputs.x) // experts
    g, x = (flat[: each * experts].unflatten(0, (experts, each)) for flat in (inputs.g, inputs.x))
    return g.transpose(1, 2), x, torch.empty_like(inputs.acc, dtype=x.dtype)


def _plain_product(operands: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The weight gradient of all examples together, as training computes it; fp32 on a CPU."""
    g, x, out = operands
    return (torch.bmm if g.dim() == 3 else torch.mm)(g, x, out=out)
