"""How much memory a job may still take, and took.

What it may take is the least of what machine, container and limits leave.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

_MEMORY = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")
_OF_GROUP = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")
# Version 1 writes "no limit" as a number of this size.
_NO_LIMIT = 1 << 60


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on `device`; None where the system does not say.

    On a CPU the least of the free memory, what is left of each control group (versions 1 and 2)
    and what is left of the process's limits on its address space and data.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = [*_free(), *_left_in_groups(), *_left_of_limits()]
    return max(0, min(found)) if found else None


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that this process has held so far; None where the system does not say.

    On a GPU torch's allocations; else the resident memory, mapped pages of files included.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage where this is there: a process inherits the peak of the one that started it.
    found = next(_field(_STATUS, "VmHWM"), None)
    if found is not None:
        return found
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory() -> int | None:
    """Bytes of memory that this process holds now; None where the system does not say."""
    return next(_field(_STATUS, "VmRSS"), None)


def anonymous_memory() -> int | None:
    """As `resident_memory`, without mapped pages of files."""
    return next(_field(_STATUS, "RssAnon"), None)


def give_back_freed(device: torch.device) -> None:
    """Give memory that was freed on a CPU back to the system, where its allocator can (glibc).

    By itself glibc keeps freed pieces of up to 32 MB, and a larger tensor fits into none of them.
    """
    if device.type != "cpu":
        return
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another allocator; Windows
        return
    trim(0)


def _free() -> Iterator[int]:
    yield from _field(_MEMORY, "MemAvailable")


def _field(path: Path, name: str) -> Iterator[int]:
    """A field of a file of /proc, in bytes."""
    for line in _lines(path):
        if line.startswith(f"{name}:"):
            yield int(line.split()[1]) * 1024


def _left_in_groups() -> Iterator[int]:
    for line in _lines(_OF_GROUP):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, used = _GROUPS, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, used = _GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = root / path.strip("/")
        # In a container the path may be the host's, and the container's own group is the root.
        for group in (folder, *folder.parents):
            if group != root and root not in group.parents:
                break
            most = next(_lines(group / limit), "max")
            if most != "max" and int(most) < _NO_LIMIT:
                # The kernel gives back cached files before it runs out.
                cached = sum(
                    int(value)
                    for key, value in (entry.split() for entry in _lines(group / "memory.stat"))
                    if key in ("inactive_file", "total_inactive_file")
                )
                yield int(most) - int(next(_lines(group / used), "0")) + cached


def _left_of_limits() -> Iterator[int]:
    try:
        import resource
    except ImportError:  # Windows
        return
    for limit, field in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY:
            yield from (most - used for used in _field(_STATUS, field))


def _lines(path: Path) -> Iterator[str]:
    try:
        yield from path.read_text().splitlines()
    except OSError:
        return
