"""hsic() against the textbook formulas, written out in loops or literal matrices in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastdean.evaluation.dependence import SIBLING_CODE_OPTIONS, hsic

ESTIMATORS = ["biased", "unbiased", "normalized"]


def _rows(n: int, num_features: int, seed: int) -> torch.Tensor:
    return torch.randn(
        n, num_features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def _dependent(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """y depends on x without being correlated with it."""
    x = _rows(n, 1, seed)
    return x, x.square() + 0.1 * _rows(n, 1, seed + 1)


def _gaussian_kernel(rows: torch.Tensor, width: float) -> list[list[float]]:
    return [
        [math.exp(-(math.dist(a, b) ** 2) / (2 * width**2)) for b in rows.tolist()]
        for a in rows.tolist()
    ]


def _linear_kernel(rows: torch.Tensor) -> list[list[float]]:
    return [
        [sum(p * q for p, q in zip(a, b, strict=True)) for b in rows.tolist()]
        for a in rows.tolist()
    ]


def _median_distance(rows: torch.Tensor) -> float:
    distances = sorted(
        math.dist(rows[i].tolist(), rows[j].tolist())
        for i in range(len(rows))
        for j in range(i + 1, len(rows))
    )
    middle = len(distances) // 2
    if len(distances) % 2:
        return distances[middle]
    return (distances[middle - 1] + distances[middle]) / 2


def _biased_by_sums(k: list[list[float]], m: list[list[float]]) -> float:
    """tr(K H L H)/(n-1)^2, multiplied out into sums over two, three and four indices."""
    n = len(k)
    index = range(n)
    pairs = sum(k[i][j] * m[i][j] for i in index for j in index)
    triples = sum(k[i][j] * m[i][q] for i in index for j in index for q in index)
    quadruples = sum(k[i][j] for i in index for j in index) * sum(
        m[i][j] for i in index for j in index
    )
    return (pairs - 2 * triples / n + quadruples / n**2) / (n - 1) ** 2


def _unbiased_by_sums(k: list[list[float]], m: list[list[float]]) -> float:
    """The U-statistic itself: averages over pairs, triples and quadruples of distinct indices."""
    index = range(len(k))
    pairs = [k[i][j] * m[i][j] for i in index for j in index if i != j]
    triples = [
        k[i][j] * m[i][q] for i in index for j in index for q in index if len({i, j, q}) == 3
    ]
    quadruples = [
        k[i][j] * m[q][r]
        for i in index
        for j in index
        for q in index
        for r in index
        if len({i, j, q, r}) == 4
    ]
    return (
        sum(pairs) / len(pairs)
        + sum(quadruples) / len(quadruples)
        - 2 * sum(triples) / len(triples)
    )


def _normalized_as_published(k: list[list[float]], m: list[list[float]]) -> float:
    """sum(R_x * R_y^T) with the kernel matrix centred on the right only."""
    n = len(k)
    centering = np.eye(n) - 1 / n

    def ratio(matrix: list[list[float]]) -> np.ndarray:
        centered = np.array(matrix) @ centering
        return centered @ np.linalg.inv(centered + 1e-5 * n * np.eye(n))

    return float((ratio(k) * ratio(m).T).sum())


ORACLES = {
    "biased": _biased_by_sums,
    "unbiased": _unbiased_by_sums,
    "normalized": _normalized_as_published,
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("n", [4, 7])
def test_gaussian_value_is_the_textbook_formula(estimator, n):
    x, y = _rows(n, 3, 0), _rows(n, 2, 1)
    y[:, 0] += x[:, 0]
    result = hsic(x, y, estimator=estimator)
    width_x, width_y = _median_distance(x), _median_distance(y)
    expected = ORACLES[estimator](_gaussian_kernel(x, width_x), _gaussian_kernel(y, width_y))
    assert float(result) == pytest.approx(expected, rel=1e-9, abs=1e-14)
    assert result.bandwidth_x == pytest.approx(width_x, rel=1e-12)
    assert result.bandwidth_y == pytest.approx(width_y, rel=1e-12)
    assert (result.estimator, result.kernel, result.n) == (estimator, "gaussian", n)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_linear_value_is_the_textbook_formula(estimator):
    x, y = _rows(6, 3, 0), _rows(6, 2, 1)
    result = hsic(x, y, estimator=estimator, kernel="linear")
    expected = ORACLES[estimator](_linear_kernel(x), _linear_kernel(y))
    assert float(result) == pytest.approx(expected, rel=1e-9, abs=1e-14)
    assert result.bandwidth is None
    assert result.bandwidth_x is None
    assert result.bandwidth_y is None


def test_linear_biased_is_the_squared_norm_of_the_cross_covariance():
    x, y = _rows(20, 4, 0), _rows(20, 3, 1)
    covariance = np.cov(x.numpy().T, y.numpy().T)[:4, 4:]
    assert float(hsic(x, y, kernel="linear")) == pytest.approx((covariance**2).sum(), rel=1e-10)


def test_numeric_bandwidth_is_used_as_it_is():
    x, y = _rows(6, 3, 0), _rows(6, 2, 1)
    expected = _biased_by_sums(_gaussian_kernel(x, 0.7), _gaussian_kernel(y, 0.7))
    result = hsic(x, y, bandwidth=0.7)
    assert float(result) == pytest.approx(expected, rel=1e-10)
    assert (result.bandwidth_x, result.bandwidth_y) == (0.7, 0.7)


def test_sibling_code_options_are_the_published_variant():
    x, y = 30 * _rows(6, 5, 0), 30 * _rows(6, 8, 1)

    def kernel(rows):
        squared = torch.cdist(rows, rows).square()
        return torch.exp(-squared / (2 * 50.0**2 * rows.shape[1])).tolist()

    result = hsic(x, y, **SIBLING_CODE_OPTIONS)
    expected = _normalized_as_published(kernel(x), kernel(y))
    assert float(result) == pytest.approx(expected, rel=1e-8)
    assert result.bandwidth_x == pytest.approx(50.0 * math.sqrt(5))
    assert result.bandwidth_y == pytest.approx(50.0 * math.sqrt(8))


@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_value_survives_a_shift_and_a_common_reordering(estimator, kernel):
    x, y = _rows(12, 3, 0), _rows(12, 2, 1)
    y[:, 0] += x[:, 0]
    value = float(hsic(x, y, estimator=estimator, kernel=kernel))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    reordered = float(hsic(x[order], y[order], estimator=estimator, kernel=kernel))
    shifted = float(hsic(x + 1e4, y - 7.0, estimator=estimator, kernel=kernel))
    swapped = float(hsic(y, x, estimator=estimator, kernel=kernel))
    assert reordered == pytest.approx(value, rel=1e-9)
    assert shifted == pytest.approx(value, rel=1e-6)
    assert swapped == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_re_pairing_one_side_changes_the_value(estimator):
    x, y = _dependent(30)
    value = float(hsic(x, y, estimator=estimator))
    assert float(hsic(x, y.roll(7, dims=0), estimator=estimator)) < 0.7 * value


def test_median_bandwidth_makes_the_value_independent_of_the_unit():
    x, y = _dependent(15)
    assert float(hsic(1000.0 * x, 0.01 * y)) == pytest.approx(float(hsic(x, y)), rel=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_dependent_rows_lie_outside_the_permutation_null(estimator):
    x, y = _dependent(40)
    result = hsic(x, y, estimator=estimator, permutations=200)
    assert result.value > result.null_high
    assert result.null_low < result.null_mean < result.null_high
    assert result.p_value == pytest.approx(1 / 201)


def test_unbiased_is_about_zero_for_independent_rows():
    results = [
        hsic(_rows(30, 2, 2 * s), _rows(30, 2, 2 * s + 1), estimator="unbiased", permutations=100)
        for s in range(40)
    ]
    values = np.array([result.value for result in results])
    standard_error = values.std(ddof=1) / math.sqrt(len(values))
    assert abs(values.mean()) < 3 * standard_error
    inside = sum(result.null_low <= result.value <= result.null_high for result in results)
    assert inside >= 33
    # The biased estimator is of order 1/n here, so this test tells the two apart.
    biased = [float(hsic(_rows(30, 2, 2 * s), _rows(30, 2, 2 * s + 1))) for s in range(40)]
    assert np.mean(biased) > 10 * standard_error


def test_p_values_of_independent_rows_are_not_small_more_often_than_they_may():
    p_values = [
        hsic(_rows(20, 2, 2 * s), _rows(20, 2, 2 * s + 1), permutations=99).p_value
        for s in range(60)
    ]
    assert 0.3 < np.mean(p_values) < 0.7


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_null_is_the_values_of_re_paired_rows(estimator):
    x, y = _dependent(6)
    result = hsic(x, y, estimator=estimator, permutations=25, seed=5)
    generator = torch.Generator().manual_seed(5)
    orders = [torch.randperm(6, generator=generator) for _ in range(25)]
    null = [float(hsic(x, y[order], estimator=estimator)) for order in orders]
    assert result.null_mean == pytest.approx(np.mean(null), rel=1e-9, abs=1e-13)
    assert result.null_low == pytest.approx(np.quantile(null, 0.025), rel=1e-9, abs=1e-13)
    assert result.null_high == pytest.approx(np.quantile(null, 0.975), rel=1e-9, abs=1e-13)
    assert hsic(x, y, estimator=estimator, permutations=25, seed=5) == result


def test_equal_values_count_against_significance():
    groups = torch.tensor([[0.0], [0.0], [0.0], [1.0]])
    result = hsic(groups, groups, bandwidth=1.0, permutations=400)
    # A random pairing meets this value whenever it keeps the odd row in its place: 1 in 4.
    assert 0.15 < result.p_value < 0.35


def test_without_permutations_there_is_no_null():
    result = hsic(*_dependent(8))
    assert result.permutations == 0
    assert result.p_value is None
    assert result.null_mean is None


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_identical_rows_depend_on_nothing(estimator):
    constant = torch.ones(6, 3)
    result = hsic(constant, _rows(6, 2, 0), estimator=estimator, bandwidth=1.0)
    assert float(result) == pytest.approx(0.0, abs=1e-12)


def test_input_type_and_precision_do_not_matter():
    x, y = _rows(9, 3, 0).float(), _rows(9, 2, 1).bfloat16()
    expected = hsic(x.double(), y.double())
    assert hsic(x.requires_grad_(), y) == expected
    assert hsic(x.detach().numpy(), y.float().numpy()) == expected


BAD_CALLS = {
    "fewer_rows_in_y": (
        lambda: hsic(_rows(6, 2, 0), _rows(5, 2, 1)),
        ValueError,
        r"y must be of as many rows as x \(6\), got 5",
    ),
    "three_rows_unbiased": (
        lambda: hsic(_rows(3, 2, 0), _rows(3, 2, 1), estimator="unbiased"),
        ValueError,
        "x must be of at least 4 rows for the unbiased estimator, got 3",
    ),
    "one_row": (
        lambda: hsic(_rows(1, 2, 0), _rows(1, 2, 1)),
        ValueError,
        "x must be of at least 2 rows for the biased estimator, got 1",
    ),
    "nan": (
        lambda: hsic(_rows(4, 2, 0), torch.tensor([[0.0], [1.0], [math.nan], [2.0]])),
        ValueError,
        "y must be finite, got NaN or infinity in row 2",
    ),
    "one_dimension": (
        lambda: hsic(torch.ones(4), _rows(4, 2, 1)),
        ValueError,
        r"x must be of shape \[n, D\], got \[4\]",
    ),
    "list": (
        lambda: hsic([[1.0], [2.0]], _rows(2, 2, 1)),
        TypeError,
        "x must be a tensor or numpy array of real numbers, got list",
    ),
    "complex": (
        lambda: hsic(_rows(4, 2, 0), torch.zeros(4, 1, dtype=torch.complex64)),
        TypeError,
        "y must be a tensor or numpy array of real numbers, got torch.complex64",
    ),
    "estimator": (
        lambda: hsic(_rows(4, 2, 0), _rows(4, 2, 1), estimator="v-statistic"),
        ValueError,
        "estimator must be 'biased', 'unbiased' or 'normalized', got 'v-statistic'",
    ),
    "kernel": (
        lambda: hsic(_rows(4, 2, 0), _rows(4, 2, 1), kernel="laplace"),
        ValueError,
        "kernel must be 'gaussian' or 'linear', got 'laplace'",
    ),
    "bandwidth_of_a_linear_kernel": (
        lambda: hsic(_rows(4, 2, 0), _rows(4, 2, 1), kernel="linear", bandwidth=1.0),
        ValueError,
        "bandwidth must be left out with a linear kernel, got 1.0",
    ),
    "zero_bandwidth": (
        lambda: hsic(_rows(4, 2, 0), _rows(4, 2, 1), bandwidth=0.0),
        ValueError,
        "bandwidth must be 'median', a positive number or .* got 0.0",
    ),
    "unknown_bandwidth": (
        lambda: hsic(_rows(4, 2, 0), _rows(4, 2, 1), bandwidth=("per_row", 2.0)),
        ValueError,
        r"bandwidth must be 'median', .* got \('per_row', 2.0\)",
    ),
    "median_of_identical_rows": (
        # Five of six rows are the same; a distance by matrix products would find them apart.
        lambda: hsic(_rows(6, 2, 0), _rows(2, 9, 1)[[0, 0, 0, 0, 0, 1]]),
        ValueError,
        "y must have a positive median distance for bandwidth='median', got 0",
    ),
    "infinite_median": (
        lambda: hsic(_rows(9, 3, 0) * 1e200, _rows(9, 3, 1)),
        ValueError,
        "x must have a finite median distance for bandwidth='median', got inf",
    ),
    "infinite_products": (
        lambda: hsic(_rows(9, 3, 0), _rows(9, 3, 1) * 1e200, kernel="linear"),
        ValueError,
        "y must have finite products of its rows",
    ),
    "infinite_value": (
        lambda: hsic(_rows(9, 3, 0) * 1e100, _rows(9, 3, 1) * 1e100, kernel="linear"),
        ValueError,
        "x and y must have a finite HSIC, got ",
    ),
    "infinite_bandwidth": (
        lambda: hsic(_rows(4, 2, 0), _rows(4, 2, 1), bandwidth=("per_feature", 1.7e308)),
        ValueError,
        "bandwidth must be positive and finite in float64, got inf",
    ),
    "permutations": (
        lambda: hsic(_rows(4, 2, 0), _rows(4, 2, 1), permutations=-1),
        ValueError,
        "permutations must be at least 0, got -1",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_errors_name_what_was_expected(case):
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call()
