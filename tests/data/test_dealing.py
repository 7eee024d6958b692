"""Examples dealt to ranks so that all have about as many tokens."""

from __future__ import annotations

import random

import pytest

from fastdean.data.dealing import deal


def lengths_like_beavertails(count, seed=0):
    """Short prompts with a long tail, responses of up to 100 tokens; 76 tokens in the mean."""
    drawn = random.Random(seed)
    return [
        min(120, int(drawn.lognormvariate(2.3, 0.6))) + drawn.randint(25, 100) for _ in range(count)
    ]


@pytest.mark.parametrize("count, ranks", [(128, 2), (128, 8), (128, 16), (384, 64), (5000, 96)])
def test_the_slowest_rank_has_at_most_a_tenth_more_than_the_mean(count, ranks):
    lengths = lengths_like_beavertails(count)
    totals = [sum(lengths[i] for i in part) for part in deal(lengths, ranks)]
    assert max(totals) <= 1.1 * sum(totals) / ranks


def test_every_item_is_dealt_once_and_in_order():
    dealt = deal([7, 1, 9, 9, 2, 4], 3)
    assert sorted(i for part in dealt for i in part) == list(range(6))
    assert all(part == sorted(part) for part in dealt)


def test_one_long_example_is_a_part_of_its_own():
    assert deal([3, 100, 4, 5], 2) == [[1], [0, 2, 3]]


def test_a_single_part_has_all_in_order_and_parts_may_be_empty():
    assert deal([5, 1, 9], 1) == [[0, 1, 2]]
    assert deal([5], 3) == [[0], [], []]
