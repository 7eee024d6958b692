"""Stacked weights of experts that are scored a part at a time, and joined at the end.

So that the sums of a layer's experts need not fit into memory together. An entry of a part holds
the sums of its own experts, and counts them as the whole tensor does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from fastdean.coupling.results.score_entry import ScoreEntry, fingerprint
from fastdean.coupling.results.scores import keep_entry
from fastdean.coupling.targets.target import Target
from fastdean.models.ranks.shards import whole


def weight_of_part(target: Target, weight: Tensor) -> Tensor:
    """The weights whose sums a target has: of all experts, or of some."""
    return weight if target.part is None else weight[target.experts]


def placed(
    entry: ScoreEntry,
    target: Target,
    weight: Tensor,
    summed: Callable[[Tensor], int] = fingerprint,
) -> ScoreEntry:
    """The entry of a target, counted in its whole weight.

    Args:
        weight: the whole one.
        summed: makes its fingerprint.
    """
    if target.part is None:
        return entry
    first = target.part[0]
    dense = entry.index is None
    return replace(
        entry,
        weight=whole(weight) if dense else entry.weight,
        index=None if entry.index is None else entry.index + first * prod(weight.shape[1:]),
        shape=tuple(weight.shape),
        fingerprint=summed(weight),
        unseen=tuple(first + expert for expert in entry.unseen),
    )


def joined(
    target: Target,
    entries: Mapping[str, ScoreEntry],
    num_examples: int,
    keep_top: float | None,
    expert_scope: str,
) -> ScoreEntry:
    """The entry of a whole target, of the entries by key that hold it or parts of it."""
    if target.parameter in entries:
        return entries[target.parameter]
    parts = [entries[key] for key in sorted(_parts_of(target.parameter, entries), key=_first)]
    one = parts[0]
    unseen = tuple(expert for part in parts for expert in part.unseen)
    routed = tuple(tokens for part in parts for tokens in part.routed or ())
    sums = torch.cat([part.sums for part in parts])
    entry = replace(one, sums=sums, unseen=unseen, routed=routed)
    if one.index is not None:
        # Of a dense score each part has the whole weight.
        weight, index = (
            torch.cat([tensor for tensor in tensors if tensor is not None])
            for tensors in ([part.weight for part in parts], [part.index for part in parts])
        )
        entry = replace(entry, weight=weight, index=index)
    signed = [part.signed for part in parts if part.signed is not None]
    if signed:
        entry = replace(entry, signed=torch.cat(signed))
    entry = entry.scoped(expert_scope)
    if keep_top is None or expert_scope == "expert":
        return entry
    # Of each part as many were kept as the whole tensor may hold.
    return keep_entry(target.parameter, entry, num_examples, keep_top)


def _parts_of(parameter: str, entries: Mapping[str, ScoreEntry]) -> list[str]:
    return [key for key in entries if key.startswith(f"{parameter}[")]


def _first(key: str) -> int:
    return int(key.rpartition("[")[2].partition(":")[0])
