"""The fused selection at every expert of a stacked weight, against float64 and expert by expert."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from machine import DEVICE

from fastdean import native
from fastdean.ops import (
    accumulate_expert_importance_,
    select_expert_importance,
    select_importance,
    select_top,
)

NATIVE = ["native"] if DEVICE.type == "cpu" and native.status().state == "available" else []
IMPL = pytest.mark.parametrize("impl", ["reference", *NATIVE])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Seven tokens of the model, each at some of four experts; expert 2 gets none. In no order.
SEGMENTS = torch.tensor([[5, 9], [0, 3], [9, 12], [3, 5], [12, 12], [12, 14]])
EXPERTS = torch.tensor([1, 0, 3, 1, 0, 3])
SETS = torch.tensor([0, 0, 2, 2, 2, 0])
X_ROWS = torch.tensor([0, 1, 2, 0, 4, 6, 5, 3, 0, 2, 6, 4, 1, 5])
G_ROWS = torch.tensor([3, 0, 2, 2, 9, 1, 0, 7, 4, 5, 8, 8, 6, 3])


def random(*shape, seed, dtype=torch.float32):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(DEVICE, dtype)


def gathered(rows, columns, dtype):
    """Arguments whose tokens share rows of x and of g, with the sets' numbers of examples."""
    x, g = random(7, columns, seed=1, dtype=dtype), random(10, rows, seed=2, dtype=dtype)
    weight = random(4, rows, columns, seed=3, dtype=dtype)
    x_rows, g_rows = X_ROWS.to(DEVICE), G_ROWS.to(DEVICE)
    return {
        **{"x": x, "g": g, "segments": SEGMENTS, "experts": EXPERTS, "sets": SETS},
        **{"weight": weight, "num_examples": [3, 1, 2], "x_rows": x_rows, "g_rows": g_rows},
    }


@pytest.mark.parametrize("rows, columns", [(1, 1), (33, 65), (40, 17)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@IMPL
def test_what_is_selected_is_what_float64_selects_but_for_rounding(impl, dtype, rows, columns):
    each, ks = gathered(rows, columns, dtype), [4, 3, 100_000]
    found = select_expert_importance(**each, k=ks, signed=True, impl=impl)
    numel = rows * columns
    x, g = each["x"][each["x_rows"]].double(), each["g"][each["g_rows"]].double()
    for number, (index, sums, signed) in enumerate(found):
        assert index.dtype == torch.int64 and bool((index.diff() > 0).all())
        for expert in range(4):
            mine = SEGMENTS[(number == SETS) & (expert == EXPERTS)].tolist()
            products = [g[start:end].T @ x[start:end] for start, end in mine]
            exact = sum(product.abs() for product in products) if products else x.new_zeros(1)
            exact = torch.broadcast_to(torch.as_tensor(exact), (rows, columns))
            magnitude = each["weight"][expert].double().abs()
            oracle = (exact * magnitude / each["num_examples"][number]).flatten()
            here = (index >= expert * numel) & (index < (expert + 1) * numel)
            k = min(ks[number], int((oracle > 0).sum()))
            assert int(here.sum()) == k
            if k == 0:
                continue
            at = index[here] - expert * numel
            least = oracle.topk(k).values[-1]
            assert bool((oracle[at] >= least * (1 - 1e-5)).all())
            torch.testing.assert_close(
                sums[here].double(), exact.flatten()[at], rtol=2e-5, atol=1e-5
            )
            torch.testing.assert_close(
                signed[here].double(), sum(products).flatten()[at], rtol=2e-5, atol=1e-5
            )


@IMPL
@settings(deadline=None, max_examples=30, database=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 6)), max_size=8),
    st.lists(st.integers(0, 40), min_size=2, max_size=2),
    st.integers(0, 1000),
)
def test_each_expert_is_an_ordinary_weight(impl, examples, k, seed):
    lengths = torch.tensor([length for _, _, length in examples], dtype=torch.int64)
    ends = lengths.cumsum(0)
    segments = torch.stack([ends - lengths, ends], dim=1)
    experts = torch.tensor([expert for expert, _, _ in examples], dtype=torch.int64)
    sets = torch.tensor([number for _, number, _ in examples], dtype=torch.int64)
    # Whole numbers: every order of additions gives the same, and ties are many.
    x, g = (random(int(lengths.sum()), n, seed=seed + n).round() for n in (5, 7))
    weight = random(3, 7, 5, seed=seed).round()
    counts = [max(1, int((sets == number).sum())) for number in range(2)]
    found = select_expert_importance(
        x, g, segments, experts, sets, weight, k, counts, signed=True, impl=impl
    )
    for number, (index, sums, signed) in enumerate(found):
        parts = []
        for expert in range(3):
            # The divisor of the set, also where an expert saw few of its examples: the others are
            # of no token.
            is_mine = (sets == number) & (experts == expert)
            mine = torch.where(is_mine[:, None], segments, 0)[sets == number]
            one = torch.zeros(len(mine), dtype=torch.int64)
            parts += select_importance(x, g, mine, one, weight[expert], [k[number]], signed=True)
            parts[-1] = (parts[-1][0] + expert * 35, *parts[-1][1:])
        expected = [torch.cat(part) for part in zip(*parts, strict=True)]
        assert torch.equal(index, expected[0])
        assert torch.equal(sums, expected[1]) and torch.equal(signed, expected[2])


@IMPL
def test_tokens_may_be_given_as_they_are_or_by_their_rows(impl):
    each = gathered(9, 17, torch.float32)
    x, g = each["x"][each["x_rows"]], each["g"][each["g_rows"]]
    expected = select_expert_importance(**each, k=[5, 5, 50], impl=impl)
    for change in ({"x": x, "x_rows": None}, {"g": g, "g_rows": None}):
        found = select_expert_importance(**each | change, k=[5, 5, np.int64(50)], impl=impl)
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@IMPL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_batches_the_sums_are_those_of_a_call_for_each_batch(impl, dtype):
    lengths = torch.tensor([5, 9, 4, 7, 30, 2, 3, 8, 40, 6, 5, 1])
    ends = lengths.cumsum(0)
    segments = torch.stack([ends - lengths, ends], dim=1)
    experts = torch.tensor([0, 2] * 6)
    sets = torch.tensor([1] * 8 + [0] * 4)
    batches = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 0, 0, 5, 5])
    x, g = (random(int(lengths.sum()), n, seed=n, dtype=dtype) for n in (33, 70))
    weight = random(3, 70, 33, seed=1, dtype=dtype)
    found = select_expert_importance(
        x, g, segments, experts, sets, weight, [99, 99], [4, 8], batches=batches, impl=impl
    )
    for number, (index, sums) in enumerate(found):
        dense = torch.zeros(3, 70, 33, device=DEVICE)
        for batch in batches[sets == number].unique():
            mine = (sets == number) & (batches == batch)
            of_batch, order = experts[mine].sort(stable=True)
            accumulate_expert_importance_(dense, x, g, segments[mine][order], of_batch, impl=impl)
        picked = [
            select_top(dense[e], weight[e], [4, 8][number], 99, impl=impl) + e * 2310
            for e in range(3)
        ]
        assert torch.equal(index, torch.cat(picked))
        assert torch.equal(sums, dense.flatten()[index])


@IMPL
def test_nothing_to_select(impl):
    none = torch.zeros(0, dtype=torch.int64)
    x, g, weight = torch.ones(2, 4), torch.ones(2, 3), torch.ones(2, 3, 4)
    for stack in (weight, weight[:0]):
        arguments = [each.to(DEVICE) for each in (x, g)], none.view(0, 2), stack.to(DEVICE)
        (on_x, on_g), segments, stacked = arguments
        found = select_expert_importance(
            on_x, on_g, segments, none, none, stacked, [2, 0], [1, 1], signed=True, impl=impl
        )
        assert [[part.tolist() for part in of_set] for of_set in found] == [[[], [], []]] * 2


@IMPL
def test_the_first_importance_that_is_not_finite_is_named(impl):
    each = gathered(9, 17, torch.float32)
    # Also of an expert that saw no token.
    each["weight"][2, 4, 3] = float("nan")
    place = 2 * 153 + 4 * 17 + 3
    with pytest.raises(ValueError, match=f"must be finite, got nan at flat index {place}; check"):
        select_expert_importance(**each, k=[1, 1, 1], impl=impl)


SAME_GROUP = {"sets": torch.tensor([1, 1]), "experts": torch.tensor([0, 0])}


@pytest.mark.parametrize(
    "change, error, text",
    [
        (
            {"weight": torch.ones(3, 4)},
            ValueError,
            r"weight must be \[E, R, C\], got \[3, 4\]; stack",
        ),
        ({"weight": torch.ones(2, 4, 3)}, ValueError, r"weight must be \[2, 3, 4\] on cpu, got"),
        ({"num_examples": [1]}, ValueError, "num_examples must have a number for each of 2 sets"),
        (
            {"num_examples": [1, 0]},
            ValueError,
            "each num_examples must be at least 1, got 0; count",
        ),
        ({"num_examples": 2}, TypeError, "num_examples must be a list with a number for each set"),
        (
            {"experts": torch.tensor([0, 2])},
            ValueError,
            "experts must lie in 0..1, got 0 to 2; wei",
        ),
        ({"experts": [0, 1]}, TypeError, "experts must be a tensor, got list"),
        (
            {"experts": torch.tensor([0])},
            ValueError,
            r"experts must be int64 \[2\] on the CPU, one",
        ),
        ({"sets": torch.tensor([0, -1])}, ValueError, "sets must lie in 0..1, got -1 to 0; k has"),
        (
            {"x_rows": torch.tensor([0, 6])},
            ValueError,
            "x_rows must lie in 0..5, got 0 to 6; x has",
        ),
        (
            {"g_rows": torch.tensor([0])},
            ValueError,
            "x and g must have as many tokens, got 6 and 1",
        ),
        ({"g": torch.ones(5, 3)}, ValueError, "with the same N, got"),
        (
            {"batches": torch.tensor([0])},
            ValueError,
            r"batches must be int64 \[2\] on the CPU, one per segment, got torch.int64 \[1\]",
        ),
        (
            {"batches": torch.tensor([1, 0]), **SAME_GROUP},
            ValueError,
            "batches must be in ascending order within a set at an expert, got a lower one",
        ),
        (
            {"x_rows": torch.zeros(6)},
            ValueError,
            r"x_rows must be int64 \[N\] on cpu, got torch.fl",
        ),
        ({"segments": torch.tensor([[0, 3], [3, 7]])}, ValueError, "<= end <= 6, got rows from 0"),
    ],
)
def test_errors(change, error, text):
    arguments = {
        **{"x": torch.ones(6, 4), "g": torch.ones(6, 3), "weight": torch.ones(2, 3, 4)},
        **{"segments": torch.tensor([[0, 3], [3, 6]]), "experts": torch.tensor([0, 1])},
        **{"sets": torch.tensor([0, 1]), "k": [1, 2], "num_examples": [1, 1]},
    }
    with pytest.raises(error, match=text):
        select_expert_importance(**arguments | change)
