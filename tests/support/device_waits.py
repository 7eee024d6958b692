"""Where the host waits for a GPU, by what torch warns of."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def device_waits() -> Iterator[list[warnings.WarningMessage]]:
    """The waits inside the block, listed when it ends, each with the file and line it was at."""
    waits: list[warnings.WarningMessage] = []
    # Setting the mode warns too, once in a process: it is a prototype.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch.cuda.set_sync_debug_mode("warn")
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
            waits.extend(each for each in caught if "synchronizing CUDA" in str(each.message))
