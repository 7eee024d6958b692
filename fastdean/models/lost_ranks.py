"""Which ranks of a job are gone or do not answer, found out when a collective has failed.

A process that is killed closes its connections, and a collective that waits for one that hangs
runs into the process group's timeout: both are errors that name no rank. So each rank that sees one
leaves a word in the group's store, and looks whose word is missing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch

from fastdean.wording.mendable import StateError

# Seconds for the word of a rank that is as far as this one, whose own error is on its way; and for
# that of one which has still to come so far, where the caller sets no time.
_SOON, _LATE = 3.0, 60.0
_BETWEEN_LOOKS = 0.02
_PREFIX = "fastdean: ranks that are there"


@contextmanager
def naming_lost_ranks(rank: int, size: int, timeout: float | None) -> Iterator[None]:
    """Around a collective: its failure becomes a StateError with the ranks that are lost.

    An error that all ranks live to see stays what it is.

    Args:
        timeout: seconds from the beginning of the collective until all who say nothing count as
            lost; None: 60 from its end. A single one does within seconds: somebody must be.
    """
    began = time.monotonic()
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        now = time.monotonic()
        until = now + _LATE if timeout is None else max(began + timeout, now + _SOON)
        lost = _lost(rank, size, until)
        if not lost:
            raise
        names = ", ".join(map(str, lost))
        said = str(error).partition("\n")[0]
        raise StateError(
            f"every rank must stay to the end of the job, got no answer from rank {names} of "
            f"{size} within {time.monotonic() - began:.0f} s; it has ended or hangs: see what it "
            f"said last, and start the job again ({said})"
        ) from error


def limit_collectives(seconds: float) -> Callable[[], None]:
    """Let none of the default process group wait for longer; what is returned undoes it."""
    from torch.distributed.distributed_c10d import _get_default_group

    group = _get_default_group()
    backends = [group._get_backend(device) for device in group._device_types]
    before = [(backend, backend.options._timeout) for backend in backends]
    for backend in backends:
        backend._set_default_timeout(timedelta(seconds=seconds))

    def undo() -> None:
        for backend, timeout in before:
            backend._set_default_timeout(timeout)

    return undo


def _lost(rank: int, size: int, until: float) -> list[int]:
    """The ranks that have not said that they are there."""
    # Unless somebody looks: the store may lie in a process that does not answer either, in that of
    # rank 0 where no launcher holds it. So the look is taken in a thread of its own.
    found = [0]

    def look() -> None:
        with suppress(RuntimeError):
            found[:] = _without_a_word(rank, size, until)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    looking.join(max(0.0, until - time.monotonic()) + _SOON)
    return [] if found == [rank] else list(found)


def _without_a_word(rank: int, size: int, until: float) -> list[int]:
    from torch.distributed import PrefixStore
    from torch.distributed.distributed_c10d import _get_default_store

    store = PrefixStore(_PREFIX, _get_default_store())
    store.set(str(rank), "")
    silent = [other for other in range(size) if other != rank]
    soon = min(until, time.monotonic() + _SOON)
    while silent:
        silent = [other for other in silent if not store.check([str(other)])]
        now = time.monotonic()
        # One must be lost, or no collective had failed.
        if now > until or (len(silent) == 1 and now > soon):
            break
        time.sleep(_BETWEEN_LOOKS)
    return silent
