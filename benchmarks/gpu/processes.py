"""Processes that end when they should: at their limit, and with the process that started them.

Each is started with a mark in its environment, which all that it starts inherits, in whatever
groups or sessions: the mark says what is to be ended. A keeper, a process that does nothing else,
ends what is left where the one that started it was killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

MARK = "FASTDEAN_GPU_PART"
_PATIENCE_S = 5


def end_marked(mark: str) -> None:
    """Kill every process whose mark begins with `mark`; waits a few seconds until all are gone."""
    sought, end = f"\0{MARK}={mark}".encode(), time.monotonic() + _PATIENCE_S
    while pids := [pid for pid, variables in _environments() if sought in variables]:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > end:  # what a driver holds in the kernel is not waited for
            return
        time.sleep(0.02)


def _environments() -> list[tuple[int, bytes]]:
    """Of each process; empty for one that has ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            found.append((int(path.parent.name), b"\0" + path.read_bytes()))
    return found


def keeper(mark: str) -> subprocess.Popen:
    """A process that ends what is marked once its stdin closes, however that comes about."""
    command = [sys.executable, __file__, mark]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


if __name__ == "__main__":
    sys.stdin.read()
    end_marked(sys.argv[1])
