"""Whether losses are finite, looked at one batch late.

The device then always has a batch to work on while the host looks, and the host is never more than
one batch ahead.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from fastdean.coupling.workloads.workload import BatchLosses, Workload


class LossCheck:
    """Checks the losses of each batch; the progress bar shows how many were checked."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._copies: deque[tuple[Sequence[int], Tensor, torch.cuda.Event | None]] = deque()

    def copy(self, batch: BatchLosses) -> None:
        """Start to copy a batch's losses to the host, and wait for nothing."""
        values = batch.values.detach()
        on_cuda = values.device.type == "cuda"
        # Asynchronous copies from CUDA arrive in pinned memory; of other devices none is promised.
        copied = values.to("cpu", non_blocking=on_cuda)
        arrival = torch.cuda.Event() if on_cuda else None
        if arrival is not None:
            arrival.record(torch.cuda.current_stream(values.device))
        self._copies.append((batch.examples, copied, arrival))

    def look(self, all_but: int = 0) -> None:
        """Check the batches that were copied, but for the last ones.

        Raises:
            ValueError: a loss is NaN or infinite.
        """
        while len(self._copies) > all_but:
            examples, losses, arrival = self._copies.popleft()
            if arrival is not None:
                arrival.synchronize()
            require_finite(examples, losses)
            self._bar.update(len(losses))


def run_checked(
    work: Workload, backward: Callable[[BatchLosses], None], device: torch.device, bar: Any
) -> None:
    """Run a backward pass for every batch of this rank.

    Raises:
        ValueError: a loss is NaN or infinite.
    """
    check = LossCheck(bar)
    with closing(work.losses(device)) as batches:
        for batch in batches:
            check.copy(batch)
            backward(batch)
            # Before the next forward pass, not after it: the losses hold this batch's graph.
            del batch
            check.look(all_but=1)
        check.look()


def require_finite(examples: Sequence[int], losses: Tensor) -> None:
    """Raise ValueError for the first of the examples whose loss is NaN or infinite."""
    for example, loss in zip(examples, losses.tolist(), strict=True):
        if not math.isfinite(loss):
            raise ValueError(
                f"loss must be finite, got {loss} for example {example}; check the model's "
                "weights and dtype, and that example's tokens"
            )
