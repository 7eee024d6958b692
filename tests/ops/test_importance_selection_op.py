"""The fused selection in every form, against float64 and the two operations it stands for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from machine import DEVICE

from fastdean import native
from fastdean.ops import accumulate_importance_, select_importance, select_top

NATIVE = ["native"] if DEVICE.type == "cpu" and native.status().state == "available" else []
IMPL = pytest.mark.parametrize("impl", ["reference", "triton", *NATIVE])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape, seed, dtype=torch.float32):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(DEVICE, dtype)


def spans(*pairs):
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


def exact(x, g, segments, weight):
    """Importance in float64."""
    sums = torch.zeros(weight.shape, dtype=torch.float64, device=DEVICE)
    for start, end in segments.tolist():
        sums += (g[start:end].double().T @ x[start:end].double()).abs()
    return sums * weight.double().abs() / max(1, len(segments))


@pytest.mark.parametrize("rows, columns", [(1, 1), (63, 129), (128, 17)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@IMPL
def test_what_is_selected_is_what_float64_selects_but_for_rounding(impl, dtype, rows, columns):
    x, g = random(40, columns, seed=1, dtype=dtype), random(40, rows, seed=2, dtype=dtype)
    weight = random(rows, columns, seed=3, dtype=dtype)
    segments, sets = (
        spans((2, 3), (10, 21), (5, 5), (3, 10), (0, 40)),
        torch.tensor([0, 0, 0, 2, 2]),
    )
    ks = [4, 4, 100]
    found = select_importance(x, g, segments, sets, weight, ks, impl=impl)
    for number, (index, sums) in enumerate(found):
        mine = segments[sets == number]
        oracle = exact(x, g, mine, weight).flatten()
        k = min(ks[number], int((oracle > 0).sum()))
        assert index.dtype == torch.int64 and sums.dtype == torch.float32 and len(index) == k
        if k == 0:
            continue
        assert bool((index.diff() > 0).all())
        at = oracle[index]
        least = oracle.topk(k).values[-1]
        assert bool((at >= least * (1 - 1e-5)).all())
        importance = sums.double() * weight.flatten()[index].double().abs() / len(mine)
        torch.testing.assert_close(importance, at, rtol=2e-5, atol=1e-5 * float(least))


# The interpreter takes too long for so many.
@pytest.mark.parametrize("impl", ["reference", *NATIVE])
@settings(deadline=None, max_examples=40, database=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), max_size=8),
    st.lists(st.integers(0, 40), min_size=3, max_size=3),
    st.integers(0, 1000),
)
def test_the_two_operations_select_the_same(impl, examples, k, seed):
    examples.sort(key=lambda example: example[0])
    lengths = torch.tensor([length for _, length in examples], dtype=torch.int64)
    ends = lengths.cumsum(0)
    segments = torch.stack([ends - lengths, ends], dim=1)
    sets = torch.tensor([number for number, _ in examples], dtype=torch.int64)
    # Whole numbers: every order of additions gives the same, and ties are many.
    x, g = (random(int(lengths.sum()), n, seed=seed + n).round() for n in (5, 7))
    weight = random(7, 5, seed=seed).round()
    found = select_importance(x, g, segments, sets, weight, k, impl=impl)
    for number, (index, sums) in enumerate(found):
        mine = segments[sets == number]
        dense = accumulate_importance_(torch.zeros(7, 5, device=DEVICE), x, g, mine)
        expected = select_top(dense, weight, max(1, len(mine)), k[number])
        assert torch.equal(index, expected) and torch.equal(sums, dense.flatten()[expected])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@IMPL
def test_signed_sums_stand_beside_those_of_absolute_values(impl, dtype):
    x, g = random(40, 17, seed=1, dtype=dtype), random(40, 9, seed=2, dtype=dtype)
    weight, k = random(9, 17, seed=3, dtype=dtype), [4, 4, 100]
    segments = spans((2, 3), (10, 21), (5, 5), (3, 10), (0, 40))
    sets = torch.tensor([0, 0, 0, 2, 2])
    plain = select_importance(x, g, segments, sets, weight, k, impl=impl)
    found = select_importance(x, g, segments, sets, weight, k, signed=True, impl=impl)
    for number, (index, sums, signed) in enumerate(found):
        assert torch.equal(index, plain[number][0]) and torch.equal(sums, plain[number][1])
        exact = torch.zeros(9, 17, dtype=torch.float64, device=DEVICE)
        for start, end in segments[sets == number].tolist():
            exact += g[start:end].double().T @ x[start:end].double()
        assert signed.dtype == torch.float32 and signed.device == index.device
        torch.testing.assert_close(signed.double(), exact.flatten()[index], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", *NATIVE])
def test_signed_sums_of_long_examples_are_taken_a_few_entries_at_a_time(impl):
    # More tokens than the entries of one product may have.
    x, g = torch.ones(2**20 + 1, 2, device=DEVICE), torch.ones(2**20 + 1, 1, device=DEVICE)
    x[:, 1] = -0.5
    segments, sets = spans((0, 2**20 + 1)), torch.tensor([0])
    weight = torch.ones(1, 2, device=DEVICE)
    ((_, _, signed),) = select_importance(x, g, segments, sets, weight, [2], signed=True, impl=impl)
    assert signed.tolist() == [2**20 + 1, -(2**19) - 0.5]


@IMPL
def test_the_order_of_the_examples_of_a_set_changes_rounding_only(impl):
    x, g, weight = random(90, 40, seed=1), random(90, 50, seed=2), random(50, 40, seed=3)
    segments = spans((0, 30), (30, 31), (31, 60), (60, 90))
    sets = torch.tensor([0, 0, 0, 0])
    ((index, sums),) = select_importance(x, g, segments, sets, weight, [30], impl=impl)
    other = segments[[2, 0, 3, 1]]
    ((turned, other_sums),) = select_importance(x, g, other, sets, weight, [30], impl=impl)
    assert torch.equal(index, turned)
    torch.testing.assert_close(sums, other_sums, rtol=1e-5, atol=1e-5)


@IMPL
def test_fp64_inputs_and_other_weights_are_taken(impl):
    x, g = random(9, 4, seed=1), random(9, 3, seed=2)
    segments, sets, weight = spans((0, 9)), torch.tensor([0]), torch.ones(3, 4, device=DEVICE)
    small = torch.nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)
    expected = select_importance(x, g, segments, sets, weight, [5], impl=impl)
    found = select_importance(x, g, segments, sets, small, [np.int64(5)], impl=impl)
    assert torch.equal(expected[0][0], found[0][0])
    double = select_importance(x.double(), g.double(), segments, sets, weight, [5])
    assert torch.equal(expected[0][0], double[0][0])


@IMPL
@pytest.mark.parametrize("rows, columns", [(0, 5), (5, 0), (3, 4)])
def test_nothing_to_select(impl, rows, columns):
    x, g = torch.ones(3, columns, device=DEVICE), torch.ones(3, rows, device=DEVICE)
    weight = torch.zeros(rows, columns, device=DEVICE)
    for index, sums in select_importance(
        x, g, spans((0, 3)), torch.tensor([1]), weight, [2, 2], impl=impl
    ):
        assert index.tolist() == [] and sums.tolist() == []
    assert select_importance(x, g, spans(), torch.tensor([]).long(), weight, [], impl=impl) == []


@IMPL
def test_nan_and_inf_raise(impl):
    x, g, weight = torch.ones(3, 4), torch.ones(3, 5), torch.ones(5, 4)
    x[1, 2] = float("nan")
    arguments = [each.to(DEVICE) for each in (x, g)], spans((0, 1), (0, 3)), torch.tensor([0, 1])
    (x, g), segments, sets = arguments
    with pytest.raises(ValueError, match="importance must be finite, got nan at flat index 2; "):
        select_importance(x, g, segments, sets, weight.to(DEVICE), [1, 1], impl=impl)


X, G, WEIGHT = torch.ones(6, 4), torch.ones(6, 3), torch.ones(3, 4)


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"x": None}, TypeError, "the inputs must be a tensor, got NoneType"),
        ({"segments": spans((0, 7), (0, 1))}, ValueError, "<= end <= 6, got rows from 0 to 7"),
        ({"weight": [1.0]}, TypeError, "weight must be a tensor, got list"),
        ({"weight": WEIGHT.int()}, TypeError, "weight must be floating point, got torch.int32"),
        ({"weight": WEIGHT.T}, ValueError, r"weight must be \[3, 4\] on cpu, got \[4, 3\] on cpu"),
        ({"k": 3}, TypeError, "k must be a list with a number for each set, got int; use"),
        ({"k": [1, 2.0]}, TypeError, "each k must be an integer, got float"),
        ({"k": [1, -2]}, ValueError, "each k must be at least 0, got -2; check"),
        ({"k": [1]}, ValueError, "sets must lie in 0..0, got 0 to 1; k has 1 sets"),
        ({"sets": torch.tensor([1, 0])}, ValueError, "sets must be in ascending order, got a"),
        ({"sets": torch.tensor([-1, 0])}, ValueError, r"sets must lie in 0..1, got -1 to 0"),
        ({"sets": torch.tensor([0])}, ValueError, r"sets must be int64 \[2\] on the CPU, one per"),
        ({"sets": [0, 1]}, TypeError, "sets must be a tensor, got list"),
    ],
)
def test_errors(change, error, text):
    arguments = {
        "x": X,
        "g": G,
        "segments": spans((0, 3), (3, 6)),
        "sets": torch.tensor([0, 1]),
        "weight": WEIGHT,
        "k": [1, 2],
    }
    with pytest.raises(error, match=text):
        select_importance(**arguments | change)


# The Triton form adds the examples of a set one by one, whatever their batch.
@pytest.mark.parametrize("impl", ["reference", *NATIVE])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_batches_the_sums_are_those_of_a_call_for_each_batch(impl, dtype):
    lengths = torch.tensor([5, 9, 4, 7, 30, 2, 3, 8, 40, 6, 5, 1])
    ends = lengths.cumsum(0)
    segments = torch.stack([ends - lengths, ends], dim=1)
    sets = torch.tensor([0] * 8 + [1] * 4)
    numbers = [[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 5, 5]]
    x, g = (random(int(lengths.sum()), n, seed=n, dtype=dtype) for n in (33, 70))
    weight = random(70, 33, seed=1, dtype=dtype)
    batches = torch.tensor([*numbers[0], *numbers[1]])
    found = select_importance(x, g, segments, sets, weight, [99, 99], batches=batches, impl=impl)
    for number, (index, sums) in enumerate(found):
        dense = torch.zeros(70, 33, device=DEVICE)
        for batch in sorted(set(numbers[number])):
            mine = segments[(sets == number) & (batches == batch)]
            accumulate_importance_(dense, x, g, mine, impl=impl)
        assert torch.equal(index, select_top(dense, weight, len(numbers[number]), 99))
        assert torch.equal(sums, dense.flatten()[index])


@pytest.mark.parametrize(
    "batches, text",
    [
        ([1, 0], "batches must be in ascending order within a set, got a lower one after a higher"),
        ([0, 0, 0], r"batches must be int64 \[2\] on the CPU, one per segment, got torch.int64 "),
    ],
)
def test_batches_that_do_not_fit_are_refused(batches, text):
    sets, batches = torch.tensor([0, 0]), torch.tensor(batches)
    with pytest.raises(ValueError, match=text):
        select_importance(X, G, spans((0, 3), (3, 6)), sets, WEIGHT, [1], batches=batches)
