"""Losses times a power of two, so that half-precision gradients are neither flushed nor infinite.

An fp16 number below 6e-8 is zero, and the mean over an example's target tokens divides every
gradient by their number. Each loss is therefore multiplied by that number, rounded up to a power of
two, and by one power of two for the whole run. Both are taken back exactly: what belongs to the
example from its rows, half from the inputs and half from the gradients, so that neither is flushed
again; what belongs to the run from the fp32 sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# The largest gradient of a product that the trial sees is brought to about this, 2^8 below the
# largest fp16 number: other examples may have larger ones.
_LARGEST = 2.0**8
# Gradients of logits reach twice the factor.
_HIGHEST = 14
_LOWEST = -24
# How much less a batch gets that did overflow.
STEP = 8


@dataclass(frozen=True)
class LossScale:
    """The losses of a run are multiplied by 2^exponent and by their target tokens, rounded up."""

    exponent: int

    @property
    def factor(self) -> float:
        return 2.0**self.exponent

    def of_losses(self, averaged: Sequence[int]) -> Tensor:
        """fp32 [B] on the CPU: what each loss is multiplied by."""
        factors = [2.0 ** (self.exponent + _rounded_up(tokens)) for tokens in averaged]
        return torch.tensor(factors, device="cpu")

    def lower(self) -> LossScale:
        return LossScale(self.exponent - STEP)

    def fitted(self, largest: float) -> LossScale:
        """The scale for a run, given the largest gradient that was seen with this one."""
        if not 0 < largest < math.inf:
            return self
        exponent = self.exponent + math.floor(math.log2(_LARGEST / largest))
        return LossScale(max(_LOWEST, min(_HIGHEST, exponent)))


def row_factors(segments: Tensor, averaged: Sequence[int], rows: int) -> tuple[Tensor, Tensor]:
    """fp32 [rows, 1] on the CPU for inputs and gradients; their products undo the tokens' part."""
    exponents = torch.zeros(rows, 1, device="cpu")
    for (start, end), tokens in zip(segments.tolist(), averaged, strict=True):
        exponents[start:end] = -_rounded_up(tokens)
    half = (exponents / 2).ceil()
    return half.exp2(), (exponents - half).exp2()


def initial_scale(model: nn.Module, device: torch.device) -> LossScale | None:
    """Where a search for the scale begins; None for models that do not compute in fp16."""
    half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
    if torch.is_autocast_enabled(device.type):
        half = half or torch.get_autocast_dtype(device.type) == torch.float16
    return LossScale(STEP) if half else None


def _rounded_up(tokens: int) -> int:
    """The exponent of the power of two that is not below `tokens`."""
    return max(0, tokens - 1).bit_length()
