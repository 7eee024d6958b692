"""Signed sums of gradients, sum_b G_b^T X_b, in plain torch: everywhere, or at some entries.

Sums over examples are sums over their rows, so that no example is looked at by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdean.precision import full_fp32_products

# Of products of rows at a time.
_BLOCK_BYTES = 16 << 20


@torch.no_grad()
def add_signed_(acc: Tensor, x: Tensor, g: Tensor, segments: Tensor) -> None:
    """Add sum_b G_b^T X_b to `acc`, fp32 [R, C]; x [N, C], g [N, R]."""
    with full_fp32_products():
        for start, end in joined(segments):
            rows_x, rows_g = (_at_least_fp32(each[start:end]) for each in (x, g))
            if rows_x.dtype == acc.dtype:
                acc.addmm_(rows_g.T, rows_x)
            else:
                acc += rows_g.T @ rows_x


@torch.no_grad()
def add_signed_units_(acc: Tensor, a: Tensor, g: Tensor, segments: Tensor) -> None:
    """Add sum_t a_t * g_t over the rows of the examples to `acc`, fp32 [C]; a, g [N, C]."""
    for start, end in joined(segments):
        acc += (_at_least_fp32(a[start:end]) * _at_least_fp32(g[start:end])).sum(0)


def joined(segments: Tensor) -> list[tuple[int, int]]:
    """The rows (start, end) of all examples, those that follow one another in one span."""
    spans: list[tuple[int, int]] = []
    for start, end in segments.tolist():
        if spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], end)
        elif end > start:
            spans.append((start, end))
    return spans


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
