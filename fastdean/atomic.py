"""Files and folders that appear whole or not at all.

Writing goes to a temporary sibling, is flushed, and only then renamed. A full disk, an interrupt or
a crash therefore leaves the old state or the new one, never a mixture.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def new_folder(
    path: str | os.PathLike,
    *,
    overwrite: bool = False,
    may_replace: Callable[[Path], bool] = lambda folder: False,
    name: str = "path",
) -> Iterator[Path]:
    """A temporary sibling of `path` to fill; it becomes `path` when the block ends well.

    `may_replace(folder)` says whether an existing non-empty folder is one that `overwrite=True` may
    delete. `name` is the caller's argument, for the error text. Missing parents of `path` are made.
    On any exception, KeyboardInterrupt included, the temporary folder and the parents made here are
    removed, and `path` is as it was.

    Raises:
        ValueError: `path` is a file, or a folder in use that may not be replaced.
    """
    target = real_place(path, name)
    check_free(target, overwrite=overwrite, may_replace=may_replace, name=name)
    absent = [parent for parent in target.parents if not parent.exists()]
    temporary = _sibling(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            flush(file)
        flush(temporary)
        publish(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        _remove_empty(absent)
        raise


def real_place(path: str | os.PathLike, name: str) -> Path:
    """The absolute path, symbolic links followed; ValueError where they lead in a circle."""
    try:
        target = Path(path).expanduser().resolve()
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            target.stat()
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"{name} must be a path that can be followed, got {str(path)!r}: {error}; choose "
            "another"
        ) from None
    return target


def check_free(
    target: Path,
    *,
    overwrite: bool,
    may_replace: Callable[[Path], bool],
    name: str = "path",
) -> None:
    """Raise ValueError unless a new folder may come to stand at `target`."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{name} must be a new or empty folder, got the file {str(target)!r}")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ValueError(
            f"{name} must be a new or empty folder, got {str(target)!r}, which has files in it; "
            "choose another or pass overwrite=True (--overwrite)"
        )
    if not may_replace(target):
        raise ValueError(
            f"{name} must be a folder that FastDEAN wrote and that holds nothing else, for "
            f"overwrite=True (--overwrite) to replace it, got {str(target)!r}; choose another"
        )


def write_json_atomic(path: str | os.PathLike, obj: Any) -> None:
    """Write `obj` as indented UTF-8 JSON; NaN and infinities are refused (ValueError)."""
    write_text_atomic(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text_atomic(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 file under a temporary name beside `path`, flush it, and rename it."""
    target = Path(path)
    temporary = _sibling(target)
    try:
        with open(temporary, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, innermost first, but none that somebody else has put something into."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _sibling(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


def publish(temporary: Path, target: Path) -> None:
    """Rename a finished folder to `target`; what stood there comes back if that fails."""
    if not target.exists():
        os.rename(temporary, target)
    else:
        aside = _sibling(target)
        os.rename(target, aside)
        try:
            os.rename(temporary, target)
        except BaseException:
            os.rename(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    flush(target.parent)


@contextmanager
def flush_behind() -> Iterator[Callable[[Path], object]]:
    """Yield a `flush` that does not wait: while the disk takes one file in, the next is written.

    When the block ends well, everything handed over is on the disk. On any exception what has not
    begun is dropped, and no file is open any more.

    Raises:
        OSError: the first that a flush raised, at the end of the block.
    """
    # One thread: a second flush at the same time only takes turns at the disk with the first.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="flush") as background:
        begun = []
        try:
            yield lambda path: begun.append(background.submit(flush, path))
            for flushed in begun:
                flushed.result()
        except BaseException:
            background.shutdown(wait=False, cancel_futures=True)
            raise


def flush(path: Path) -> None:
    """Ask the system to put a file, or the entries of a folder, on the disk."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
