"""Which ranks of a job are gone or do not answer, found out when a collective has failed.

A process that is killed closes its connections, and a collective that waits for one that hangs
runs into the process group's timeout: errors that name no rank, and not all ranks see one. So who
does leaves a word in the group's store. Those who wait in a collective look for such words, leave
their own, and whose is missing is lost.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch

from fastdean.wording.mendable import StateError

# Seconds between two looks of who waits.
_LOOK = 0.5
# Seconds for the word of a rank that is as far as this one; and for that of one which has still to
# come so far, where the caller sets no time.
_SOON, _LATE = 3.0, 60.0
_PREFIX = "fastdean: ranks that have seen a collective fail"
_ANY = "any"

T = TypeVar("T")


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


def wait(work: Any, device: torch.device) -> None:
    """Wait for a collective of tensors on `device`; a RuntimeError if another rank saw one fail.

    On a GPU nobody waits here, and torch's own watchdog ends a process that waits there too long.

    Args:
        work: what `torch.distributed` returns with `async_op=True`.
    """
    if device.type != "cpu":
        work.wait()
        return
    answers = True
    while True:
        try:
            work.wait(timedelta(seconds=_LOOK))
            return
        except RuntimeError:
            if work.is_completed():
                # With an error of its own, or just now.
                work.wait()
                return
        if answers:
            seen = _within(_LOOK, lambda: _store().check([_ANY]))
            if seen:
                raise RuntimeError("another rank has seen a collective fail")
            answers = seen is not None


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
    limit = max(0.0, until - time.monotonic()) + _SOON
    found = _within(limit, lambda: _without_a_word(rank, size, until))
    # Without an answer of the store either: it lies in the process of rank 0, where no launcher
    # holds it.
    return [0] if found is None and rank else (found or [])


def _without_a_word(rank: int, size: int, until: float) -> list[int]:
    store = _store()
    store.set(str(rank), "")
    store.set(_ANY, "")
    silent = [other for other in range(size) if other != rank]
    soon = min(until, time.monotonic() + _SOON)
    while silent:
        silent = [other for other in silent if not store.check([str(other)])]
        now = time.monotonic()
        # One must be lost, or no collective had failed.
        if now > until or (len(silent) == 1 and now > soon):
            break
        time.sleep(_LOOK / 10)
    return silent


def _store() -> torch.distributed.Store:
    from torch.distributed import PrefixStore
    from torch.distributed.distributed_c10d import _get_default_store

    return PrefixStore(_PREFIX, _get_default_store())


def _within(seconds: float, ask: Callable[[], T]) -> T | None:
    """What the store answers to a question; None where it does not, or too late.

    Some of its calls have no time limit, so they are made in a thread of their own.
    """
    found: list[T] = []

    def asked() -> None:
        with suppress(RuntimeError):
            found.append(ask())

    asking = threading.Thread(target=asked, daemon=True)
    asking.start()
    asking.join(seconds)
    return found[0] if found else None
