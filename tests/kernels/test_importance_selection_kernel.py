"""The fused selection's kernels across the borders of their tiles, in both of their ways."""

from __future__ import annotations

import machine  # noqa: F401  # before the kernels: it decides whether they are interpreted
import pytest
import torch
from machine import DEVICE

from fastdean.kernels import importance_selection
from fastdean.ops import accumulate_importance_, select_importance, select_top

ROWS, COLUMNS = 70, 200  # several tiles that nothing divides
SEGMENTS, SETS = torch.tensor([[0, 5], [7, 8], [8, 20]]), torch.tensor([0, 0, 1])


def random(*shape, seed, dtype=torch.float32):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(DEVICE, dtype)


@pytest.fixture
def no_dense_sums(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("sums of the weight's size must not be made, got a call")

    monkeypatch.setattr(importance_selection, "accumulate_importance_", refuse)


def check(x, g, weight, k):
    """The fused result of whole numbers, once it is that of the two operations, set by set."""
    found = select_importance(x, g, SEGMENTS, SETS, weight, k, signed=True, impl="triton")
    for number, (index, sums, signed) in enumerate(found):
        mine = SEGMENTS[number == SETS]
        dense = torch.zeros(weight.shape, device=DEVICE)
        accumulate_importance_(dense, x, g, mine, impl="triton")
        assert torch.equal(index, select_top(dense, weight, len(mine), k[number], impl="triton"))
        assert torch.equal(sums, dense.flatten()[index])
        exact = sum(g[s:e].double().T @ x[s:e].double() for s, e in mine.tolist())
        assert torch.equal(signed.double(), exact.flatten()[index])
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_tiles_with_the_largest_entries_are_computed_again(dtype, no_dense_sums, monkeypatch):
    x, g = random(20, COLUMNS, seed=1, dtype=dtype), random(20, ROWS, seed=2, dtype=dtype)
    weight, k = random(ROWS, COLUMNS, seed=3, dtype=dtype), [5, 40]
    # Of few columns, on both sides of a border between tiles.
    x[:, :62] *= 1e-3
    x[:, 66:] *= 1e-3
    real, again = importance_selection._Problem.tile_sums, []

    def watched(problem, number, tiles, least):
        again.append((problem, number, tiles, real(problem, number, tiles, least)))
        return again[-1][-1]

    monkeypatch.setattr(importance_selection._Problem, "tile_sums", watched)
    found = select_importance(x, g, SEGMENTS, SETS, weight, k, impl="triton")
    assert len(again) == 2
    for problem, number, tiles, sums in again:
        assert 0 < len(tiles) <= problem.num_tiles / 2
        # The largest products of all rows that reach the bound have the bits that they had before.
        magnitude = torch.zeros(1024, 1024, device=DEVICE)
        magnitude[:ROWS, :COLUMNS] = weight.float().abs()
        first = problem.row_maxima(2)[number, tiles].view(torch.float32)
        for tile, r, c in zip(range(len(tiles)), *problem.starts(tiles), strict=True):
            block = magnitude[r : r + sums.shape[1], c : c + sums.shape[2]]
            largest = (sums[tile] * block).amax(1)
            reaches = largest > 0
            assert torch.equal(largest[reaches], first[tile][reaches])
        exact = torch.zeros(ROWS, COLUMNS, dtype=torch.float64, device=DEVICE)
        for start, end in SEGMENTS[number == SETS].tolist():
            exact += (g[start:end].double().T @ x[start:end].double()).abs()
        value = (exact * weight.double().abs()).flatten()
        index = found[number][0]
        assert torch.equal(index, value.topk(k[number]).indices.sort().values)
        torch.testing.assert_close(
            found[number][1].double(), exact.flatten()[index], rtol=1e-5, atol=0
        )


def test_ties_go_to_the_lowest_index_wherever_the_tiles_lie(no_dense_sums):
    x, g = (torch.zeros(20, n, device=DEVICE) for n in (COLUMNS, ROWS))
    # Equal entries in four tiles, whose order is not that of the rows.
    x[:, [62, 63, 64]] = 1.0
    g[:, [0, 63, 64]] = -1.0
    weight = torch.ones(ROWS, COLUMNS, device=DEVICE)
    first = [r * COLUMNS + c for r in (0, 63, 64) for c in (62, 63, 64)]
    (one, other) = check(x, g, weight, [4, 100])
    assert one[0].tolist() == first[:4] and other[0].tolist() == first


@pytest.mark.parametrize("k", [[5, 3], [600, 9]])
def test_the_examples_of_a_set_are_added_one_by_one_whatever_their_batch(k):
    x, g = random(20, COLUMNS, seed=1), random(20, ROWS, seed=2)
    weight, batches = random(ROWS, COLUMNS, seed=3), torch.tensor([0, 4, 1])
    plain = select_importance(x, g, SEGMENTS, SETS, weight, k, impl="triton")
    found = select_importance(x, g, SEGMENTS, SETS, weight, k, batches=batches, impl="triton")
    for one, other in zip(plain, found, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


# The latter is more than the tiles have rows.
@pytest.mark.parametrize("k", [[5, 3], [600, 0]])
def test_where_all_tiles_reach_the_bound_sums_are_made_after_all(k):
    x, g = torch.ones(20, COLUMNS, device=DEVICE), torch.ones(20, ROWS, device=DEVICE)
    for index, *_ in check(x, g, torch.ones(ROWS, COLUMNS, device=DEVICE), k):
        assert torch.equal(index, torch.arange(len(index), device=DEVICE))


def test_the_first_importance_that_is_not_finite_is_named():
    x, g = torch.ones(20, COLUMNS, device=DEVICE), torch.ones(20, ROWS, device=DEVICE)
    weight = torch.ones(ROWS, COLUMNS, device=DEVICE)
    weight[68, 3] = weight[10, 130] = float("nan")
    weight[10, 180] = float("-inf")
    for k in ([0, 0], [7, 7]):
        with pytest.raises(ValueError, match=f"finite, got nan at flat index {10 * 200 + 130}; "):
            select_importance(x, g, SEGMENTS, SETS, weight, k, impl="triton")
    weight[10, 130] = 1.0
    with pytest.raises(ValueError, match=f"finite, got inf at flat index {10 * 200 + 180}; check"):
        select_importance(x, g, SEGMENTS, SETS, weight, [1, 1], impl="triton")


@pytest.mark.parametrize("bits", [1, 2, 3, 0x7FFFFF, 0x800000, 0x800001, 0x3F800001, 0x7F7FFFFF])
@pytest.mark.parametrize("examples", [1, 3, 7, 1000])
def test_no_product_below_the_least_has_a_quotient_that_reaches_the_bounds(bits, examples):
    divisor = torch.tensor(float(examples))
    bound = torch.tensor(bits, dtype=torch.int32).view(torch.float32) / divisor
    least = importance_selection._least_product(bits, examples)
    assert 1 <= least <= bits
    below = torch.arange(max(0, least - 4), least, dtype=torch.int32).view(torch.float32)
    assert bool((below / divisor < bound).all()) or (least == 1 and bool((below == 0).all()))
