"""`select_top` is a stable sort of the positive entries, exactly, whatever implements it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from machine import DEVICE

from fastdean import native
from fastdean.ops import select_top
from fastdean.ops.reference import importance

DENORMAL, LARGEST = 1e-45, 3.4e38
# On the CPU, where the extension is built; tests/test_package.py fails where it should be.
NATIVE = ["native"] if DEVICE.type == "cpu" and native.status().state == "available" else []
IMPL = pytest.mark.parametrize("impl", ["reference", "triton", *NATIVE])
# Those that run on a CPU at full speed.
FAST = pytest.mark.parametrize("impl", ["reference", *NATIVE])
# Of the interpreter that runs the kernels on a CPU: its arithmetic is NumPy's.
OVERFLOWS = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def expected(value, k):
    """The k largest positive values of a list, ties to the lowest index, in ascending order."""
    order = sorted((i for i, v in enumerate(value) if v > 0), key=lambda i: (-value[i], i))
    return sorted(order[:k])


# Few distinct values, so that nearly every list has ties, and the ends of the fp32 range.
values = st.sampled_from([0.0, -0.0, DENORMAL, 1e-38, 0.5, 1.0, 1.0 + 2**-23, 2.0, 1e30, LARGEST])


def check_units(sums, k, impl):
    sums = torch.tensor(sums, dtype=torch.float32, device=DEVICE)
    chosen = select_top(sums, None, 1, k, impl=impl)
    assert chosen.dtype == torch.int64 and chosen.device == sums.device
    assert chosen.tolist() == expected(sums.tolist(), k)


@FAST
@settings(deadline=None, max_examples=300, database=None)
@given(st.lists(values, max_size=60), st.integers(0, 70))
@example([1.0] * 40, 7)
@example([0.0] * 40, 7)
@example([DENORMAL] * 5 + [0.0] * 5, 8)
@example([], 3)
@example([LARGEST, 1e30, LARGEST], 2)
def test_units_are_a_stable_sort_of_the_positive_entries(impl, sums, k):
    check_units(sums, k, impl)


@settings(deadline=None, max_examples=15, database=None)
@given(st.lists(values, max_size=200), st.integers(0, 220))
@example([1.0] * 40, 7)
@example([0.0] * 40, 7)
@example([DENORMAL] * 5 + [0.0] * 5, 8)
@example([], 3)
@example([LARGEST, 1e30, LARGEST], 2)
def test_units_are_a_stable_sort_for_the_kernels_too(sums, k):
    check_units(sums, k, "triton")


def check_weights(seed, rows, columns, k, num_examples, impl):
    generator = torch.Generator().manual_seed(seed)
    sums = torch.randint(0, 4, (rows, columns), generator=generator).float()
    weight = torch.randint(-2, 3, (rows, columns), generator=generator).to(torch.bfloat16)
    value = importance(sums, weight, num_examples)
    assert torch.equal(value, sums * weight.float().abs() / num_examples)
    chosen = select_top(sums.to(DEVICE), weight.to(DEVICE), num_examples, k, impl=impl)
    assert chosen.tolist() == expected(value.flatten().tolist(), k)


@FAST
@settings(deadline=None, max_examples=200, database=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 9), st.integers(0, 90))
def test_weights_multiply_before_the_sort(impl, seed, rows, columns, k):
    check_weights(seed, rows, columns, k, 3, impl)


@settings(deadline=None, max_examples=10, database=None)
@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 30), st.integers(0, 90))
def test_weights_multiply_before_the_sort_in_the_kernels_too(seed, rows, columns, k):
    check_weights(seed, rows, columns, k, 3, "triton")


@IMPL
def test_flat_indices_are_row_major_whatever_the_strides(impl):
    sums = torch.tensor([[1.0, 9.0, 2.0], [8.0, 3.0, 7.0]], device=DEVICE)
    weight = torch.ones(2, 3, device=DEVICE)
    for laid_out in (sums, sums.t().contiguous().t()):
        assert select_top(laid_out, weight, 1, 2, impl=impl).tolist() == [1, 3]
        assert select_top(weight, laid_out, 1, 2, impl=impl).tolist() == [1, 3]


@IMPL
def test_ties_at_the_threshold_fill_from_the_lowest_index(impl):
    sums = torch.tensor([1.0, 5.0, 1.0, 1.0, 5.0, 1.0], device=DEVICE)
    assert select_top(sums, None, 1, 3, impl=impl).tolist() == [0, 1, 4]
    assert select_top(sums, None, 1, 4, impl=impl).tolist() == [0, 1, 2, 4]


@IMPL
def test_ties_that_the_division_makes_are_ties(impl):
    # Two neighbours in fp32 whose thirds round to the same number.
    low = 1.5 + 2**-23
    sums = torch.tensor([low, low + 2**-23, low + 2**-22], device=DEVICE)
    thirds = (sums.cpu() / torch.tensor(3.0)).tolist()
    assert len(set(thirds)) < 3
    for k in (1, 2):
        assert select_top(sums, None, 3, k, impl=impl).tolist() == expected(thirds, k)


@IMPL
def test_a_quotient_that_rounds_to_zero_is_not_positive(impl):
    sums = torch.tensor([DENORMAL, 1e-40, DENORMAL], device=DEVICE)
    assert select_top(sums, None, 1000, 3, impl=impl).tolist() == [1]


@pytest.mark.parametrize(
    "impl, dtype",
    [
        *(("reference", dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16)),
        *(("triton", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
        *((impl, dtype) for impl in NATIVE for dtype in (torch.float64, torch.float16)),
    ],
    ids=str,
)
def test_a_weight_that_requires_grad_or_is_of_another_dtype_is_taken_as_numbers(impl, dtype):
    sums = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    parameter = torch.nn.Parameter(weight.to(dtype))
    value = importance(sums, parameter, 2)
    assert value.dtype == torch.float32 and not value.requires_grad
    chosen = select_top(sums.to(DEVICE), parameter.to(DEVICE), 2, 3, impl=impl)
    assert chosen.tolist() == expected(value.flatten().tolist(), 3)


@IMPL
def test_the_sums_and_the_weight_are_left_as_they_were(impl):
    sums, weight = torch.rand(6, 6, device=DEVICE), -torch.rand(6, 6, device=DEVICE)
    copies = sums.clone(), weight.clone()
    select_top(sums, weight, 4, 5, impl=impl)
    assert torch.equal(sums, copies[0]) and torch.equal(weight, copies[1])


@IMPL
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)])
def test_empty(impl, shape):
    nothing = torch.zeros(shape, device=DEVICE)
    assert select_top(nothing, nothing, 1, 3, impl=impl).tolist() == []


@IMPL
@OVERFLOWS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("k", [0, 2])
def test_nan_and_inf_raise_wherever_they_stand(impl, bad, k):
    sums = torch.ones(3, 4, device=DEVICE)
    sums[1, 2] = bad
    sums[2, 3] = float("nan")
    with pytest.raises(ValueError, match=f"importance must be finite, got {bad} at flat index 6; "):
        select_top(sums, torch.ones(3, 4, device=DEVICE), 1, k, impl=impl)


@IMPL
@OVERFLOWS
def test_a_weight_that_is_nan_raises(impl):
    weight = torch.tensor([1.0, float("nan"), 2.0], device=DEVICE)
    with pytest.raises(ValueError, match="importance must be finite, got nan at flat index 1"):
        select_top(torch.zeros(3, device=DEVICE), weight, 1, 1, impl=impl)


@IMPL
@OVERFLOWS
def test_a_product_that_overflows_raises(impl):
    sums, weight = torch.tensor([LARGEST], device=DEVICE), torch.tensor([10.0], device=DEVICE)
    with pytest.raises(ValueError, match="importance must be finite, got inf at flat index 0"):
        select_top(sums, weight, 1, 1, impl=impl)


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ((None, None, 1, 1), TypeError, "sums must be a tensor, got NoneType; make it"),
        ((torch.ones(3), [1.0] * 3, 1, 1), TypeError, "weight must be a tensor, got list; make"),
        ((torch.ones(3), torch.ones(3).int(), 1, 1), TypeError, "weight must be floating point"),
        ((torch.ones(3), None, 1, 2.0), TypeError, "k must be an integer, got float; use int"),
        ((torch.ones(3), None, 1, True), TypeError, "k must be an integer, got bool"),
        ((torch.ones(3), None, 1, torch.tensor(2)), TypeError, "k must be an integer, got Tensor"),
        ((torch.ones(3), None, 2.5, 1), TypeError, "num_examples must be an integer, got float"),
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


@IMPL
def test_integers_of_numpy_are_integers(impl):
    sums = torch.tensor([1.0, 3.0, 2.0], device=DEVICE)
    assert select_top(sums, None, np.int64(4), np.int32(2), impl=impl).tolist() == [1, 2]


@IMPL
def test_negated_views_are_read_as_what_they_are(impl):
    negated = torch.tensor([1 - 2j, 1 + 3j, 1 - 4j], device=DEVICE).conj().imag
    assert negated.is_neg()
    assert select_top(negated, None, 1, 2, impl=impl).tolist() == [0, 2]
    assert select_top(-negated, negated, 1, 2, impl=impl).tolist() == [1]
