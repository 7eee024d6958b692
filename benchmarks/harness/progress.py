"""What a run says while it goes on."""

from __future__ import annotations

import sys


def say(line: str) -> None:
    """Progress goes to stderr; stdout holds results."""
    print(line, file=sys.stderr, flush=True)
