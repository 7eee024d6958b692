"""The sums of a pass or window made entries of `Scores`: those of all ranks, or their top."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from fastdean.coupling.passes.expert_parts import placed, weight_of_part
from fastdean.coupling.results.score_entry import ScoreEntry, fingerprint
from fastdean.coupling.results.scores import keep_entry, naming_matrix
from fastdean.coupling.sums.accumulators import Accumulator
from fastdean.coupling.sums.reduction import Top, reduced_entry
from fastdean.coupling.sums.team_entries import team_entry, team_fingerprint
from fastdean.coupling.targets.target import Target
from fastdean.models.ranks.distributed import Ranks


def finish(
    accumulators: dict[str, Accumulator],
    targets: Sequence[Target],
    ranks: Ranks,
    num_examples: int,
    keep_top: float | None,
    expert_scope: str,
    off_device: bool,
    weight_of: Callable[[Target], torch.Tensor] = Target.materialised,
) -> dict[str, ScoreEntry]:
    """Sum over the ranks and keep each matrix's top entries; empties `accumulators`.

    By the targets' keys: experts of one tensor may come in parts.

    Args:
        off_device: dense sums go to the CPU.
        weight_of: the weight of a target.
    """
    entries = {}
    for target in targets:
        weight = weight_of(target)
        of = weight.numel() if expert_scope == "tensor" and target.stacked else None
        top = (
            None
            if keep_top is None
            else Top(num_examples, keep_top, expert_scope, target.stacked, of)
        )
        with naming_matrix(target.parameter):
            accumulator = accumulators.pop(target.key)
            if ranks.teams:
                entry = team_entry(accumulator, target, weight, ranks, top)
            else:
                part = weight_of_part(target, weight)
                entry = reduced_entry(accumulator, part, ranks, top)
        if keep_top is not None and entry.index is None:
            entry = keep_entry(
                target.parameter, entry.scoped(expert_scope), num_examples, keep_top, of
            )
        elif off_device:
            signed = None if entry.signed is None else entry.signed.cpu()
            entry = replace(entry, sums=entry.sums.cpu(), signed=signed)
        summed = partial(team_fingerprint, ranks) if ranks.teams else fingerprint
        entries[target.key] = placed(entry, target, weight, summed)
    return entries
