"""The sums of a target over the ranks' examples, and its top entries over the ranks' shards.

With `keep_top` no rank has all sums: each gets those of its shard, takes the top entries there, and
the top entries of all are among these. So a rank sends each number once (of those that are another
rank's), then no more than its candidates, whatever the number of examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from fastdean.coupling.results.score_entry import ScoreEntry, fingerprint, values_at
from fastdean.coupling.sums.accumulators import Accumulator, ExpertAccumulator
from fastdean.models.ranks.distributed import Ranks
from fastdean.ops.reference import importance
from fastdean.ops.selection import select_top

# Of a candidate, its place and its sum, beside the 4 bytes of an entry's sum.
_ENTRIES_OF_A_CANDIDATE = 3
_SUM_BYTES = torch.float32.itemsize


@dataclass(frozen=True)
class Top:
    """Which entries of a target are kept: those of the highest importance.

    Attributes:
        ratio: the share of each matrix that is kept.
        stacked: whether the weight holds a matrix for each of several experts.
        expert_scope: what a matrix is in a stacked weight, as `score` takes it.
        of: how many entries the ratio is a share of; None: of those that compete.
    """

    num_examples: int
    ratio: float
    expert_scope: str
    stacked: bool
    of: int | None = None

    def matrices(self, shape: Sequence[int]) -> int:
        return shape[0] if self.stacked and self.expert_scope == "expert" else 1

    def count(self, competing: int) -> int:
        """How many of the entries that compete with each other."""
        return min(competing, int(self.ratio * (competing if self.of is None else self.of)))


def reduced_entry(
    accumulator: Accumulator, weight: Tensor, ranks: Ranks, top: Top | None
) -> ScoreEntry:
    """The entry of a target over the examples of all ranks, the same bits on each.

    Args:
        weight: whose sums they are; the accumulator is not used afterwards.
        top: None: all entries are wanted.
    Returns:
        With `top` a sparse entry, or a dense one where that is no more to send.
    Raises:
        ValueError: an importance is NaN or infinite.
    """
    tensors = accumulator.tensors()
    if isinstance(accumulator, ExpertAccumulator):
        ranks.sum_([accumulator.routed])
    ranks.reduce_shards_(tensors)
    # Those of units are few, and a number by itself has no shards.
    if ranks.size > 1 and top is not None and tensors[0].shape == weight.shape != ():
        plan = _Candidates(ranks, weight.shape, top)
        if plan.are_less_than_all:
            entry = plan.entry(tensors, weight.detach())
            if isinstance(accumulator, ExpertAccumulator):
                entry = replace(entry, routed=tuple(accumulator.routed.tolist()))
            return entry
    ranks.spread_shards_(tensors)
    return accumulator.entry(weight)


def received_bytes(
    shape: Sequence[int], summed: int, ranks: int, top: Top | None
) -> tuple[int, int]:
    """What a rank receives, and about as much sends, in `reduced_entry` of one target.

    Args:
        shape: of the weight.
        summed: how many sums there are.
        top: as `reduced_entry` takes it.
    Returns:
        Bytes of sums, and of candidates.
    """
    if ranks == 1:
        return 0, 0
    first, end = Ranks(ranks - 1, ranks).shard(summed)
    of_a_shard = (ranks - 1) * (end - first) * _SUM_BYTES
    if top is not None and summed == prod(shape):
        plan = _Candidates(Ranks(0, ranks), shape, top)
        if plan.are_less_than_all:
            seen = shape[0] if top.stacked else 0
            candidates = plan.most * _ENTRIES_OF_A_CANDIDATE * _SUM_BYTES
            return of_a_shard, (ranks - 1) * (candidates + seen)
    # From each of the others its shard of the sums of all.
    return 2 * of_a_shard, 0


class _Candidates:
    """The top entries of each rank's shard of one weight, of all of its matrices.

    Attributes:
        most: how many a rank may have.
    """

    def __init__(self, ranks: Ranks, shape: Sequence[int], top: Top) -> None:
        self._ranks, self._shape, self._top = ranks, tuple(shape), top
        self._matrices = top.matrices(shape)
        self._competing = torch.Size(shape).numel() // self._matrices
        self._k = top.count(self._competing)
        self.most = max(
            sum(min(self._k, end - first) for first, end in self._pieces(rank))
            for rank in range(ranks.size)
        )

    @property
    def are_less_than_all(self) -> bool:
        """Whether sending them is less than sending every sum once more."""
        numel = self._matrices * self._competing
        return _ENTRIES_OF_A_CANDIDATE * self._ranks.size * self.most <= numel

    def entry(self, tensors: Sequence[Tensor], weight: Tensor) -> ScoreEntry:
        """The entry of the top entries of all shards, whose sums each rank has its own of."""
        own = self._own(tensors[0].view(-1), weight)
        places = own.new_full((self.most,), -1)
        places[: len(own)] = own
        sums = [tensor.new_zeros(self.most) for tensor in tensors]
        for values, tensor in zip(sums, tensors, strict=True):
            values[: len(own)] = tensor.view(-1)[own]
        found = self._ranks.gather([places, *sums, self._seen(tensors[0])])
        # Ascending: the shards are in the order of the ranks.
        index, of_sums, *rest = (torch.cat(parts) for parts in zip(*found, strict=True))
        present = index >= 0
        index = index[present]
        seen = torch.stack([parts[-1] for parts in found]).any(0)
        entry = ScoreEntry(
            sums=of_sums[present],
            weight=values_at(weight, index.to(weight.device)),
            index=index,
            shape=self._shape,
            unit_axis=None,
            fingerprint=fingerprint(weight),
            signed=rest[0][present] if len(tensors) > 1 else None,
            matrices=self._matrices,
            unseen=tuple((~seen).nonzero().squeeze(1).tolist()),
            stacked=self._top.stacked,
        )
        return entry.keep(self._top.num_examples, self._k)

    def _own(self, sums: Tensor, weight: Tensor) -> Tensor:
        """int64, ascending: flat indices of the candidates in this rank's shard."""
        found = [sums.new_empty(0, dtype=torch.int64)]
        for first, end in self._pieces(self._ranks.share):
            n = self._top.num_examples
            found.append(select_between(sums, weight, first, end, n, self._k))
        return torch.cat(found)

    def _pieces(self, rank: int) -> Iterator[tuple[int, int]]:
        """First entry and the one past the last of each matrix's part of a rank's shard."""
        first, end = self._ranks.shard(self._matrices * self._competing, rank)
        while first < end:
            until = min(end, (first // self._competing + 1) * self._competing)
            yield first, until
            first = until

    def _seen(self, sums: Tensor) -> Tensor:
        """bool: of each expert of a stacked weight, whether this rank's shard has sums of it."""
        seen = torch.zeros(self._shape[0] if self._top.stacked else 0, dtype=torch.bool)
        size = sums[0].numel()
        first, end = self._ranks.shard(sums.numel())
        for expert in range(len(seen)):
            part = sums.view(-1)[max(first, expert * size) : min(end, (expert + 1) * size)]
            seen[expert] = part.any() if len(part) else False
        return seen.to(sums.device)


def select_between(
    sums: Tensor,
    weight: Tensor,
    first: int,
    end: int,
    num_examples: int,
    k: int,
    called: Callable[[int], int] = int,
) -> Tensor:
    """int64, ascending: flat indices of the k most important entries from `first` to `end`.

    Args:
        sums: flat, those of the weight.
        called: what an error calls a flat index.
    """
    part, factor = sums[first:end], _between(weight, first, end)
    try:
        return select_top(part, factor, num_examples, min(k, end - first)) + first
    except ValueError:
        _require_finite(importance(part, factor, num_examples), first, called)
        raise


def _require_finite(values: Tensor, first: int, called: Callable[[int], int]) -> None:
    """Of a part of a tensor from flat index `first` on: the error of the whole tensor."""
    for place in (~values.isfinite()).nonzero().flatten()[:1].tolist():
        raise ValueError(
            f"importance must be finite, got {float(values[place])} at flat index "
            f"{called(first + place)}; check the losses and the model's weights"
        )


def _between(weight: Tensor, first: int, end: int) -> Tensor:
    """Flat entries of a weight, [end - first]; whatever its strides, no more rows are copied."""
    row = weight[0].numel()
    top = first // row
    rows = weight[top : -(-end // row)].reshape(-1)
    return rows[first - top * row : end - top * row]
