"""The fused selection on the CPU: bit for bit the two operations that it stands for."""

from __future__ import annotations

import pytest
import torch
from cpu_levels import DTYPES, random

from fastdean import native

pytestmark = pytest.mark.usefixtures("extension")


def check(x, g, segments, sets, weight, k, level=None, batches=None):
    """The fused result, once it is that of the two operations, set by set and batch by batch."""
    found = native.select_importance(x, g, segments, sets, weight, k, batches=batches, level=level)
    batches = torch.zeros_like(sets) if batches is None else batches
    assert len(found) == len(k)
    for number, each in enumerate(k):
        mine = segments[sets == number]
        sums = torch.zeros(weight.shape)
        for batch in batches[sets == number].unique():
            of_batch = segments[(sets == number) & (batches == batch)]
            native.accumulate_importance_(sums, x, g, of_batch, level=level)
        expected = native.select_top(sums, weight, max(1, len(mine)), each)
        index, values = found[number]
        assert torch.equal(index, expected)
        assert torch.equal(values, sums.flatten()[expected])
    return found


def spread(values):
    """`values` with NaN in the memory between its elements."""
    fill = float("nan") if values.is_floating_point() else -1
    holder = torch.full([2 * n + 1 for n in values.shape], fill, dtype=values.dtype)
    view = holder[tuple(slice(1, None, 2) for _ in values.shape)]
    view.copy_(values)
    return view


# Of three sets, the second without an example; ragged, out of order, overlapping, one token, empty.
SEGMENTS = torch.tensor([[2, 3], [10, 21], [5, 5], [3, 10], [0, 37]])
SETS = torch.tensor([0, 0, 0, 2, 2])
# More tokens than one chunk takes, in one example and in several.
LONG = torch.tensor([[0, 500], [500, 501], [501, 800], [800, 1003], [3, 700]])


@pytest.mark.parametrize("rows, columns", [(1, 1), (6, 16), (13, 33), (65, 7), (130, 300)])
@pytest.mark.parametrize("segments", [SEGMENTS, LONG], ids=["ragged", "long"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_level_has_the_bits_of_the_two_operations(level, dtype, segments, rows, columns):
    tokens = int(segments.max())
    x, g = random(tokens, columns, seed=1, dtype=dtype), random(tokens, rows, seed=2, dtype=dtype)
    numel = rows * columns
    for weight_dtype in (dtype, torch.float64):
        weight = random(rows, columns, seed=3, dtype=weight_dtype)
        for k in ([0, 3, 1], [5, 5, numel // 3], [numel + 9] * 3):
            check(x, g, segments, SETS, weight, k, level)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_level_adds_the_batches_of_a_set_as_one_call_after_the_other(level, dtype):
    # Short examples, which a call adds together first; long ones, of which a chunk takes no two; a
    # batch of two sets, and one of nothing.
    lengths = torch.tensor([5, 9, 4, 7, 30, 2, 3, 8, 0, 0, 40, 6, 500, 300, 1])
    sets = torch.tensor([0] * 8 + [2] * 7)
    batches = torch.tensor([0, 0, 0, 1, 1, 4, 4, 4, 2, 2, 4, 4, 4, 9, 9])
    ends = lengths.cumsum(0)
    segments = torch.stack([ends - lengths, ends], dim=1)
    tokens = int(ends[-1])
    x, g = random(tokens, 33, seed=1, dtype=dtype), random(tokens, 70, seed=2, dtype=dtype)
    weight, k = random(70, 33, seed=3, dtype=dtype), [2310, 1, 99]
    plain = check(x, g, segments, sets, weight, k, level)
    found = check(x, g, segments, sets, weight, k, level, spread(batches))
    assert not torch.equal(found[0][1], plain[0][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_level_takes_more_columns_than_a_slab_of_x_holds(level, dtype):
    # So many tokens that the packed inputs of all columns take more than their room.
    tokens, columns = 8192, 4200
    x = torch.ones(1, columns, dtype=dtype).mul_(torch.arange(columns) % 7).expand(tokens, columns)
    g = random(tokens, 3, seed=2, dtype=dtype)
    segments, sets = torch.tensor([[0, 8192]]), torch.tensor([0])
    check(x, g, segments, sets, random(3, columns, seed=3), [50], level)


@pytest.mark.parametrize("lay_out", [lambda t: t, spread], ids=["contiguous", "spread"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_signed_sums_are_exact_to_one_rounding(level, dtype, lay_out):
    x, g = random(1003, 70, seed=1, dtype=dtype), random(1003, 150, seed=2, dtype=dtype)
    weight, k = random(150, 70, seed=3, dtype=dtype), [9, 1, 3000]
    plain = native.select_importance(x, g, LONG, SETS, weight, k, level=level)
    before = torch.get_num_threads()
    try:
        # So many entries that workers share them.
        torch.set_num_threads(3)
        found = native.select_importance(
            lay_out(x), lay_out(g), LONG, SETS, weight, k, signed=True, level=level
        )
    finally:
        torch.set_num_threads(before)
    for number, (index, sums, signed) in enumerate(found):
        assert torch.equal(index, plain[number][0]) and torch.equal(sums, plain[number][1])
        exact = torch.zeros(150, 70, dtype=torch.float64)
        for start, end in LONG[number == SETS].tolist():
            exact += g[start:end].double().T @ x[start:end].double()
        exact = exact.flatten()[index]
        assert signed.dtype == torch.float32 and len(signed) == len(index)
        torch.testing.assert_close(signed.double(), exact, rtol=1e-7, atol=1e-11)


def test_ties_go_to_the_lowest_index_wherever_the_tiles_lie(level):
    x, g = torch.ones(4, 700), torch.ones(4, 260)
    weight = torch.full((260, 700), -0.5)
    segments, sets = torch.tensor([[0, 2], [2, 4]]), torch.tensor([0, 1])
    for found in check(x, g, segments, sets, weight, [1000, 5], level):
        assert torch.equal(found[0], torch.arange(len(found[0])))


def test_importance_that_rises_with_every_entry(level):
    x = torch.arange(1.0, 701).unsqueeze(0)
    g = torch.arange(1.0, 131).unsqueeze(0)
    ((index, _),) = check(
        x, g, torch.tensor([[0, 1]]), torch.tensor([0]), torch.ones(130, 700), [40], level
    )
    assert index.max() == 130 * 700 - 1


@pytest.mark.parametrize("lay_out", [spread, lambda t: t.T.clone().T], ids=["spread", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_change_a_bit(dtype, lay_out):
    x, g = random(37, 70, seed=1, dtype=dtype), random(37, 50, seed=2, dtype=dtype)
    weight, k = random(50, 70, seed=3, dtype=dtype), [9, 1, 400]
    expected = check(x, g, SEGMENTS, SETS, weight, k)
    found = check(lay_out(x), lay_out(g), SEGMENTS.T.contiguous().T, SETS, weight, k)
    turned = native.select_importance(x, g, SEGMENTS, SETS, lay_out(weight), k)
    for one, other, third in zip(expected, found, turned, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
        assert torch.equal(one[0], third[0]) and torch.equal(one[1], third[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_a_bit(level, dtype):
    x, g = random(1003, 70, seed=1, dtype=dtype), random(1003, 150, seed=2, dtype=dtype)
    weight, results = random(150, 70, seed=3, dtype=dtype), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(check(x, g, LONG, SETS, weight, [9, 1, 400], level))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


@pytest.mark.parametrize("k", [0, 7])
def test_the_first_importance_that_is_not_finite_is_named(level, k):
    x, g = torch.ones(6, 70), torch.ones(6, 50)
    segments, sets = torch.tensor([[0, 3], [3, 6]]), torch.tensor([0, 1])
    weight = torch.ones(50, 70)
    weight[40, 3] = weight[31, 9] = float("nan")
    message = f"^importance must be finite, got nan at flat index {31 * 70 + 9}; check the losses"
    with pytest.raises(ValueError, match=message):
        native.select_importance(x, g, segments, sets, weight, [k, k], level=level)
    g[4, 2] = float("inf")
    with pytest.raises(ValueError, match="got inf at flat index 140; "):
        native.select_importance(x, g, segments, sets, torch.ones(50, 70), [k, k], level=level)


def test_no_memory_of_the_weight_size_is_taken():
    x, g, weight = torch.rand(8, 2000), torch.rand(8, 2000), torch.rand(2000, 2000)
    real, asked = torch.empty, []

    def empty(*size, **options):
        made = real(*size, **options)
        asked.append(made.nbytes)
        return made

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        native.select_importance(x, g, torch.tensor([[0, 8]]), torch.tensor([0]), weight, [20])
    torch.set_num_threads(before)
    assert sum(asked) < weight.nbytes / 10


def test_what_the_extension_does_not_take_is_refused():
    arguments = torch.tensor([[0, 2]]), torch.tensor([0])
    x, g, weight = torch.ones(2, 4), torch.ones(2, 3), torch.ones(3, 4)
    with pytest.raises(ValueError, match="level must be an instruction set .* got 9; leave it out"):
        native.select_importance(x, g, *arguments, weight, [1], level=9)
    with pytest.raises(TypeError, match="x and g must be float32, .* got float64 and float32; "):
        native.select_importance(x.double(), g.double(), *arguments, weight, [1])
    with pytest.raises(IndexError, match="segments must satisfy 0 <= start <= end <= 2, got"):
        native.select_importance(x, g, torch.tensor([[0, 3]]), arguments[1], weight, [1])
