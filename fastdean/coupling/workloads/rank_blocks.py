"""Which blocks of a workload each rank scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastdean.data.dealing import deal
from fastdean.models.ranks.distributed import Ranks

# Of a job whose bits are to be the same on 1, 2, 4, 8 and 16 ranks.
_BLOCKS = 16


def blocks_of_a_rank(ranks: Ranks, deterministic: bool) -> int:
    """Of how many blocks each rank makes the sums."""
    return _BLOCKS // ranks.shares if deterministic and _BLOCKS % ranks.shares == 0 else 1


@dataclass(frozen=True)
class Dealing:
    """Into how many blocks a workload is dealt, and which of them are this rank's."""

    ranks: Ranks
    blocks_of_a_rank: int

    def own(self, costs: Sequence[int]) -> list[list[int]]:
        """The numbers of the items in each of this rank's blocks."""
        each = self.blocks_of_a_rank
        dealt = deal(costs, each * self.ranks.shares)
        return dealt[self.ranks.share * each :][:each]
