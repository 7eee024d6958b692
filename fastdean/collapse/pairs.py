"""Quantities of all pairs of classes, block by block, so that K classes need no [K, K, D]."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# A difference of two fp64 means below this share of their norm is what their sums rounded.
ROUNDING = 2.0**-40
# Elements of a block, in fp64.
_BLOCK = 2**22
# Squared distances below this share of the squared norms keep fewer than 12 digits in a product.
_CLOSE = 1e-4


@dataclass
class Statistics:
    """Statistics of values that come block by block.

    Attributes:
        count, mean, scatter, largest: of the finite values; scatter is sum (value - mean)^2.
        infinite: the number of the others.
    """

    count: int = 0
    mean: float = 0.0
    scatter: float = 0.0
    largest: float = -math.inf
    infinite: int = 0

    def add_(self, values: Tensor) -> None:
        """Add a block of values [n], without NaN."""
        finite = values[~values.isinf()]
        self.infinite += values.numel() - finite.numel()
        if not finite.numel():
            return
        mean, added = float(finite.mean()), finite.numel()
        delta, total = mean - self.mean, self.count + added
        self.scatter += (
            float((finite - mean).square().sum()) + delta**2 * self.count * added / total
        )
        self.mean += delta * added / total
        self.largest = max(self.largest, float(finite.max()))
        self.count = total

    @property
    def value(self) -> float | None:
        """The mean: infinite where a value is, None without values."""
        if self.infinite:
            return math.inf
        return self.mean if self.count else None

    @property
    def std(self) -> float | None:
        """Unbiased, of the finite values; None for fewer than two."""
        return math.sqrt(self.scatter / (self.count - 1)) if self.count > 1 else None


def pair_blocks(size: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of blocks that hold every pair c < c' once, above their diagonals."""
    height = max(1, _BLOCK // max(1, size))
    for top in range(0, size - 1, height):
        yield slice(top, top + height), slice(top, size)


def above_diagonal(block: Tensor) -> Tensor:
    """bool, of the shape of `block`: where the column's number is above the row's."""
    return torch.ones_like(block, dtype=torch.bool).triu_(1)


def squared_distances(a: Tensor, b: Tensor, precision: float = 0.0) -> tuple[Tensor, Tensor]:
    """||a_i - b_j||^2, fp64 [I, J], and bool [I, J], where the data hardly resolve a distance.

    |a|^2 + |b|^2 - 2 a.b, from an origin amid the points, loses the digits of close points, which
    are computed again from their differences. A distance within the rounding of fp64 sums is 0.

    Args:
        a, b: fp64 [I, D] and [J, D].
        precision: distances above 0 and up to this share of the larger norm are hardly resolved.
    """
    origin = b.mean(0)
    from_origin = a - origin, b - origin
    lengths = _squared_norms(from_origin[0]).unsqueeze(1) + _squared_norms(from_origin[1])
    squared = lengths - 2 * from_origin[0] @ from_origin[1].T
    for i, j in _in_parts((squared <= _CLOSE * lengths).nonzero(), a.shape[1]):
        squared[i, j] = _squared_norms(a[i] - b[j])
    norms = torch.maximum(_squared_norms(a).unsqueeze(1), _squared_norms(b))
    squared.masked_fill_(squared <= ROUNDING**2 * norms, 0)
    return squared, (squared > 0) & (squared <= precision**2 * norms)


def _squared_norms(rows: Tensor) -> Tensor:
    return rows.square().sum(1)


def _in_parts(pairs: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The two columns [n] of the pairs, as many at a time as rows of `width` fit a block."""
    for part in pairs.split(max(1, _BLOCK // width)):
        yield part[:, 0], part[:, 1]
