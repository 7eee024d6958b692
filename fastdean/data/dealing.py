"""Items of unlike cost dealt into parts that cost about the same."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapreplace


def deal(costs: Sequence[int], parts: int) -> list[list[int]]:
    """The numbers of the items in each part, ascending; a function of its arguments alone.

    The most costly item first, each to the part that has the least so far (Graham 1969: no part
    costs more than 4/3 of the least that the most costly part can come to).

    Args:
        costs: of each item, at least 0.
        parts: how many there are; those without an item are empty.
    """
    so_far = [(0, part) for part in range(parts)]
    dealt: list[list[int]] = [[] for _ in range(parts)]
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        cost, part = so_far[0]
        dealt[part].append(item)
        heapreplace(so_far, (cost + costs[item], part))
    return [sorted(part) for part in dealt]
