"""The memory that a call adds to this process: its peak less what was held just before.

On CUDA torch's allocator keeps that count. On Linux the kernel does: writing 5 to
/proc/self/clear_refs sets the peak of the resident set (VmHWM) back to its present size, so that a
peak is exact and costs no sampling thread that would disturb a time. The peak in
`resource.getrusage` is no substitute: a process inherits that of the one which started it.
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
        self._cuda = None if device is None or device.type != "cuda" else _cuda(device)
        gc.collect()
        if self._cuda is None:
            self._bytes = _forget_peak()
        else:
            self._cuda.reset_peak_memory_stats(device)
            self._bytes = self._cuda.memory_allocated(device)
        self._device = device

    def added_bytes(self) -> int | None:
        """The most that was held since, above that."""
        peak = peak_bytes() if self._cuda is None else self._cuda.max_memory_allocated(self._device)
        return None if peak is None or self._bytes is None else max(0, peak - self._bytes)


def peak_bytes() -> int | None:
    """The most bytes this process ever held, or since the last `Held()`."""
    return _status_bytes("VmHWM")


def _cuda(device: Any) -> Any:
    import torch

    torch.cuda.synchronize(device)
    return torch.cuda


def _forget_peak() -> int | None:
    """What was freed earlier could hide growth, or add to it: it goes back to the system first."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
    try:
        _CLEAR.write_text("5")
    except OSError:
        return None
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int | None:
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None
