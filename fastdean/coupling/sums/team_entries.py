"""From the sums that a rank has of its block of a weight to the entry of the whole weight.

Tensor parallel splits a weight over a team of ranks. The sums of a block need nothing of the other
blocks: |G^T X| of its rows or columns is that part of the whole. Each rank takes the top entries of
its share of its block, and those of the weight are among them. A weight that all ranks of a team
have counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastdean.coupling.results.score_entry import ScoreEntry, fingerprint, values_at
from fastdean.coupling.sums.accumulators import Accumulator, ExpertAccumulator
from fastdean.coupling.sums.reduction import Top, select_between
from fastdean.coupling.targets.target import Target
from fastdean.models.identity import json_digest
from fastdean.models.ranks.distributed import Ranks
from fastdean.models.ranks.shards import OwnBlock, whole
from fastdean.wording.mendable import StateError

# Of the sums of a weight that all ranks have, by how much they may differ: rounding, in bf16 too.
_APART = 1e-2


def team_entry(
    accumulator: Accumulator, target: Target, weight: Tensor, ranks: Ranks, top: Top | None
) -> ScoreEntry:
    """The entry of a target, or of a part of its experts, over all examples; the same on each rank.

    Args:
        accumulator: this rank's sums over its share of the examples; not used afterwards.
        weight: of the target, a DTensor where it is split.
        top: None: all entries are wanted.
    Raises:
        ValueError: an importance is NaN or infinite.
        RuntimeError: a weight that all ranks of a team have got other sums on each.
    """
    block = OwnBlock.of(weight)
    if target.part is not None:
        block = block.part(*target.part)
    tensors = accumulator.tensors()
    _require_same_sums(target, block, tensors, ranks)
    routed = None
    if isinstance(accumulator, ExpertAccumulator):
        routed = _routed(accumulator, block, ranks)
    ranks.reduce_shards_(tensors)
    of_weights = tensors[0].shape == block.tensor.shape
    if top is not None and of_weights:
        entry = _Candidates(block, ranks, top, target.stacked).entry(tensors)
    else:
        ranks.spread_shards_(tensors)
        axis = None if of_weights else target.unit_axis
        sums, *signed = (_joined(tensor, block, ranks, axis) for tensor in tensors)
        parameter = whole(weight)
        if target.part is not None:
            parameter = parameter[target.experts]
        entry = ScoreEntry.of(
            sums, parameter, axis, signed[0] if signed else None, stacked=target.stacked
        )
        if not of_weights:
            entry = replace(entry, weight=None)
    return replace(entry, routed=routed)


def in_blocks(targets: Sequence[Target], block_of: Callable[[Target], OwnBlock]) -> list[Target]:
    """The targets of a model that tensor parallel splits, with what this rank has of each weight.

    Args:
        block_of: finds that.
    Raises:
        ValueError: one is no matrix of a module whose hooks see its rows, or this rank has nothing
            of it.
    """
    found = []
    for target in targets:
        if target.by_example:
            raise ValueError(
                f"target_modules must match matrices of Linear layers or experts in a model that "
                f"tensor parallel splits, got {target.parameter}; load the model in one process"
            )
        block = block_of(target)
        if not block.tensor.numel():
            raise ValueError(
                f"model must be split over ranks that all have a part of each weight, got one with "
                f"nothing of {target.parameter}; start fewer ranks, or leave it whole"
            )
        found.append(replace(target, block=block))
    return found


def require_even_blocks(targets: Sequence[Target], ranks: Ranks) -> None:
    """ValueError unless all ranks' blocks have the same sizes: budgets then divide them alike."""
    sizes = json_digest([target.summed_shape for target in targets])
    if not ranks.hold_the_same(sizes):
        raise ValueError(
            "memory_budget must be left out where tensor parallel splits weights unevenly over "
            "ranks, which would not take the same passes; choose a number of ranks that divides "
            "them"
        )


def team_fingerprint(ranks: Ranks, parameter: Tensor) -> int:
    """The `fingerprint` of a whole weight, from those of a team's blocks; all ranks call it."""
    return _fingerprint_of(OwnBlock.of(parameter), ranks)


def _fingerprint_of(block: OwnBlock, ranks: Ranks) -> int:
    weight = block.tensor.detach()
    if block.cut is None:
        return fingerprint(weight)
    own = torch.tensor([fingerprint(weight, block)], dtype=torch.int64, device="cpu")
    found = ranks.gather([own])
    # Modulo 2^64, as int64 adds up.
    return int(torch.cat([found[rank][0] for rank in ranks.team]).sum())


def _routed(accumulator: ExpertAccumulator, block: OwnBlock, ranks: Ranks) -> tuple[int, ...]:
    """How many tokens each expert of the whole weight was given."""
    own = accumulator.routed
    counts = own.new_zeros(block.shape[0])
    experts = block.along[0]
    if experts is not None:
        counts[experts.to(own.device)] = own
    elif ranks.rank == ranks.team[0]:
        counts += own
    ranks.sum_([counts])
    return tuple(counts.tolist())


def _require_same_sums(
    target: Target, block: OwnBlock, tensors: Sequence[Tensor], ranks: Ranks
) -> None:
    """Refuse a weight that all ranks of a team have, and of whose gradient each has a part."""
    if block.cut is not None:
        return
    table = tensors[0].reshape(len(tensors[0]), -1).double()
    sums = torch.cat([table.sum(0), table.sum(1)])
    gathered = ranks.gather([sums])
    found = [gathered[rank][0] for rank in ranks.team]
    with ranks.failing_together():
        apart = max(float((each - found[0]).norm()) for each in found)
        # What is not finite is for the selection to say.
        if apart > _APART * float(found[0].norm()):
            raise StateError(
                f"{target.name} must get the same gradients on all ranks that hold it, got others; "
                "its input or output is a part of the model's, so leave it out of target_modules"
            )


def _joined(tensor: Tensor, block: OwnBlock, ranks: Ranks, unit_axis: int | None) -> Tensor:
    """The whole of what the ranks of a team have the blocks of; of units along their axis."""
    shape, along = block.shape, block.along
    if unit_axis is not None:
        shape, along = shape[unit_axis : unit_axis + 1], along[unit_axis : unit_axis + 1]
    cut = next((axis for axis, own in enumerate(along) if own is not None), None)
    if cut is None:
        # Those of the first, as rounding may differ.
        return ranks.gather([tensor])[ranks.team[0]][0].view(shape)
    own = along[cut]
    assert own is not None
    rows = tensor.movedim(cut, 0)
    most = ranks.highest(len(rows))
    places = rows.new_full((most,), -1, dtype=torch.int64)
    places[: len(rows)] = own.to(rows.device)
    sent = rows.new_zeros((most, *rows.shape[1:]))
    sent[: len(rows)] = rows
    found = ranks.gather([places, sent])
    joined = tensor.new_empty(shape)
    for member in ranks.team:
        index, values = found[member]
        present = index >= 0
        joined.movedim(cut, 0)[index[present]] = values[present]
    return joined


class _Candidates:
    """The top entries of each rank's share of its block of a weight, of all of its matrices."""

    def __init__(self, block: OwnBlock, ranks: Ranks, top: Top, stacked: bool) -> None:
        self._block, self._ranks, self._top, self._stacked = block, ranks, top, stacked
        self._matrices = top.matrices(block.shape)
        self._k = top.count(block.shape.numel() // self._matrices)

    def entry(self, tensors: Sequence[Tensor]) -> ScoreEntry:
        """The entry of the top entries of all ranks, whose sums each has its own of."""
        weight = self._block.tensor.detach()
        own = self._own(tensors[0].view(-1), weight)
        most = self._ranks.highest(len(own))
        sent = {
            "index": own.new_full((most,), -1),
            "sums": tensors[0].new_zeros(most),
            "weight": weight.new_zeros(most),
            "seen": self._seen(tensors[0]),
        }
        sent["index"][: len(own)] = self._block.flat_index(own)
        sent["weight"][: len(own)] = values_at(weight, own)
        sent["sums"][: len(own)] = tensors[0].view(-1)[own]
        if len(tensors) > 1:
            sent["signed"] = tensors[1].new_zeros(most)
            sent["signed"][: len(own)] = tensors[1].view(-1)[own]
        # The widest dtypes first.
        names = sorted(sent, key=lambda name: -sent[name].element_size())
        gathered = self._ranks.gather([sent[name] for name in names])
        found = dict(zip(names, zip(*gathered, strict=True), strict=True))
        seen = torch.stack(found.pop("seen")).any(0)
        joined = {name: torch.cat(parts) for name, parts in found.items()}
        index, order = joined["index"].sort()
        order = order[index >= 0]
        joined = {name: values[order] for name, values in joined.items()}
        entry = ScoreEntry(
            sums=joined["sums"],
            weight=joined["weight"],
            index=joined["index"],
            shape=tuple(self._block.shape),
            unit_axis=None,
            fingerprint=_fingerprint_of(self._block, self._ranks),
            signed=joined.get("signed"),
            matrices=self._matrices,
            unseen=tuple((~seen).nonzero().squeeze(1).tolist()),
            stacked=self._stacked,
        )
        return entry.keep(self._top.num_examples, self._k)

    def _own(self, sums: Tensor, weight: Tensor) -> Tensor:
        """int64, ascending: flat indices in the block of this rank's candidates."""

        def in_whole(place: int) -> int:
            return int(self._block.flat_index(torch.tensor([place])))

        n, k = self._top.num_examples, self._k
        found = [
            select_between(sums, weight, first, end, n, k, in_whole)
            for first, end in self._pieces(sums.numel())
        ]
        return torch.cat([sums.new_empty(0, dtype=torch.int64), *found])

    def _pieces(self, numel: int) -> Iterator[tuple[int, int]]:
        """First entry and the one past the last of each matrix's part of a rank's share."""
        if self._block.cut is None and self._ranks.rank not in self._ranks.teams_first:
            return
        first, end = self._ranks.shard(numel)
        each = numel // (self._block.tensor.shape[0] if self._matrices > 1 else 1)
        while first < end:
            until = min(end, (first // each + 1) * each)
            yield first, until
            first = until

    def _seen(self, sums: Tensor) -> Tensor:
        """bool: of each expert of a stacked weight, whether this rank has sums of it."""
        seen = torch.zeros(self._block.shape[0] if self._stacked else 0, dtype=torch.bool)
        if not self._stacked:
            return seen.to(sums.device)
        experts = self._block.along[0]
        size = sums[0].numel()
        first, end = self._ranks.shard(sums.numel())
        for number in range(len(sums)):
            part = sums.view(-1)[max(first, number * size) : min(end, (number + 1) * size)]
            expert = number if experts is None else int(experts[number])
            seen[expert] = bool(part.any()) if len(part) else False
        return seen.to(sums.device)
