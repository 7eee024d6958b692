"""What is measured, as data: a case, the work it cannot avoid, and the contenders that compute it.

Operations count a multiplication and an addition as two; bytes are those of every input read once
and every output written once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.rates import Products
from fastdean.kernels import interpreted
from fastdean.ops._dispatch import choose

# Largest norm-wise error of sums in fp32 over products in fp32: matrix units cut what they add to
# the accumulator's length, which over 512 tokens comes near 1e-5. Products rounded to bf16 are off
# by 1e-3, TF32 by 3e-4.
FP32_TOLERANCE = 5e-5


def norm_error(result: Tensor, expected: Tensor) -> float:
    """||result - expected|| / ||expected||."""
    return float((result.double() - expected.double()).norm() / expected.double().norm())


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    Attributes:
        run: what `prepare` returned -> the result; only this is timed.
        prepare: inputs -> what `run` takes, once per set of inputs, before the clock starts.
        refusal: why it cannot run on a device; "" if it can.
        tolerance: the largest error (as the case defines it) at which it may be timed.
        capturable: never waits for the device, so that a CUDA graph can hold it.
        compiled: by torch.compile.
        ours: one of fastdean's own implementations.
        scale: what a measured time is multiplied with to stand for the whole case.
        extrapolated: "2 of 30 layers" where `scale` is not 1, else None.
    """

    name: str
    run: Callable[[Any], Any]
    prepare: Callable[[Any], Any] = lambda inputs: inputs
    refusal: Callable[[torch.device], str] = lambda device: ""
    tolerance: float = FP32_TOLERANCE
    capturable: bool = True
    compiled: bool = False
    ours: bool = False
    scale: float = 1.0
    extrapolated: str | None = None

    @property
    def turn(self) -> int:
        """Ours are measured on all cases first, then what they are compared with, at last what
        torch compiles: compiling takes longer than everything else of a case."""
        return 2 if self.compiled else 0 if self.ours else 1


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        op: name of the results file.
        name: what tells it from other cases of the op, for people.
        settings: the same in numbers, for plots and for knowing a case again.
        inputs: fresh random inputs on the generator's device.
        expected: inputs -> the result in float64, or exactly; called before a contender's `run`,
            which may change the inputs.
        error: (result, expected) -> 0 for equal; NaN never passes.
        floor: a product that nothing of this volume beats, timed beside the contenders; None: what
            `operations`, `bytes` and `products` say.
        products: the matrix products of a whole model, whose rate the machine is asked for.
        device_type: where it is measured; "": anywhere.
    """

    op: str
    name: str
    dtype: str
    settings: Mapping[str, Any]
    operations: int
    bytes: int
    contenders: tuple[Contender, ...]
    inputs: Callable[[torch.Generator], Any] | None = None
    expected: Callable[[Any], Any] | None = None
    error: Callable[[Any, Any], float] = norm_error
    floor: Contender | None = None
    products: Products = field(default_factory=dict)
    device_type: str = ""

    @property
    def setup(self) -> dict[str, Any]:
        """As the field of a record."""
        return {"dtype": self.dtype, **self.settings}


def implementation(
    op: str, impl: str, run: Callable[[str, Any], Any], name: str = "", **options: Any
) -> Contender:
    """One of fastdean's own implementations, computed by `run(impl, inputs)`.

    Interpreted kernels are another contender: nobody must take their seconds for those of kernels.
    `options`: further fields of the contender.
    """

    def refusal(device: torch.device) -> str:
        try:
            choose(op, device, impl)
        except RuntimeError as error:
            return str(error)
        return ""

    name = (name or impl) + (", interpreted" if impl == "triton" and interpreted() else "")
    return Contender(name, lambda inputs: run(impl, inputs), refusal=refusal, ours=True, **options)


def compiled(expression: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` of plain torch, at the first call: it loads the compiler."""
    made = functools.cache(lambda: torch.compile(expression, dynamic=False))
    return lambda *arguments: made()(*arguments)


def product(left: Tensor, right: Tensor, *, out: Tensor | None = None) -> Tensor:
    """left @ right in fp32 for half-precision operands: [M, K] x [K, N], or the same in batches.

    On CUDA from the matrix units, without rounding the result (`out_dtype`); a CPU has no such
    product, so the operands are copied to fp32 there.
    """
    multiply = torch.bmm if left.dim() == 3 else torch.mm
    if left.dtype != torch.float32 and left.device.type == "cuda":
        return multiply(left, right, out_dtype=torch.float32, out=out)
    return multiply(left.float(), right.float(), out=out)


def product_name(device_type: str) -> str:
    """How `product` is computed, for the record."""
    return "out_dtype=fp32" if device_type == "cuda" else "operands copied to fp32"
