"""The steps of a job: which is being done, and what each takes: seconds, tokens, memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastdean.models.available_memory import peak_memory
from fastdean.wording.doing import during
from fastdean.wording.printable import one_line


@dataclass
class Costs:
    """Seconds, tokens and memory of each step.

    Attributes:
        steps: of each, in order, "step", "seconds", "tokens" and "peak_bytes": the most memory held
            so far, from the start of the process to the end of the step. It is memory on the GPUs
            for a model that lies there, else the process's resident memory.
        total: how many steps the job has at most; None: not known yet.
        shown: whether each step is announced on stderr.
    """

    total: int | None = None
    shown: bool = False
    steps: list[dict[str, Any]] = field(default_factory=list)
    _gpus: set[torch.device] = field(default_factory=set)

    def watch(self, model: nn.Module) -> None:
        """Tell the memory of the GPUs that `model` lies on, from here on."""
        self._gpus = {p.device for p in model.parameters() if p.device.type == "cuda"}

    @contextmanager
    def step(
        self, name: str, tokens: int | None = None, *, since: float | None = None
    ) -> Iterator[None]:
        """A step of the job, announced now.

        Args:
            since: `time.perf_counter()` when it began, where that was before it had a name.
        """
        label = f"step {len(self.steps) + 1}"
        label += f" of {self.total}, {name}" if self.total else f", {name}"
        if self.shown:
            # Before a step has a bar of its own it may read, load or compile for a minute.
            print(f"fastdean: {one_line(label)}", file=sys.stderr, flush=True)
        start = time.perf_counter() if since is None else since
        with during(label):
            yield
        self.add(name, tokens, time.perf_counter() - start, self._peak_bytes())

    def add(
        self, name: str, tokens: int | None, seconds: float | None, peak_bytes: int | None
    ) -> None:
        self.steps.append(
            {"step": name, "seconds": seconds, "tokens": tokens, "peak_bytes": peak_bytes}
        )

    def _peak_bytes(self) -> int | None:
        if self._gpus:
            return sum(peak_memory(gpu) or 0 for gpu in self._gpus)
        return peak_memory(torch.device("cpu"))
