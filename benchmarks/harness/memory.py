"""The resident memory of this process, as Linux counts it; elsewhere nothing is counted (None).

Writing 5 to /proc/self/clear_refs sets the peak of the resident set (VmHWM) back to its present
size, so that a peak is exact and costs no sampling thread that would disturb a time. The peak in
`resource.getrusage` is no substitute: a process inherits that of the one which started it.
"""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def forget_peak() -> int | None:
    """Return freed memory to the system and forget earlier peaks; the bytes held now.

    What was freed earlier could hide growth otherwise, or add to it.
    """
    gc.collect()
    _return_freed_memory()
    try:
        _CLEAR.write_text("5")
    except OSError:
        return None
    return _status_bytes("VmRSS")


def peak_bytes() -> int | None:
    """The most bytes ever held, or since `forget_peak`."""
    return _status_bytes("VmHWM")


def _return_freed_memory() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def _status_bytes(field: str) -> int | None:
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None
