"""A job layer by layer in a folder from which another process goes on with it.

    DIR/rank-0/job.json, progress.json     which job it is, the commit record (job_files.py)
    DIR/rank-0/state-3 ...                 the files (kept_files.py)

A commit flushes the files, replaces progress.json, and, when all ranks have done so, removes files
that nobody needs. A kill at any moment leaves the commit before or the one after. README.md says
why nothing is added twice.
"""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import nn

from fastdean.coupling.resuming.job_files import (
    JOB,
    PROGRESS,
    START,
    rank_folder,
    rank_of,
    read_job,
    read_progress,
    require_same_parts,
    write_job,
    write_progress,
)
from fastdean.coupling.resuming.job_parts import circumstances, weights_digest
from fastdean.coupling.resuming.kept_files import KeptFiles, is_state_file
from fastdean.coupling.resuming.milestones import Milestones
from fastdean.coupling.resuming.taken_over import take_over
from fastdean.files.storage import (
    held,
    is_temporary,
    real_place,
    remove_folder,
    sweep,
)
from fastdean.models.identity import json_digest
from fastdean.models.layers.windows import Windows
from fastdean.models.model_state import undone
from fastdean.models.ranks.distributed import Ranks
from fastdean.wording.log import logger
from fastdean.wording.mendable import StateError

# Between two commits within a step.
_SECONDS = 30.0


class Resumable(Milestones):
    """The progress of one rank of a job, written down. Made by `resumable`.

    Attributes:
        home: where the job keeps its states, and its results.
    """

    def __init__(
        self,
        folder: Path,
        number: str,
        ranks: Ranks,
        resident: Collection[str] = (),
        read_here: Callable[[], int] = lambda: 0,
    ) -> None:
        super().__init__()
        self._read_here = read_here
        self._folder, self._number, self._ranks = folder, number, ranks
        self.home = KeptFiles(folder, number)
        self._commit: dict[str, Any] = START
        self._before: dict[str, Any] | None = None
        # Name of a layer -> digest of its weights.
        self._weights: dict[str, str] = {}
        # Layers whose weights are there all the time: compared at the beginning alone.
        self._resident = frozenset(resident)
        # A step whose batches are done one by one, and how many are.
        self._within: tuple[int, int] | None = None
        self._written = time.monotonic()

    def open(self, layers: Mapping[str, nn.Module], windows: Windows, *, fresh: bool) -> None:
        """Read how far the job came, and go back to where all ranks have been.

        Layers that the job has run are compared now: those that are through are not looked at
        again, and another model's must not be added to the job's before one differs.

        Args:
            fresh: whether this rank has just made its folder.
        Raises:
            ValueError: a file is damaged, or a layer has changed.
            RuntimeError: the ranks' folders do not belong together.
        """
        with self._ranks.failing_together():
            self._read()
        step = -self._ranks.highest(-self._commit["step"])
        # Those that are through go back to the start before any folder goes.
        is_through = step == 0 and not self._ranks.highest(int(fresh))
        with self._ranks.failing_together():
            if self._commit["step"] != step:
                # Not one that has taken finished results over, with which it begins.
                if is_through and (self._before is None or self._before["step"] != 0):
                    self._before = START
                if self._before is None or self._before["step"] != step:
                    raise StateError(
                        "resume must hold the states of all ranks, got those of a rank that is at "
                        f"step {self._commit['step']} where another one is at {step}; remove the "
                        "folder to start again"
                    )
                # Written down first: what is cut off below must not be looked for again.
                self._save(self._before, None)
            self._go_with_the_team()
            self.home.restore(self._commit["files"])
        self._require_same_entries()
        with self._ranks.failing_together():
            for k, (name, layer) in enumerate(layers.items()):
                if name in self._resident:
                    self._compare(name, layer)
                # Windows may need all ranks, of which one may have run a layer more.
                elif self._ranks.highest(int(name in self._weights)):
                    with windows.layer(k, k):
                        self._compare(name, layer)
        if self._ranks.first and not self.is_at_the_start:
            logger.warning(
                "scoring goes on from %r, after step %d of its windows",
                str(self._folder.parent),
                step,
            )

    def _require_same_entries(self) -> None:
        """RuntimeError unless all ranks have finished the same: they make the others together."""
        keys = sorted(key[1:] for key, _, _ in self.home.notes("entries"))
        if not self._ranks.hold_the_same(json_digest(keys)):
            raise StateError(
                "resume must hold the same finished matrices for all ranks, got others; remove the "
                "folder to start again"
            )

    def _go_with_the_team(self) -> None:
        """Begin at the same batch as the ranks that are given the same ones, and wait in layers.

        What this one has kept of later batches is kept once more.
        """
        if not self._ranks.teams:
            return
        own = torch.tensor([self._commit["batches"]], dtype=torch.int64)
        found = self._ranks.gather([own])
        least = min(int(found[rank][0]) for rank in self._ranks.team)
        self._commit = {**self._commit, "batches": least}

    @property
    def is_at_the_start(self) -> bool:
        """Whether there is nothing to go on from."""
        return (self._commit["step"], self._commit["batches"]) == (0, 0)

    @property
    def has_entries(self) -> bool:
        """Whether there are finished results."""
        return any(True for _ in self.home.notes("entries"))

    def pending(self, step: int) -> bool:
        return step >= self._commit["step"]

    def batches_done(self, step: int) -> int:
        return self._commit["batches"] if step == self._commit["step"] else 0

    def batch_done(self, step: int, batches: int) -> None:
        self._within = (step, batches)
        if time.monotonic() - self._written > _SECONDS:
            self.write_down()

    def reached(self, step: int) -> None:
        self._within = None
        with self._ranks.failing_together():
            self._write(step + 1, 0, before=self._commit)
        # Nobody goes back behind this step any more.
        self.home.settle()

    def finish(self) -> None:
        """There is nothing to go on from any more; the files are of no use."""
        self._save(START, None)

    def require_same(self, name: str, layer: nn.Module) -> None:
        if name not in self._resident:
            self._compare(name, layer)

    def _compare(self, name: str, layer: nn.Module) -> None:
        found = weights_digest(layer)
        if self._weights.setdefault(name, found) != found:
            raise ValueError(
                f"resume must be a folder of this job, got {str(self._folder.parent)!r} with one "
                f"that differs in the weights of {name}; choose another folder, or score the same "
                "model"
            )

    def write_down(self) -> None:
        """Commit the batches of a step that is not through, if it may be left at any of them."""
        if self._within is not None:
            self._write(*self._within, before=None)

    def _write(self, step: int, batches: int, before: dict[str, Any] | None) -> None:
        commit = {"step": step, "batches": batches, "files": self.home.standing()}
        self._save(commit, before)

    def _save(self, commit: dict[str, Any], before: dict[str, Any] | None) -> None:
        content = {
            "number": self._number,
            "commit": commit,
            "before": before,
            "weights": self._weights,
            "used": {str(k): sorted(used) for k, used in self.used.items()},
            "most_bytes": self.home.most_bytes,
            "bytes_read": self.bytes_read + self._read_here(),
        }
        write_progress(self._folder, content)
        self._commit, self._before = commit, before
        self._written = time.monotonic()

    def _read(self) -> None:
        found = read_progress(self._folder, self._number)
        if found is None:
            self._save(START, None)
            return
        self._commit, self._before = found["commit"], found["before"]
        self._weights = dict(found["weights"])
        self.used |= {int(k): frozenset(used) for k, used in found["used"].items()}
        self.home.most_bytes = found["most_bytes"]
        self.bytes_read = found["bytes_read"]


@contextmanager
def resumable(
    where: str | Path,
    parts: Mapping[str, str],
    layers: Mapping[str, nn.Module],
    windows: Windows,
    resident: Collection[str],
    ranks: Ranks,
    results_bytes: int,
    worth: Mapping[tuple[int, str], torch.device],
    read_here: Callable[[], int] = lambda: 0,
) -> Iterator[Resumable]:
    """The job in a folder, as far as it came. When the block ends well, its files are removed.

    Args:
        where: a folder that is new, empty, or holds this job unfinished.
        parts: what makes two jobs the same (`job_parts`).
        layers: whose weights are compared.
        windows: bring in a layer's weights.
        resident: names of the layers whose weights are in memory all the time.
        results_bytes: of the results, for which the disk must have room besides.
        worth: what is taken over of a job on another number of ranks (`take_over`).
        read_here: bytes of weights that this process has read for the job.
    Raises:
        ValueError: the folder holds anything else, or another process is at work with it.
    """
    place = real_place(where, "resume")
    own = rank_folder(place, ranks.rank)
    # Noted by all ranks, of which any may be the one that is left to remove them.
    made = ranks.highest(sum(1 for each in (place, *place.parents) if not each.exists()))
    with (
        undone(lambda: _remove_empty_rank(own, made)),
        _ending_at_sigterm(),
        ExitStack() as stack,
    ):
        with ranks.failing_together():
            _require_ours(place, where)
        take_over(place, where, parts, ranks, worth)
        with ranks.failing_together():
            if ranks.first:
                _remove_left_by_others(place, ranks.size)
            try:
                own.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StateError(
                    f"resume must be a folder that can be made and written to, got {str(where)!r}: "
                    f"{error.strerror or error}; choose another"
                ) from error
            sweep(own)
        fresh = False
        try:
            with ranks.failing_together():
                stack.enter_context(held(own, "resume"))
                fresh = not os.path.lexists(own / JOB)
                number, levels = _claimed(own, where, parts, made, ranks)
            job = Resumable(own, number, ranks, resident, read_here)
            job.home.besides_bytes = results_bytes
            # Twice: an interrupt of the first leaves the second.
            stack.enter_context(undone(job.home.close))
            job.open(layers, windows, fresh=fresh)
        except BaseException:
            if fresh:
                with suppress(OSError):
                    remove_folder(own)
            raise
        try:
            yield job
        except BaseException:
            # Whatever ended it: what is done of a step that can be left is not done again.
            with suppress(OSError):
                job.write_down()
            if job.is_at_the_start and not job.has_entries:
                job.home.close()
                with suppress(OSError):
                    remove_folder(own)
            raise
        job.home.close()
        # A rank that is through waits until all are. Who is killed from here on leaves folders of
        # which some may be gone: what is left begins again.
        with ranks.failing_together():
            pass
        with ranks.failing_together():
            job.finish()
        try:
            with ranks.failing_together():
                remove_folder(own)
        finally:
            # It is empty only now; where a rank was killed, unless that rank has left its own.
            _remove_empty(place, levels)


def holds_job(where: str | Path) -> bool:
    """Whether a folder holds an unfinished job; it may be another one."""
    return any(real_place(where, "resume").glob(f"rank-*/{JOB}"))


def discard(where: str | Path) -> None:
    """Remove the job of a single process from a folder: it ends otherwise."""
    place = real_place(where, "resume")
    own = rank_folder(place, 0)
    if (own / JOB).is_file():
        with held(own, "resume"):
            levels = read_job(own, "remove its folder to start again")["folders_made"]
            remove_folder(own)
        _remove_empty(place, levels)


def _require_ours(place: Path, where: str | Path) -> None:
    """ValueError unless a folder holds nothing but ranks of a job."""
    if place.exists() and not place.is_dir():
        raise ValueError(f"resume must be a folder, got the file {str(where)!r}; choose another")
    if not place.exists():
        return
    for entry in place.iterdir():
        if is_temporary(entry.name) and entry.name.startswith(".rank-"):
            continue
        if not _is_rank(entry):
            raise ValueError(
                "resume must be a new or empty folder, or hold an unfinished score(), got "
                f"{str(where)!r} with {entry.name!r} in it; choose another"
            )


def _is_rank(folder: Path) -> bool:
    if rank_of(folder.name) is None or not folder.is_dir() or folder.is_symlink():
        return False
    names = [entry.name for entry in folder.iterdir()]
    leftover = [name for name in names if is_temporary(name, JOB)]
    return JOB in names or names == leftover


def _remove_left_by_others(place: Path, size: int) -> None:
    """Remove what ranks that there are no more of left when they were killed before they began.

    Else it would be there when the job is through, where its results are to come.
    """
    if not place.exists():
        return
    for entry in list(place.iterdir()):
        left = is_temporary(entry.name)
        number = rank_of(entry.name[1:].partition(".")[0] if left else entry.name)
        if number is None or number < size:
            continue
        if left:
            sweep(rank_folder(place, number))
        elif not os.path.lexists(entry / JOB):
            # In use: of a job that has just begun.
            with suppress(OSError, ValueError), held(entry, "resume"):
                remove_folder(entry)


def _claimed(
    own: Path, where: str | Path, parts: Mapping[str, str], made: int, ranks: Ranks
) -> tuple[str, int]:
    """The job's number, and how many folders were made for it; a new one where there is none."""
    if not os.path.lexists(own / JOB):
        number = secrets.token_hex(8)
        content = {
            "number": number,
            "parts": dict(parts),
            "circumstances": circumstances(),
            "folders_made": made,
            "place": ranks.team.index(ranks.rank),
            "team": len(ranks.team),
        }
        write_job(own, content)
        return number, made
    found = read_job(own)
    require_same_parts(where, found, parts)
    for entry in own.iterdir():
        if not (is_state_file(entry.name) or entry.name in (JOB, PROGRESS)):
            if not any(is_temporary(entry.name, name) for name in (JOB, PROGRESS)):
                raise ValueError(
                    f"resume must hold an unfinished score() and nothing else, got {str(own)!r} "
                    f"with {entry.name!r} in it; move it away"
                )
            entry.unlink()
    moved = [
        name for name, value in circumstances().items() if found["circumstances"].get(name) != value
    ]
    if moved:
        logger.warning(
            "%r was begun with another number of threads or on another processor (%s): figures may "
            "differ in rounding from those of a job that was not interrupted",
            str(where),
            ", ".join(moved),
        )
    return found["number"], found["folders_made"]


def _remove_empty_rank(own: Path, levels: int) -> None:
    """Of a job that did not begin, or is through: nothing stays."""
    if (own / JOB).exists():
        return
    # Refused where another process has just made it its own.
    with suppress(OSError, ValueError), held(own, "resume"):
        own.rmdir()
    _remove_empty(own.parent, levels)


def _remove_empty(place: Path, levels: int) -> None:
    """Remove as many folders as were made, from `place` on up, while they are empty."""
    for folder in (place, *place.parents)[:levels]:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def _ending_at_sigterm() -> Iterator[None]:
    """Inside, SIGTERM ends the process in order, with exit code 143, unless somebody handles it."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return
    with undone(lambda: _put_back(signal.SIG_DFL)):
        signal.signal(signal.SIGTERM, _end)
        yield


def _put_back(handler: Any) -> None:
    if signal.getsignal(signal.SIGTERM) is _end:
        signal.signal(signal.SIGTERM, handler)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    logger.warning("terminated; what is finished is kept, call again with the same arguments")
    raise SystemExit(128 + number)
