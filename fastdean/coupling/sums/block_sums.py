"""The sums of a rank's blocks, added in an order that no number of ranks changes.

Blocks 0, 1, 2, ... of all ranks are added in pairs, and the pairs in pairs:
((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)). A rank has a power of two of them that stand together, so
its additions are a branch of that tree; `Ranks.reduce_shards_` adds the ranks' sums in the same
way. The number of sums that live at a time grows with the logarithm of the number of blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from fastdean.coupling.sums.accumulators import Accumulator


class BlockSums:
    """Told of the batches of a rank in order, it leaves the sum of all blocks in the accumulators.

    Args:
        accumulators: to which the batches are added; one that has no tensors is left alone.
        blocks: of how many batches each block is; a power of two of them.
    """

    def __init__(self, accumulators: Iterable[Accumulator], blocks: Sequence[int]) -> None:
        assert len(blocks).bit_count() == 1, "a branch of the tree"
        self._accumulators = list(accumulators)
        self._left = list(blocks)
        self._ended = 0
        # Sums of 2^k blocks, the larger ones first.
        self._branches: list[list[Tensor]] = []
        self._end_blocks()

    def batch_added(self) -> None:
        """The accumulators have a further batch."""
        self._left[0] -= 1
        self._end_blocks()

    def _end_blocks(self) -> None:
        while self._left and self._left[0] == 0:
            self._left.pop(0)
            self._ended += 1
            self._grow()

    def _grow(self) -> None:
        """The accumulators hold a whole block: add the branches that are of its size."""
        sums = [tensor for each in self._accumulators for tensor in each.tensors()]
        size = self._ended
        while size % 2 == 0:
            for tensor, branch in zip(sums, self._branches.pop(), strict=True):
                tensor += branch
            size //= 2
        if self._left:
            self._branches.append([tensor.clone() for tensor in sums])
            for tensor in sums:
                tensor.zero_()


def sums_at_a_time(blocks: int) -> int:
    """How many sums of a target a rank of so many blocks holds at a time at most."""
    return blocks.bit_length()
