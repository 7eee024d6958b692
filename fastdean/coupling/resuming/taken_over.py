"""What a job on another number of ranks has finished, taken over by the ranks that there are now.

What layers returned belongs to the batches of the ranks that kept it, and goes. The entry of a
matrix is made of the examples of all ranks, and as good for any others: so the layers are run again
from the first one, with the examples dealt to the ranks that there are, and what is finished is not
scored again.

Each rank writes a folder beside the old ones, which then take their places one after the other. A
kill at any moment leaves one that holds the entries.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastdean.coupling.resuming.job_files import (
    JOB,
    START,
    rank_folder,
    rank_of,
    read_job,
    read_progress,
    require_same_parts,
    write_job,
    write_progress,
)
from fastdean.coupling.resuming.job_parts import OF_RANKS, circumstances
from fastdean.coupling.resuming.kept_files import KeptFiles
from fastdean.files.atomic import temporary_beside
from fastdean.files.storage import held, remove_folder, sweep
from fastdean.models.ranks.distributed import Ranks
from fastdean.wording.log import logger
from fastdean.wording.mendable import StateError

_NUMBER = "number of ranks"
# More than there are ranks.
_NONE = 1 << 30


def take_over(
    place: Path,
    where: str | Path,
    parts: Mapping[str, str],
    ranks: Ranks,
    worth: Mapping[tuple[int, str], torch.device],
) -> None:
    """Where another number of ranks has left a job in a folder, make it one of these ranks'.

    All ranks call it, before any makes its own folder.

    Args:
        place: the folder; `where`: as it was given.
        parts: what makes two jobs the same (`job_parts`), of this rank.
        worth: number of a data set and key of a target of which a finished entry is taken over ->
            where the target computes on this rank.
    Raises:
        ValueError: it is another job, or another process is at work with it.
        RuntimeError: a rank does not see the folder.
    """
    with ranks.failing_together():
        jobs = _jobs_in(place)
    here = [number for number, job in jobs.items() if _ranks_of(job) != ranks.size]
    # A kill after all have taken their places leaves some of the old ones.
    through = bool(here) and not any(number < ranks.size for number in here)
    through = through and all(number in jobs for number in range(ranks.size))
    needed = ranks.highest(int(bool(here) and not through))
    if not needed and not ranks.highest(int(through)):
        return
    with ExitStack() as stack:
        with ranks.failing_together():
            if ranks.first:
                for number in here:
                    stack.enter_context(held(rank_folder(place, number), "resume"))
        if needed:
            _take_over(place, where, parts, ranks, worth, jobs)
        with ranks.failing_together():
            if ranks.first:
                for number in here:
                    if number >= ranks.size:
                        remove_folder(rank_folder(place, number))


def _take_over(
    place: Path,
    where: str | Path,
    parts: Mapping[str, str],
    ranks: Ranks,
    worth: Mapping[tuple[int, str], torch.device],
    jobs: Mapping[int, Mapping[str, Any]],
) -> None:
    # One that all read, as some ranks may have been a step further than others.
    source = -ranks.highest(-min(jobs, default=_NONE))
    own = rank_folder(place, ranks.rank)
    with ranks.failing_together():
        alike = _alike(place, where, source, jobs, parts, ranks)
        sweep(own)
        new = temporary_beside(own)
        new.mkdir()
    try:
        with held(new, "resume"):
            with ranks.failing_together():
                taken = _write(new, place, (source, alike), jobs, parts, ranks, worth)
            # The last one first: there is an old one while there is no new one.
            for rank in reversed(range(ranks.size)):
                with ranks.failing_together():
                    if rank == ranks.rank:
                        if own.exists():
                            remove_folder(own)
                        os.rename(new, own)
    finally:
        with suppress(OSError):
            remove_folder(new)
    if ranks.first:
        logger.warning(
            "scoring in %r was begun on another number of ranks (%d, now %d): the layers are run "
            "again, and finished matrices are kept (%d)",
            str(place),
            _ranks_of(jobs[source]),
            ranks.size,
            taken,
        )


def _alike(
    place: Path,
    where: str | Path,
    source: int,
    jobs: Mapping[int, Mapping[str, Any]],
    parts: Mapping[str, str],
    ranks: Ranks,
) -> int:
    """The number of a folder whose rank had the weights that this one has."""
    if source not in jobs:
        raise StateError(
            f"resume must be a folder that all ranks see, got {str(where)!r} without "
            f"{rank_folder(place, source).name!r} here; put it on a file system that they share"
        )
    team = jobs[source].get("team", 1)
    if team != len(ranks.team):
        raise ValueError(
            f"resume must be a folder of this job, got {str(where)!r} with one of which {team} "
            f"ranks held a model together, and not {len(ranks.team)}; choose another folder, or "
            "split the model over as many"
        )
    own = ranks.team.index(ranks.rank)
    found = [number for number, job in jobs.items() if job.get("place", 0) == own]
    if not found:
        raise StateError(
            f"resume must hold the part of a rank with this one's weights, got {str(where)!r} with "
            "none; remove it to start again"
        )
    job = jobs[min(found)]
    job = {**job, "parts": _by_kind_of_device(job["parts"])}
    require_same_parts(where, job, _by_kind_of_device(parts), besides=OF_RANKS)
    return min(found)


def _by_kind_of_device(parts: Mapping[str, str]) -> dict[str, str]:
    """Which device, and not which of several alike."""
    return {**parts, "device": re.sub(r":\d+", "", parts.get("device", ""))}


def _write(
    new: Path,
    place: Path,
    sources: tuple[int, int],
    jobs: Mapping[int, Mapping[str, Any]],
    parts: Mapping[str, str],
    ranks: Ranks,
    worth: Mapping[tuple[int, str], torch.device],
) -> int:
    """Write a rank's new folder; how many entries are in it."""
    of_entries, of_weights = (
        _progress(rank_folder(place, number), jobs[number]) for number in sources
    )
    number = secrets.token_hex(8)
    source = jobs[sources[0]]
    old, kept = KeptFiles(rank_folder(place, sources[0]), source["number"]), KeptFiles(new, number)
    try:
        files = of_entries["commit"]["files"]
        old.reopen({name: said for name, said in files.items() if name.startswith("entries-")})
        found = [each for each in old.notes("entries") if each[0][1:] in worth]
        for key, note, tensors in found:
            # A rank has a device of its own; what went to the CPU stays there.
            devices = ["cpu" if t.device == "cpu" else worth[key[1:]] for t in tensors]
            brought = zip(old.bring(key, "cpu").items(), devices, strict=True)
            here = {name: tensor.to(device) for (name, tensor), device in brought}
            kept.keep(key, here, partial(dict, note))
        standing = kept.standing()
    finally:
        old.close()
        kept.close()
    write_job(
        new,
        {
            "number": number,
            "parts": dict(parts),
            "circumstances": circumstances(),
            "folders_made": source["folders_made"],
            "place": ranks.team.index(ranks.rank),
            "team": len(ranks.team),
        },
    )
    content = {
        "number": number,
        "commit": {**START, "files": standing},
        "before": None,
        # Compared with the layers before they are run.
        "weights": of_weights["weights"],
        "used": {},
        "most_bytes": 0,
        "bytes_read": of_weights["bytes_read"],
    }
    write_progress(new, content)
    return len(found)


def _progress(folder: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    found = read_progress(folder, job["number"])
    return found or {"commit": START, "weights": {}, "bytes_read": 0}


def _jobs_in(place: Path) -> dict[int, dict[str, Any]]:
    """By the number of its rank, what each folder says that has a job."""
    folders = {rank_of(file.parent.name): file.parent for file in place.glob(f"rank-*/{JOB}")}
    ranks = sorted(number for number in folders if number is not None)
    return {number: read_job(folders[number]) for number in ranks}


def _ranks_of(job: Mapping[str, Any]) -> int:
    number = job["parts"].get(_NUMBER, "0")
    return int(number) if number.isdigit() else 0
