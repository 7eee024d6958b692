"""What a sweep says of its progress; of one that is lost with its process nobody takes note.

`Resumable` (resumable.py) writes it down, and knows what an earlier process has done.
"""

from __future__ import annotations

from torch import nn


class Milestones:
    """Steps have numbers from 0, the same in every run of a job.

    Attributes:
        used: of the sweep (`Sweep`): by layer, the layers whose results it takes.
        bytes_read: of weights, by earlier processes.
    """

    def __init__(self) -> None:
        self.used: dict[int, frozenset[int]] = {}
        self.bytes_read = 0

    def pending(self, step: int) -> bool:
        """Whether a step is still to be done."""
        return True

    def batches_done(self, step: int) -> int:
        """How many batches of a step that is pending are done."""
        return 0

    def batch_done(self, step: int, batches: int) -> None:
        """So many batches of a step are done, and each of the others can be done by itself."""

    def reached(self, step: int) -> None:
        """A step is done. All ranks call it."""

    def require_same(self, name: str, layer: nn.Module) -> None:
        """ValueError if a layer, its weights in memory, is not what it was in an earlier step."""
