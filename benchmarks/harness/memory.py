"""The memory that a call adds to this process: its peak less what was held just before.

On CUDA torch's allocator keeps that count. On Linux the kernel does: writing 5 to
/proc/self/clear_refs sets the peak of the resident set (VmHWM) back to its present size. The peak
in `resource.getrusage` is no substitute: a process inherits that of the one which started it.
Elsewhere nothing is counted (None). This file imports nothing that takes memory itself.
"""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class Held:
    """What is held now; made anew, it forgets the peaks before.

    Args:
        device: of torch; None: the process.
    """

    def __init__(self, device: Any = None) -> None:
        self._device = device if device is not None and device.type == "cuda" else None
        gc.collect()
        if self._device is None:
            self._bytes = _forget_peak()
        else:
            from torch import cuda

            cuda.synchronize(device)
            cuda.reset_peak_memory_stats(device)
            self._bytes = cuda.memory_allocated(device)

    def added_bytes(self) -> int | None:
        """The most that was held since, above that."""
        if self._device is None:
            peak = peak_bytes()
        else:
            from torch import cuda

            peak = cuda.max_memory_allocated(self._device)
        return None if peak is None or self._bytes is None else max(0, peak - self._bytes)


def peak_bytes() -> int | None:
    """The most bytes this process ever held, or since the last `Held()`."""
    return status_bytes("VmHWM")


def _forget_peak() -> int | None:
    """What was freed earlier could hide growth, or add to it: it goes back to the system first."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
    try:
        _CLEAR.write_text("5")
    except OSError:
        return None
    return status_bytes("VmRSS")


def status_bytes(field: str) -> int | None:
    """A field of /proc/self/status; None where there is none."""
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")]
    return found[0] if found else None
