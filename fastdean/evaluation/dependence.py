"""Dependence of two samples: the Hilbert-Schmidt independence criterion (HSIC).

All three estimators are value = scale * <A(x), A(y)>, an inner product of two [n, n] matrices, each
made from one side alone:

    biased        A = H K H                            scale 1 / (n-1)^2      Gretton et al. 2005
    unbiased      A = U-centred K (diagonal 0)         scale 1 / (n (n-3))    Song et al. 2012
    normalized    A = H K H (H K H + eps n I)^-1       scale 1                Fukumizu et al. 2007

with H = I - 1/n. Permuting the pairs permutes the rows and columns of one A.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastdean.default_device import cpu_by_default
from fastdean.wording.mendable import InputTypeError

Estimator = Literal["biased", "unbiased", "normalized"]
Kernel = Literal["gaussian", "linear"]
Bandwidth = float | str | tuple[str, float]

NORMALIZED_EPSILON = 1e-5

# The variant in code published by DEAN's first author for a sibling paper. What the DEAN paper
# itself used is not stated there.
SIBLING_CODE_OPTIONS = {
    "estimator": "normalized",
    "kernel": "gaussian",
    "bandwidth": ("per_feature", 50.0),
}

_MINIMUM_ROWS = {"biased": 2, "unbiased": 4, "normalized": 2}


@dataclass(frozen=True)
class HSICResult:
    """A value of HSIC, with everything needed to name and to read it.

    `float(result)` is the value. `bandwidth` is the rule asked for, `bandwidth_x` and `bandwidth_y`
    the standard deviations it gave (None with a linear kernel). The `null_*` fields and `p_value`
    are None unless permutations were asked for: mean, 2.5 % and 97.5 % point of the values under
    random pairings, and the one-sided (1 + #{null >= value}) / (1 + permutations).
    """

    value: float
    estimator: str
    kernel: str
    bandwidth: Bandwidth | None
    bandwidth_x: float | None
    bandwidth_y: float | None
    n: int
    permutations: int = 0
    null_mean: float | None = None
    null_low: float | None = None
    null_high: float | None = None
    p_value: float | None = None

    def __float__(self) -> float:
        return self.value


@cpu_by_default
def hsic(
    x: Tensor | np.ndarray,
    y: Tensor | np.ndarray,
    *,
    estimator: Estimator = "biased",
    kernel: Kernel = "gaussian",
    bandwidth: Bandwidth = "median",
    permutations: int = 0,
    seed: int = 0,
) -> HSICResult:
    """Estimate the dependence of the paired rows of `x` and `y`.

    In plain torch, for the biased estimator with kernel matrices K of x and L of y:

        H = torch.eye(n) - 1 / n
        value = torch.trace(K @ H @ L @ H) / (n - 1) ** 2

    Args:
        x: [n, D1], any real dtype and device; computed in float64 on the CPU.
        y: [n, D2]; row i is the partner of row i of `x`.
        estimator:
            "biased": tr(K H L H) / (n-1)^2, Gretton et al. 2005. At least 0, of order 1/n for
            independent data. n >= 2.
            "unbiased": Song et al. 2012. Expectation 0 for independent data, so it can be
            negative. n >= 4.
            "normalized": tr(R_x R_y), R = Kc (Kc + eps n I)^-1 with eps = 1e-5, the empirical
            normalised cross-covariance of Fukumizu et al. 2007, between 0 and n - 1. Kc = H K H;
            the published code of the sibling paper takes K H, which gives the same trace. For few
            rows of many features at the median bandwidth, eps n is small against the eigenvalues
            of Kc and the value close to n - 1 whatever the data: read it against the permutation
            null. n >= 2.
        kernel: "gaussian", exp(-||a - b||^2 / (2 s^2)), or "linear", <a, b>.
        bandwidth: s of the Gaussian kernel, chosen for x and for y on its own.
            "median": the median of ||a_i - a_j|| over i < j, where that is positive.
            A positive number: s itself, for both sides.
            ("per_feature", c): s = c * sqrt(D), that is exp(-||a - b||^2 / (2 c^2 D)).
            Must be left at its default with a linear kernel, which has none.
        permutations: number of random re-pairings (rows of y permuted) that make the null.
        seed: of the permutations; the same seed gives the same null.

    Rows that are all identical are independent of everything: with a bandwidth given as a number
    the value is 0 up to rounding, while "median" raises, because there is no distance to go by.

    Raises:
        TypeError: `x` or `y` is neither a tensor nor an array of real numbers.
        ValueError: shapes, values or options out of range; a median distance of 0; values so large
            that a distance or the result is not finite in float64.
    """
    x = _as_rows(x, "x")
    y = _as_rows(y, "y")
    _check_options(x, y, estimator, kernel, bandwidth, permutations)
    kernel_x, bandwidth_x = _kernel_matrix(x, "x", kernel, bandwidth)
    kernel_y, bandwidth_y = _kernel_matrix(y, "y", kernel, bandwidth)
    side_x, scale = _one_side(kernel_x, estimator)
    side_y, _ = _one_side(kernel_y, estimator)
    value = scale * float((side_x * side_y).sum())
    if not math.isfinite(value):
        raise ValueError(
            f"x and y must have a finite HSIC, got {value}: their values are too large for "
            "float64; divide each by its standard deviation"
        )
    null: dict[str, float] = {}
    if permutations:
        null = _null_summary(value, scale * _permuted_products(side_x, side_y, permutations, seed))
    used = bandwidth if kernel == "gaussian" else None
    return HSICResult(
        value, estimator, kernel, used, bandwidth_x, bandwidth_y, len(x), permutations, **null
    )


def _as_rows(rows: Tensor | np.ndarray, name: str) -> Tensor:
    if isinstance(rows, np.ndarray) and rows.dtype.kind in "biuf":
        rows = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float64))
    if not isinstance(rows, Tensor) or rows.is_complex():
        kind = getattr(rows, "dtype", type(rows).__name__)
        raise InputTypeError(
            f"{name} must be a tensor or numpy array of real numbers, got {kind}; convert it first"
        )
    if rows.ndim != 2:
        raise ValueError(
            f"{name} must be of shape [n, D], got {list(rows.shape)}; reshape it to one row for "
            "each example"
        )
    rows = rows.detach().to(device="cpu", dtype=torch.float64)
    if not torch.isfinite(rows).all():
        bad = int((~torch.isfinite(rows).all(dim=1)).nonzero()[0])
        raise ValueError(f"{name} must be finite, got NaN or infinity in row {bad}; drop that row")
    return rows


def _check_options(
    x: Tensor,
    y: Tensor,
    estimator: str,
    kernel: str,
    bandwidth: Bandwidth,
    permutations: int,
) -> None:
    if estimator not in _MINIMUM_ROWS:
        raise ValueError(
            f"estimator must be 'biased', 'unbiased' or 'normalized', got {estimator!r}; pick one"
        )
    if kernel not in ("gaussian", "linear"):
        raise ValueError(f"kernel must be 'gaussian' or 'linear', got {kernel!r}; pick one")
    if kernel == "linear" and bandwidth != "median":
        raise ValueError(
            f"bandwidth must be left out with a linear kernel, got {bandwidth!r}; drop it or take "
            "kernel='gaussian'"
        )
    if len(x) != len(y):
        raise ValueError(
            f"y must be of as many rows as x ({len(x)}), got {len(y)}; rows are paired by index, "
            "cut the longer one"
        )
    if len(x) < _MINIMUM_ROWS[estimator]:
        raise ValueError(
            f"x must be of at least {_MINIMUM_ROWS[estimator]} rows for the {estimator} estimator, "
            f"got {len(x)}; give more examples"
        )
    if permutations < 0:
        raise ValueError(
            f"permutations must be at least 0, got {permutations}; 0 means no permutation null"
        )


def _kernel_matrix(
    rows: Tensor, name: str, kernel: str, bandwidth: Bandwidth
) -> tuple[Tensor, float | None]:
    """The kernel matrix [n, n] of the rows, and the bandwidth that the rule came to."""
    # Every estimator is invariant to a shift. Without it, a large common offset (massive
    # activations) would eat the digits of the products.
    rows = rows - rows.mean(dim=0)
    if kernel == "linear":
        products = rows @ rows.T
        if not torch.isfinite(products).all():
            raise ValueError(
                f"{name} must have finite products of its rows with a linear kernel, got NaN or "
                "infinity: its values are too large for float64; divide them by their standard "
                "deviation"
            )
        return products, None
    # The matrix-product form of the distance leaves identical rows about 1e-8 apart.
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    resolved = _resolve_bandwidth(distances, rows.shape[1], name, bandwidth)
    return torch.exp(-0.5 * (distances / resolved).square()), resolved


def _resolve_bandwidth(
    distances: Tensor, num_features: int, name: str, bandwidth: Bandwidth
) -> float:
    if isinstance(bandwidth, str) and bandwidth == "median":
        n = len(distances)
        rows, columns = torch.triu_indices(n, n, offset=1)
        median = float(np.median(distances[rows, columns].numpy()))
        if median == 0.0:
            raise ValueError(
                f"{name} must have a positive median distance for bandwidth='median', got 0: at "
                "least half of its pairs of rows are identical; drop the duplicates or pass a "
                "number"
            )
        if not math.isfinite(median):
            raise ValueError(
                f"{name} must have a finite median distance for bandwidth='median', got {median}: "
                "its values are too large for float64; divide them by their standard deviation"
            )
        return median
    number: Any = bandwidth
    factor = 1.0
    if isinstance(bandwidth, tuple) and len(bandwidth) == 2 and bandwidth[0] == "per_feature":
        number, factor = bandwidth[1], math.sqrt(num_features)
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    if not is_number or not 0.0 < number < math.inf:
        raise ValueError(
            "bandwidth must be 'median', a positive number or ('per_feature', positive number), "
            f"got {bandwidth!r}; pick one of the three"
        )
    resolved = float(number) * factor
    if not 0.0 < resolved < math.inf:
        raise ValueError(
            f"bandwidth must be positive and finite in float64, got {resolved} of {bandwidth!r} "
            f"for {num_features} features; pick another number"
        )
    return resolved


def _one_side(kernel_matrix: Tensor, estimator: str) -> tuple[Tensor, float]:
    """A(x) of the module's docstring, and the scale of the product of two of them."""
    n = len(kernel_matrix)
    if estimator == "unbiased":
        return _u_centered(kernel_matrix), 1.0 / (n * (n - 3))
    centered = _doubly_centered(kernel_matrix)
    if estimator == "biased":
        return centered, 1.0 / (n - 1) ** 2
    ridge = NORMALIZED_EPSILON * n * torch.eye(n, dtype=centered.dtype)
    # Kc and (Kc + ridge)^-1 commute, so solving from the left is the same matrix.
    return torch.linalg.solve(centered + ridge, centered), 1.0


def _doubly_centered(matrix: Tensor) -> Tensor:
    row_means = matrix.mean(dim=1, keepdim=True)
    return matrix - row_means - row_means.T + matrix.mean()


def _u_centered(matrix: Tensor) -> Tensor:
    """Centred over the off-diagonal entries, so that the product is Song et al.'s unbiased HSIC.

    With K~ = K, diagonal 0: sum(U_x * U_y) = tr(K~ L~) + (1'K~1)(1'L~1) / ((n-1)(n-2))
    - 2/(n-2) 1'K~ L~ 1 (Szekely & Rizzo 2014).
    """
    n = len(matrix)
    off_diagonal = matrix.clone().fill_diagonal_(0.0)
    row_sums = off_diagonal.sum(dim=1, keepdim=True)
    centered = (
        off_diagonal - (row_sums + row_sums.T) / (n - 2) + off_diagonal.sum() / ((n - 1) * (n - 2))
    )
    return centered.fill_diagonal_(0.0)


def _permuted_products(side_x: Tensor, side_y: Tensor, permutations: int, seed: int) -> Tensor:
    """<A(x), A(y) with its rows and columns permuted>, float64 [permutations]."""
    generator = torch.Generator().manual_seed(seed)
    products = torch.zeros(permutations, dtype=torch.float64)
    for index in range(permutations):
        order = torch.randperm(len(side_y), generator=generator)
        products[index] = (side_x * side_y[order][:, order]).sum()
    return products


def _null_summary(value: float, null: Tensor) -> dict[str, float]:
    # Re-pairings of tied rows give the same value but sum it in another order: count them as ties.
    rounding = 1e-12 * max(abs(value), float(null.abs().max()))
    at_least = int((null >= value - rounding).sum())
    low, high = np.quantile(null.numpy(), [0.025, 0.975])
    return {
        "null_mean": float(null.mean()),
        "null_low": float(low),
        "null_high": float(high),
        "p_value": (1 + at_least) / (1 + len(null)),
    }
