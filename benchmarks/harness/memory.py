"""The memory that a call adds to this process: its peak less what was held just before.

On CUDA torch's allocator keeps that count. On Linux the kernel does: writing 5 to
/proc/self/clear_refs sets the peak of the resident set back to its present size. Elsewhere nothing
is counted (None).
"""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from fastdean.models.available_memory import give_back_freed, peak_memory, resident_memory

_CPU = torch.device("cpu")
_CLEAR = Path("/proc/self/clear_refs")


class Held:
    """What is held now, of the process or on a GPU; made anew, it forgets the peaks before."""

    def __init__(self, device: torch.device = _CPU) -> None:
        self._device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._bytes = torch.cuda.memory_allocated(device)
        else:
            self._bytes = _forget_peak()

    def added_bytes(self) -> int | None:
        """The most that was held since, above that."""
        return None if self._bytes is None else max(0, peak_memory(self._device) - self._bytes)


def peak_bytes() -> int | None:
    """The most bytes this process ever held, or since the last `Held()`."""
    return peak_memory(_CPU)


def _forget_peak() -> int | None:
    """What was freed earlier could hide growth, or add to it: it goes back to the system first."""
    give_back_freed(_CPU)
    try:
        _CLEAR.write_text("5")
    except OSError:
        return None
    return resident_memory()
