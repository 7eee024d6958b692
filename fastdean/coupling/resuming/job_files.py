"""What the folder of a rank says of its part of a job: which job it is, and how far it is.

job.json         what makes two jobs the same, and the job's number
progress.json    the commit record: steps that are done, which bytes of which files
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fastdean.coupling.resuming.kept_files import STANDING, damaged, is_state_file
from fastdean.coupling.resuming.state_files import not_written
from fastdean.files.declared import (
    Exactly,
    Kind,
    Lists,
    Maps,
    Maybe,
    Record,
    Text,
    Whole,
    read_json,
)
from fastdean.files.storage import write_json_atomic

JOB, PROGRESS = "job.json", "progress.json"
# 1: the first. 2: what embeddings return is kept as that of further layers, and the bytes of
# weights that were read. 3: with the tokens that experts were given. 4: with the rank's place among
# those that hold a model together.
FORMAT = 4
# Of a job that has done nothing yet.
START: dict[str, Any] = {"step": 0, "batches": 0, "files": {}}
_KIND = "scoring layer by layer"
_JOB_FILE = Record(
    {
        "kind": Exactly(_KIND),
        "format": Whole(least=1),
        "number": Text(longest=100),
        "parts": Maps(Text()),
        "circumstances": Maps(Text()),
        "folders_made": Whole(),
    },
    optional={"place": Whole(), "team": Whole(least=1)},
)
_COMMIT = Record({"step": Whole(), "batches": Whole(), "files": STANDING})
_PROGRESS_FILE: Kind = Record(
    {
        "number": Text(longest=100),
        "commit": _COMMIT,
        "before": Maybe(_COMMIT),
        "weights": Maps(Text(longest=64)),
        "used": Maps(Lists(Whole())),
        "most_bytes": Whole(),
        "bytes_read": Whole(),
        "sha256": Text(longest=64),
    }
)


def rank_folder(place: Path, rank: int) -> Path:
    """The folder of a rank in that of its job."""
    return place / f"rank-{rank}"


def rank_of(name: str) -> int | None:
    """Whose folder has this name; None: no rank's."""
    number = name.removeprefix("rank-")
    is_number = number.isascii() and number.isdecimal() and str(int(number)) == number
    return int(number) if is_number and name != number else None


def read_job(folder: Path, advice: str | None = None) -> dict[str, Any]:
    """Raises: ValueError: the file is damaged."""
    advice = advice or f"remove {str(folder)!r} to start again"
    return read_json(folder / JOB, _JOB_FILE, advice=advice)


def write_job(folder: Path, content: Mapping[str, Any]) -> None:
    """Raises: OSError: it cannot be written."""
    _write(folder / JOB, {"kind": _KIND, "format": FORMAT, **content})


def require_same_parts(
    where: str | Path,
    found: Mapping[str, Any],
    parts: Mapping[str, str],
    besides: Collection[str] = (),
) -> None:
    """ValueError that names what differs between a job in a folder and the one that is asked for.

    Args:
        besides: names of parts that may differ.
    """
    kept = {"format of the states": str(found["format"]), **found["parts"]}
    now = {"format of the states": str(FORMAT), **parts}
    names = [name for name in {**now, **kept} if now.get(name) != kept.get(name)]
    names = [name for name in names if name not in besides]
    # Which follow from others.
    names = [name for name in names if name not in ("batches", "targets")] or names
    if names:
        raise ValueError(
            f"resume must be a folder of this job, got {str(where)!r} with one that differs in "
            f"{', '.join(sorted(names))}; choose another folder, or call with the same model, data "
            "and options"
        )


def read_progress(folder: Path, number: str) -> dict[str, Any] | None:
    """None where there is no such file.

    Args:
        number: of the job.
    Raises:
        ValueError: it is damaged, or another job's, or lost.
    """
    file = folder / PROGRESS
    if not file.exists():
        # It is written before them.
        if any(is_state_file(entry.name) for entry in folder.iterdir()):
            raise damaged(file, "no such file")
        return None
    found = read_json(file, _PROGRESS_FILE, advice=f"remove {str(folder)!r} to start again")
    content = {name: part for name, part in found.items() if name != "sha256"}
    if found["number"] != number or found["sha256"] != _digest(content):
        raise damaged(file, "other content")
    return content


def write_progress(folder: Path, content: Mapping[str, Any]) -> None:
    """Raises: OSError: it cannot be written."""
    _write(folder / PROGRESS, {**content, "sha256": _digest(content)})


def _write(file: Path, content: Mapping[str, Any]) -> None:
    try:
        write_json_atomic(file, content)
    except OSError as error:
        raise not_written(file.parent, error) from error


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
