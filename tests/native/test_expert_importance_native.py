"""The compiled accumulation of stacked experts: bit for bit that of one weight after the other."""

from __future__ import annotations

import pytest
import torch
from cpu_levels import DTYPES, random

from fastdean import native

pytestmark = pytest.mark.usefixtures("extension")
# Of six experts the first, the third and the last have no example; examples of one token, empty,
# overlapping, out of order, of more tokens than a chunk takes.
SEGMENTS = torch.tensor([[2, 3], [40, 71], [5, 5], [3, 40], [0, 900], [900, 1203], [7, 700]])
EXPERTS = torch.tensor([1, 1, 1, 3, 4, 4, 4])


def one_by_one(acc, x, g, level):
    for expert in range(len(acc)):
        mine = SEGMENTS[expert == EXPERTS]
        native.accumulate_importance_(acc[expert], x, g, mine, level=level)
    return acc


@pytest.mark.parametrize("rows, columns", [(1, 1), (13, 33), (65, 7)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_level_has_the_bits_of_one_expert_after_the_other(level, dtype, rows, columns):
    x, g = random(1203, columns, seed=1, dtype=dtype), random(1203, rows, seed=2, dtype=dtype)
    acc = random(6, rows, columns, seed=3).abs()
    expected, before = one_by_one(acc.clone(), x, g, level), acc.clone()
    native.accumulate_expert_importance_(acc, x, g, SEGMENTS, EXPERTS, level=level)
    assert torch.equal(acc, expected)
    assert torch.equal(acc[[0, 2, 5]], before[[0, 2, 5]])


def spread(values):
    """`values` with NaN in the memory between its elements."""
    holder = torch.full([2 * n + 1 for n in values.shape], float("nan"), dtype=values.dtype)
    view = holder[tuple(slice(1, None, 2) for _ in values.shape)]
    view.copy_(values)
    return view


@pytest.mark.parametrize(
    "lay_out",
    [spread, lambda t: t.mT.clone().mT, lambda t: t.transpose(0, -1).clone().transpose(0, -1)],
)
def test_strides_and_threads_do_not_change_a_bit(level, lay_out):
    x, g = (random(1203, n, seed=n, dtype=torch.bfloat16) for n in (70, 50))
    expected = one_by_one(torch.zeros(6, 50, 70), x, g, level)
    experts = EXPERTS.repeat_interleave(2)[::2]
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            acc = lay_out(torch.zeros(6, 50, 70))
            segments = SEGMENTS.T.contiguous().T
            native.accumulate_expert_importance_(
                acc, lay_out(x), lay_out(g), segments, experts, level=level
            )
            assert torch.equal(acc, expected)
    finally:
        torch.set_num_threads(before)


def test_segments_out_of_range_and_other_dtypes_change_nothing():
    acc, x, g = torch.zeros(2, 3, 4), torch.ones(2, 4), torch.ones(2, 3)
    experts = torch.tensor([0, 1])
    with pytest.raises(IndexError, match="segments must satisfy 0 <= start <= end <= 2, got"):
        native.accumulate_expert_importance_(acc, x, g, torch.tensor([[0, 2], [1, 3]]), experts)
    with pytest.raises(
        TypeError, match="x and g must be float32, bfloat16 or float16, got float64"
    ):
        spans = torch.tensor([[0, 1], [1, 2]])
        native.accumulate_expert_importance_(acc, x.double(), g.double(), spans, experts)
    assert not acc.any()
