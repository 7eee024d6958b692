"""`select_top` is a stable sort of the positive entries, exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastdean.ops import select_top
from fastdean.ops.selection import importance

DENORMAL, LARGEST = 1e-45, 3.4e38


def expected(value, k):
    """The k largest positive values of a list, ties to the lowest index, in ascending order."""
    order = sorted((i for i, v in enumerate(value) if v > 0), key=lambda i: (-value[i], i))
    return sorted(order[:k])


# Few distinct values, so that nearly every list has ties, and the ends of the fp32 range.
values = st.sampled_from([0.0, -0.0, DENORMAL, 1e-38, 0.5, 1.0, 1.0 + 2**-23, 2.0, 1e30, LARGEST])


@settings(deadline=None, max_examples=300, database=None)
@given(st.lists(values, max_size=60), st.integers(0, 70))
@example([1.0] * 40, 7)
@example([0.0] * 40, 7)
@example([DENORMAL] * 5 + [0.0] * 5, 8)
@example([], 3)
@example([LARGEST, 1e30, LARGEST], 2)
def test_units_are_a_stable_sort_of_the_positive_entries(sums, k):
    sums = torch.tensor(sums, dtype=torch.float32)
    chosen = select_top(sums, None, 1, k)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == expected(sums.tolist(), k)


@settings(deadline=None, max_examples=200, database=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 9), st.integers(0, 90))
def test_weights_multiply_before_the_sort(seed, rows, columns, k):
    generator = torch.Generator().manual_seed(seed)
    sums = torch.randint(0, 4, (rows, columns), generator=generator).float()
    weight = torch.randint(-2, 3, (rows, columns), generator=generator).to(torch.bfloat16)
    value = importance(sums, weight, 3)
    assert torch.equal(value, sums * weight.float().abs() / 3)
    assert select_top(sums, weight, 3, k).tolist() == expected(value.flatten().tolist(), k)


def test_flat_indices_are_row_major_whatever_the_strides():
    sums = torch.tensor([[1.0, 9.0, 2.0], [8.0, 3.0, 7.0]])
    for laid_out in (sums, sums.t().contiguous().t()):
        assert select_top(laid_out, torch.ones(2, 3), 1, 2).tolist() == [1, 3]


def test_ties_at_the_threshold_fill_from_the_lowest_index():
    sums = torch.tensor([1.0, 5.0, 1.0, 1.0, 5.0, 1.0])
    assert select_top(sums, None, 1, 3).tolist() == [0, 1, 4]
    assert select_top(sums, None, 1, 4).tolist() == [0, 1, 2, 4]


def test_a_weight_that_requires_grad_or_is_of_another_dtype_is_taken_as_numbers():
    sums = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        parameter = torch.nn.Parameter(weight.to(dtype))
        value = importance(sums, parameter, 2)
        assert value.dtype == torch.float32 and not value.requires_grad
        assert select_top(sums, parameter, 2, 3).tolist() == expected(value.flatten().tolist(), 3)


def test_the_sums_and_the_weight_are_left_as_they_were():
    sums, weight = torch.rand(6, 6), -torch.rand(6, 6)
    copies = sums.clone(), weight.clone()
    select_top(sums, weight, 4, 5)
    assert torch.equal(sums, copies[0]) and torch.equal(weight, copies[1])


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)])
def test_empty(shape):
    assert select_top(torch.zeros(shape), torch.zeros(shape), 1, 3).tolist() == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("k", [0, 2])
def test_nan_and_inf_raise_wherever_they_stand(bad, k):
    sums = torch.ones(3, 4)
    sums[1, 2] = bad
    with pytest.raises(ValueError, match=f"importance must be finite, got {bad} at flat index 6; "):
        select_top(sums, torch.ones(3, 4), 1, k)


def test_a_product_that_overflows_raises():
    with pytest.raises(ValueError, match="importance must be finite, got inf at flat index 0"):
        select_top(torch.tensor([LARGEST]), torch.tensor([10.0]), 1, 1)


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ((torch.ones(3).double(), None, 1, 1), TypeError, "sums must be torch.float32, got .*64; "),
        (
            (torch.ones(3), torch.ones(4), 1, 1),
            ValueError,
            r"shape of sums, \[3\], got \[4\]; pass",
        ),
        ((torch.ones(3), None, 1, -1), ValueError, "at least 0 and .* at least 1, got -1 and 1; "),
        ((torch.ones(3), None, 0, 1), ValueError, "at least 0 and .* at least 1, got 1 and 0; "),
    ],
)
def test_errors(arguments, error, text):
    with pytest.raises(error, match=text):
        select_top(*arguments)
