"""Which ranks of a job are gone, do not answer or failed alone, found out over the group's store.

A process that is killed closes its connections, and a collective that waits for one that hangs
runs into the process group's timeout: errors that name no rank, and not all ranks see one. So who
does leaves a word in the group's store. Those who wait in a collective look for such words, leave
their own, and whose is missing is lost. A rank that fails where others wait for it in a collective
that is not ours leaves a word too: what it failed with.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch

from fastdean.wording.mendable import StateError, is_out_of_memory

# Seconds between two looks of who waits.
_LOOK = 0.5
# Seconds for the word of a rank that is as far as this one; and for that of one which has still to
# come so far, where the caller sets no time.
_SOON, _LATE = 3.0, 60.0
_PREFIX = "fastdean: ranks that have seen a collective fail"
_ANY = "any"
# The words of whom saw another one's failure, and of whom failed itself.
_SAW, _FAILED = "saw", "failed: "
_LONGEST_WORD = 300

T = TypeVar("T")


class Words:
    """What the ranks of one job leave in the store of their group.

    A store outlives jobs, and torchrun's outlives the processes too, so the words of a job have a
    number, which rank 0 draws and its ranks agree on when they first meet (`agreed`). Before that
    nobody looks for words while it waits.
    """

    def __init__(self) -> None:
        self._number: int | None = None

    def drawn(self, rank: int) -> int:
        """What the ranks add up to agree on the number."""
        return secrets.randbits(62) if rank == 0 and self._number is None else 0

    def agreed(self, total: int) -> None:
        """The ranks' numbers have been added up."""
        if self._number is None:
            self._number = total

    def say_failed(self, rank: int, error: BaseException) -> None:
        """Tell whoever waits for this rank that it has failed, and with what."""
        text = f"{_FAILED}{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        _within(_SOON, lambda: self._leave(rank, text[:_LONGEST_WORD]))

    @contextmanager
    def naming(self, rank: int, size: int, timeout: float | None) -> Iterator[None]:
        """Around a collective: its failure becomes a StateError with the ranks that are to blame.

        An error that all ranks live to see stays what it is. So does one of this rank alone, which
        the others are told of.

        Args:
            timeout: seconds from the beginning of the collective until all who say nothing count as
                lost; None: 60 from its end. A single one does within seconds: somebody must be.
        """
        began = time.monotonic()
        try:
            yield
        except BaseException as error:
            # Of others' collectives not all say whose error it is.
            if not isinstance(error, RuntimeError) or is_out_of_memory(error):
                self.say_failed(rank, error)
            else:
                self._blame(rank, size, timeout, began, error)
            raise

    def explain(
        self, rank: int, size: int, timeout: float | None, began: float, error: BaseException
    ) -> None:
        """Of an error that came out of a model whose layers wait for each other on all ranks.

        A StateError with the ranks that are to blame, if others are; else they are told of it.

        Args:
            timeout: as `naming` takes it.
            began: when this rank was last in step with the others, by `time.monotonic`.
        """
        if is_of_a_collective(error):
            self._blame(rank, size, timeout, began, error)
        else:
            self.say_failed(rank, error)

    def _blame(
        self, rank: int, size: int, timeout: float | None, began: float, error: BaseException
    ) -> None:
        now = time.monotonic()
        # Others may have begun to wait a little later, inside of a layer, where they hear nothing.
        until = now + _LATE if timeout is None else max(began + timeout, now) + _SOON
        lost, failed = self._missing(rank, size, until)
        said = str(error).partition("\n")[0]
        if failed:
            names = "; ".join(f"{other} ({text})" for other, text in sorted(failed.items()))
            raise StateError(
                f"every rank must finish its part of the work, got {len(failed)} of {size} that "
                f"failed: rank {names}; see their own messages"
            ) from error
        if lost:
            names = ", ".join(map(str, lost))
            raise StateError(
                f"every rank must stay to the end of the job, got no answer from rank {names} of "
                f"{size} within {time.monotonic() - began:.0f} s; it has ended or hangs: see what "
                f"it said last, and start the job again ({said})"
            ) from error

    def wait(self, work: Any, device: torch.device) -> None:
        """Wait for a collective of tensors on `device`; a RuntimeError if another rank saw one
        fail.

        On a GPU nobody waits here, and torch's own watchdog ends a process that waits there too
        long.

        Args:
            work: what `torch.distributed` returns with `async_op=True`.
        """
        if device.type != "cpu":
            work.wait()
            return
        answers = self._number is not None
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
                seen = _within(_LOOK, lambda: self._store().check([_ANY]))
                if seen:
                    raise _AnotherFailed("another rank has seen a collective fail")
                answers = seen is not None

    def _missing(self, rank: int, size: int, until: float) -> tuple[list[int], dict[int, str]]:
        """The ranks that have not said that they are there, and what others failed with."""
        limit = max(0.0, until - time.monotonic()) + _SOON
        found = _within(limit, lambda: self._without_a_word(rank, size, until))
        if found is None:
            # Without an answer of the store either: it lies in the process of rank 0, where no
            # launcher holds it.
            return ([0] if rank else []), {}
        return found

    def _without_a_word(
        self, rank: int, size: int, until: float
    ) -> tuple[list[int], dict[int, str]]:
        self._leave(rank, _SAW)
        store = self._store()
        silent = [other for other in range(size) if other != rank]
        soon = min(until, time.monotonic() + _SOON)
        failed: dict[int, str] = {}
        while silent:
            try:
                spoke = {o: store.get(str(o)).decode() for o in silent if store.check([str(o)])}
            except RuntimeError:
                # Rank 0 knew who it was, if it spoke, and has gone with the store.
                return ([0] if 0 in silent else silent), failed
            silent = [other for other in silent if other not in spoke]
            for other, text in spoke.items():
                # Without a number it may be another job's.
                if text.startswith(_FAILED) and self._number is not None:
                    failed[other] = text.removeprefix(_FAILED)
            now = time.monotonic()
            # Whose failure it was is known; or one must be lost, or no collective had failed.
            if failed or now > until or (len(silent) == 1 and now > soon):
                break
            time.sleep(_LOOK / 10)
        return silent, failed

    def _leave(self, rank: int, text: str) -> None:
        store = self._store()
        # The first one counts: what comes after it comes of it.
        if self._number is None or not store.check([str(rank)]):
            store.set(str(rank), text)
        store.set(_ANY, "")

    def _store(self) -> torch.distributed.Store:
        from torch.distributed import PrefixStore
        from torch.distributed.distributed_c10d import _get_default_store

        return PrefixStore(f"{_PREFIX} {self._number}", _get_default_store())


class _AnotherFailed(RuntimeError):
    """A collective that this rank waits for will not end."""


def is_of_a_collective(error: BaseException) -> bool:
    """Whether an error is one that a rank sees when another one does not take part."""
    if isinstance(error, _AnotherFailed | torch.distributed.DistError):
        return True
    # Which gloo raises as what torch raises for anything else.
    return type(error) is RuntimeError and any(
        word in str(error) for word in ("gloo", "NCCL", "nccl", "c10d")
    )


def group_timeout() -> float:
    """Seconds that a rank waits for another one in the default process group."""
    from torch.distributed.distributed_c10d import _get_default_group

    group = _get_default_group()
    backends = [group._get_backend(device) for device in group._device_types]
    times = [each.options._timeout for each in backends if hasattr(each, "options")]
    return min(times, default=torch.distributed.default_pg_timeout).total_seconds()


def limit_collectives(seconds: float) -> Callable[[], None]:
    """Let nobody wait for longer in a process group that there is; what is returned undoes it.

    In the groups of meshes too, in which a model's own layers wait.
    """
    from torch.distributed.distributed_c10d import _world

    backends = {
        id(backend): backend
        for group in _world.pg_map
        for device in group._device_types
        if hasattr(backend := group._get_backend(device), "options")
    }
    before = [(backend, backend.options._timeout) for backend in backends.values()]
    for backend in backends.values():
        backend._set_default_timeout(timedelta(seconds=seconds))

    def undo() -> None:
        for backend, timeout in before:
            backend._set_default_timeout(timeout)

    return undo


def _within(seconds: float, ask: Callable[[], T]) -> T | None:
    """What the store answers to a question; None where it does not, or too late.

    Some of its calls have no time limit, so they are made in a thread of their own.
    """
    found: list[T] = []

    def asked() -> None:
        # ValueError: the group is gone, and its store with it.
        with suppress(RuntimeError, ValueError):
            found.append(ask())

    asking = threading.Thread(target=asked, daemon=True)
    asking.start()
    asking.join(seconds)
    return found[0] if found else None
