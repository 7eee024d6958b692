"""The sums of a scoring, and how a memory budget divides them: by passes, or by windows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastdean.coupling.layers.window_memory import WindowMemory
from fastdean.coupling.sums.accumulators import all_sums_bytes, split_by_memory, sums_bytes
from fastdean.coupling.sums.block_sums import sums_at_a_time
from fastdean.coupling.sums.holding import together_bytes
from fastdean.coupling.targets.target import Target
from fastdean.jobs.estimate.job import EstimateJob
from fastdean.jobs.estimate.planned import Planned
from fastdean.jobs.estimate.work import holding


@dataclass(frozen=True)
class Windows:
    """Attributes:
    sums: bytes of each layer's sums.
    at_a_time: how many sums of a matrix there are at a time.
    passes: the bytes of sums of each pass over all batches.
    parts: of each layer the windows' numbers of bytes of sums.
    refused: order -> why it cannot be taken.
    """

    sums: Mapping[int | None, int]
    at_a_time: int
    passes: Sequence[int]
    parts: Mapping[int | None, Sequence[int]]
    refused: Mapping[str, ValueError]

    @classmethod
    def of(cls, job: EstimateJob, planned: Planned) -> Windows:
        targets, rows, budget = planned.targets, planned.rows, job.memory_budget
        sums: Counter[int | None] = Counter()
        for target in targets:
            sums[target.layer_index] += sums_bytes(target, job.granularity)
        at_a_time = sums_at_a_time(planned.blocks)
        together = all_sums_bytes(job.granularity, False, at_a_time)
        held = holding(targets, job, rows.all // job.sets, planned.keep_top)
        size = together_bytes(held, job.granularity, False, at_a_time)
        windows = WindowMemory(planned.memory, rows)
        refused: dict[str, ValueError] = {}
        groups: list[list[Target]] = []
        parts: dict[int | None, list[int]] = {}
        try:
            groups = split_by_memory(targets, together, budget)
        except ValueError as error:
            refused["batches"] = error
        try:
            for layer, of_layer in _by_layer(targets).items():
                parts[layer] = [size(part) for part in windows.split(of_layer, size, budget)]
        except ValueError as error:
            parts = {}
            least = windows.least(targets, size)
            refused["layers"] = _too_small(budget, least, rows.batch) if budget else error
        return cls(sums, at_a_time, [together(group) for group in groups], parts, refused)

    @property
    def every(self) -> int:
        """Bytes of all sums."""
        return sum(self.sums.values())

    @property
    def largest(self) -> dict[int | None, int]:
        """Bytes of sums of each layer's largest window."""
        return {layer: max(sizes) for layer, sizes in self.parts.items()}


def _by_layer(targets: Sequence[Target]) -> dict[int | None, list[Target]]:
    found: dict[int | None, list[Target]] = {}
    for target in targets:
        found.setdefault(target.layer_index, []).append(target)
    return found


def _too_small(budget: int, least: int, tokens: int) -> ValueError:
    return ValueError(
        f"memory_budget must be at least {least:,} layer by layer, for the sums of one matrix and "
        f"what its window holds of a batch of {tokens:,} tokens, got {budget:,}; raise it or lower "
        "tokens_per_batch"
    )
