"""Sums of blocks, added in an order that no number of ranks changes."""

from __future__ import annotations

import pytest
import torch

from fastdean.coupling.sums.block_sums import BlockSums, sums_at_a_time
from fastdean.models.ranks.distributed import _sum_in_pairs


class Added:
    """An accumulator of whatever is added."""

    def __init__(self):
        self.sums = torch.zeros(4)

    def tensors(self):
        return [self.sums]


def summed(batches, blocks):
    """The sum over blocks of so many batches each, and how many sums lived at most."""
    accumulator, most, left = Added(), 1, iter(batches)
    sums = BlockSums([accumulator], blocks)
    for batch in left:
        accumulator.sums += batch
        most = max(most, 1 + len(sums._branches))
        sums.batch_added()
    return accumulator.sums, most


def random_batches(count):
    # Of unlike size, so that the order of additions shows in the last bits.
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(4, generator=generator) * 10 ** torch.randn(1, generator=generator).abs()
        for _ in range(count)
    ]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("blocks", [[2] * 16, [0, 3, 1, 0] * 4, [1] * 5 + [0] * 11])
def test_any_number_of_ranks_adds_to_the_same_bits(ranks, blocks):
    batches = random_batches(sum(blocks))
    expected, _ = summed(batches, blocks)
    each = 16 // ranks
    of_ranks, start = [], 0
    for rank in range(ranks):
        own = blocks[rank * each : (rank + 1) * each]
        of_ranks.append(summed(batches[start : start + sum(own)], own)[0])
        start += sum(own)
    assert torch.equal(_sum_in_pairs(torch.stack(of_ranks)), expected)


def test_plain_sums_of_all_batches_have_other_bits():
    """Or the test above could not fail."""
    batches = random_batches(32)
    assert not torch.equal(summed(batches, [2] * 16)[0], summed(batches, [32])[0])


@pytest.mark.parametrize("blocks, most", [(1, 1), (2, 2), (4, 3), (8, 4), (16, 5)])
def test_as_many_sums_live_as_the_budget_counts(blocks, most):
    assert summed(random_batches(3 * blocks), [3] * blocks)[1] == most == sums_at_a_time(blocks)
