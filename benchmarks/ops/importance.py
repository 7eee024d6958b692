"""Weight importance: acc[R, C] += sum_b |G_b^T X_b|.

On a GPU at the shapes of Qwen2-7B in bf16; on a CPU at the MLP shapes of SmolLM2-135M and of a 1B
model, in fp32 and bf16. Operations: 2 N R C. Bytes: x and g once, the accumulator read and written.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.harness import lengths
from benchmarks.harness.cases import Case, Contender, compiled, implementation, norm_error, product
from fastdean.ops import accumulate_importance_

OP = "importance"
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
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Inputs:
    """acc fp32 [R, C], x [N, C], g [N, R]; segments int64 [B, 2] on the CPU, and as pairs."""

    acc: Tensor
    x: Tensor
    g: Tensor
    segments: Tensor
    spans: tuple[tuple[int, int], ...]


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


def case(
    rows: int,
    columns: int,
    examples: int,
    tokens: int | None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    compiles: bool = False,
    device_type: str = "",
) -> Case:
    """`tokens` per example; None: BeaverTails' lengths."""
    segments = lengths.segments(lengths.chosen(examples, tokens))
    total = int(segments[-1, 1])

    def make(generator: torch.Generator) -> Inputs:
        options = {"generator": generator, "device": generator.device}
        return Inputs(
            # Not zeros: what a contender leaves out shows against what was there before.
            acc=torch.rand(rows, columns, **options).mul_(8),
            x=torch.randn(total, columns, **options).to(dtype),
            g=torch.randn(total, rows, **options).to(dtype),
            segments=segments.clone(),
            spans=tuple(map(tuple, segments.tolist())),
        )

    op, impls = "accumulate_importance_", ("triton", "native", "reference")
    compiled_ones = (
        [Contender("torch.compile", compiled_expression(), compiled=True)] if compiles else []
    )
    kind = "BeaverTails' lengths" if tokens is None else f"{tokens} tokens each"
    return Case(
        OP,
        f"{rows} x {columns}, {examples} examples, {kind}",
        DTYPES[dtype],
        settings={
            "rows": rows,
            "columns": columns,
            "examples": examples,
            "lengths": "beavertails" if tokens is None else "fixed",
            "tokens_per_example": total / examples,
            "tokens": total,
        },
        operations=2 * total * rows * columns,
        bytes=total * (rows + columns) * dtype.itemsize + 8 * rows * columns,
        inputs=make,
        expected=expected,
        error=norm_error,
        contenders=(
            *(implementation(op, impl, _ours) for impl in impls),
            Contender("mm per example", mm_loop),
            Contender("bmm, padded", _bmm, prepare=_padded),
            *compiled_ones,
        ),
        floor=Contender("plain product", _plain_product, prepare=_plain_operands),
        device_type=device_type,
    )


def expected(inputs: Inputs) -> Tensor:
    result = inputs.acc.double()
    for start, end in inputs.spans:
        result += (inputs.g[start:end].double().T @ inputs.x[start:end].double()).abs_()
    return result


def _ours(impl: str, inputs: Inputs) -> Tensor:
    return accumulate_importance_(inputs.acc, inputs.x, inputs.g, inputs.segments, impl=impl)


def mm_loop(inputs: Inputs) -> Tensor:
    """One product in fp32 per example, its absolute value in place, and the sum."""
    buffer = torch.empty_like(inputs.acc)
    for start, end in inputs.spans:
        product(inputs.g[start:end].T, inputs.x[start:end], out=buffer)
        inputs.acc.add_(buffer.abs_())
    return inputs.acc


def _padded(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """(acc, g [B, R, T], x [B, T, C]): a loader's padded batch has this form already."""
    g, x = (pad_sequence([e[i:j] for i, j in inputs.spans], True) for e in (inputs.g, inputs.x))
    return inputs.acc, g.transpose(1, 2), x


def _bmm(operands: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    acc, g, x = operands
    return acc.add_(product(g, x).abs_().sum(0))


def compiled_expression(backend: str = "inductor") -> Callable[[Inputs], Tensor]:
    run = compiled(_expression, backend)
    return lambda each: run(each.acc, each.x, each.g, each.spans)


def _expression(acc: Tensor, x: Tensor, g: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """That of the op's docstring."""
    for start, end in spans:
        acc += (g[start:end].T.float() @ x[start:end].float()).abs()
    return acc


def _plain_operands(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    g, x = inputs.g, inputs.x
    if x.device.type == "cpu":
        # Products in bf16 are far slower than in fp32 on a CPU without instructions for them.
        g, x = g.float(), x.float()
    return g.T, x, x.new_empty(g.shape[1], x.shape[1])


def _plain_product(operands: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The weight gradient of all examples together, as training computes it; fp32 on a CPU."""
    g, x, out = operands
    return torch.mm(g, x, out=out)
