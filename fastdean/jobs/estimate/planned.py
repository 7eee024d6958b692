"""A scoring as it will be: the model on the meta device, what of it is scored, and the batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastdean.coupling.layers.needed_memory import ModelMemory, Rows
from fastdean.coupling.resuming.kept_entries import entries_bytes
from fastdean.coupling.targets.coverage import coverage
from fastdean.coupling.targets.finding import find_targets
from fastdean.coupling.targets.target import Target
from fastdean.coupling.workloads.rank_blocks import blocks_of_a_rank
from fastdean.jobs.estimate.job import EstimateJob
from fastdean.jobs.estimate.split import Split, Whole
from fastdean.jobs.estimate.work import batched, lengths_of
from fastdean.models.layers.stacks import decoder_layers
from fastdean.models.loading import described_model
from fastdean.models.ranks.distributed import Ranks


@dataclass(frozen=True)
class Planned:
    """What one rank will do.

    Attributes:
        targets: those of the rank; `wholes`: the same before the model was split.
        covered: how much of the model they are.
        ranks: of the job; `shares`: into how many the examples are dealt.
        lengths: (tokens, target tokens) of each example of the rank, set after set.
        blocks: in how many the rank sums; `batches`: of all of them.
        keep_top: None where all sums are kept.
        results_bytes: of the scores of all sets, of the whole model.
    """

    model: nn.Module
    layers: Sequence[nn.Module]
    targets: Sequence[Target]
    wholes: Sequence[Whole]
    covered: dict[str, Any]
    split: Split
    ranks: int
    shares: int
    lengths: Sequence[tuple[int, int]]
    blocks: int
    rows: Rows
    batches: int
    memory: ModelMemory
    keep_top: float | None
    results_bytes: int

    @classmethod
    def of(cls, job: EstimateJob) -> Planned:
        """Errors as `estimate`."""
        model = described_model(
            job.model,
            dtype=job.dtype,
            revision=job.revision,
            trust_remote_code=job.trust_remote_code,
        )
        layers = list(decoder_layers(model).values())
        targets = find_targets(model, job.target_modules, job.granularity)
        keep_top = None if job.keep_top == 1 else job.keep_top
        # What every rank has in the end, and is told of: of the whole model.
        results = job.sets * entries_bytes(targets, job.granularity, keep_top, signs=False)
        covered = coverage(model, targets)
        wholes = [Whole.of(target) for target in targets]
        split = Split.of(model, job.tensor_parallel, experts=job.expert_parallel > 1)
        if split.ranks > 1:
            targets = find_targets(model, job.target_modules, job.granularity)
        ranks = job.gpus or 1
        shares = ranks // split.ranks
        lengths = lengths_of(job, shares)
        blocks = blocks_of_a_rank(Ranks(0, shares), job.deterministic)
        device = torch.device("cpu" if job.gpu_memory is None else "cuda")
        rows, batches = batched(model, job, lengths, blocks, device)
        return cls(
            model=model,
            layers=layers,
            targets=targets,
            wholes=wholes,
            covered=covered,
            split=split,
            ranks=ranks,
            shares=shares,
            lengths=lengths,
            blocks=blocks,
            rows=rows,
            batches=batches,
            memory=ModelMemory.of(model, layers),
            keep_top=keep_top,
            results_bytes=results,
        )

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def dense(self) -> bool:
        """Whether all sums are kept."""
        return self.keep_top is None
