"""How long a run may go on, and what it says while it does."""

from __future__ import annotations

import sys
import time


def say(line: str) -> None:
    """Progress goes to stderr; stdout holds results."""
    print(line, file=sys.stderr, flush=True)


class Budget:
    """Seconds a run may take, counted from its creation; None: as many as it needs.

    Asked before a case starts: a case that has started is finished.
    """

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def spent(self) -> bool:
        return self._end is not None and time.monotonic() >= self._end
