"""The machine of an estimate: this one, or a GPU that somebody describes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fastdean.jobs.estimate.job import EstimateJob, size_in_bytes
from fastdean.jobs.estimate.measured import base_bytes, rates
from fastdean.models.available_memory import available_memory


@dataclass(frozen=True)
class Machine:
    """Attributes:
    memory: bytes; None: it is not known how much there is.
    base: bytes of Python with its libraries, of this machine's memory.
    rates: FLOP and bytes a second; None: nobody said.
    """

    on_gpu: bool
    memory: int | None
    base: int
    rates: tuple[float | None, float | None]

    @classmethod
    def of(cls, job: EstimateJob, model: nn.Module) -> Machine:
        if job.gpu_memory is not None:
            return cls(True, size_in_bytes(job.gpu_memory), 0, rates(job, model))
        base = base_bytes()
        there = available_memory(torch.device("cpu"))
        # What this process holds already is in the base.
        memory = None if there is None else there + base
        return cls(False, memory, base, rates(job, model))
