"""Processes that end when they should: at their limit, and with the process that started them.

Each runs in a session of its own, and what it starts stays in that session, whatever groups or
threads it makes of it: the session is what is ended. A keeper, a process that does nothing else,
ends the sessions that are left where the one that started them was killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


def end_session(session: int, *, patience: float = 5.0) -> None:
    """Kill every process of a session, and wait until they are gone or `patience` is used up."""
    end = time.monotonic() + patience
    while members := _members(session):
        for pid in members:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > end:
            return
        time.sleep(0.02)


def _members(session: int) -> list[int]:
    """Those that run; one that is dead and was not asked for its status yet is none."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # After the name, which may hold anything: state, parent, group, session.
            state, _, _, its_session = (
                stat.read_text("utf-8", "replace").rpartition(")")[2].split(maxsplit=4)[:4]
            )
        except (OSError, ValueError):
            continue  # ended since
        if int(its_session) == session and state not in "ZX":
            found.append(int(stat.parent.name))
    return found


class Keeper:
    """Ends the sessions it was told of and that are left, once its pipe closes."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, start_new_session=True
        )

    def begin(self, session: int) -> None:
        self._say(f"+{session}")

    def end(self, session: int) -> None:
        self._say(f"-{session}")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()

    def _say(self, line: str) -> None:
        # Where somebody has ended the keeper, the work goes on without one.
        with contextlib.suppress(OSError):
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()


class Running:
    """A command on its way, its output in a file.

    Attributes:
        started: `time.monotonic()` at its start.
        limit: seconds it may take.
    """

    def __init__(
        self,
        command: Sequence[str],
        keeper: Keeper,
        *,
        log: Path,
        limit: float,
        cwd: Path,
        environment: Mapping[str, str],
    ) -> None:
        self.started, self.limit = time.monotonic(), limit
        self._keeper = keeper
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=dict(environment),
                start_new_session=True,
            )
        keeper.begin(self._process.pid)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def poll(self) -> int | None:
        """The status, negative for a signal; None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """End whatever is left of it; what a driver holds in the kernel is not waited for."""
        end_session(self._process.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        self._keeper.end(self._process.pid)


def _keep() -> None:
    # A Ctrl-C is for the one who is kept: it ends its processes itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    left: dict[int, None] = {}
    for line in sys.stdin:
        if line.startswith("+"):
            left[int(line[1:])] = None
        else:
            left.pop(int(line[1:]), None)
    for session in left:
        end_session(session)


if __name__ == "__main__":
    _keep()
