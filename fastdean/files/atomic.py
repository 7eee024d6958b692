"""Files that appear whole or not at all.

Writing goes to a temporary sibling, is flushed, and only then renamed. A full disk, an interrupt or
a crash therefore leaves the old state or the new one, never a mixture.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


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


_LONGEST_NAME_BYTES = 255
# What file systems answer that cannot flush a folder (SMB, some in user space).
_NO_FOLDER_FLUSH = (errno.EINVAL, errno.EBADF, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP)


def hidden_name(name: str, suffix: str) -> str:
    """`.<name><suffix>`, with a digest for a name that would make it too long."""
    hidden = f".{name}{suffix}"
    if len(os.fsencode(hidden)) > _LONGEST_NAME_BYTES:
        return f".{hashlib.sha256(os.fsencode(name)).hexdigest()}{suffix}"
    return hidden


def temporary_beside(target: Path) -> Path:
    """A new hidden path, for the next `target` or the last one."""
    return target.with_name(hidden_name(target.name, f".{secrets.token_hex(4)}.tmp"))


def is_temporary(name: str, of: str | None = None) -> bool:
    """Whether `temporary_beside` gives such a name, for a target called `of` or for any."""
    stem = r"\..+" if of is None else re.escape(hidden_name(of, ".12345678.tmp")[:-13])
    return re.fullmatch(stem + r"\.[0-9a-f]{8}\.tmp", name, re.DOTALL) is not None


def write_json_atomic(path: str | os.PathLike, obj: Any) -> None:
    """Write `obj` as indented UTF-8 JSON; NaN and infinities are refused (ValueError)."""
    write_text_atomic(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text_atomic(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 file under a temporary name beside `path`, flush it, and rename it.

    A file that is replaced keeps its mode.
    """
    target = Path(path)
    temporary = temporary_beside(target)
    try:
        # A path that is not UTF-8 holds lone surrogates. Written like this they are JSON's own
        # escapes, and read back as they were.
        with open(
            temporary, "x", encoding="utf-8", errors="backslashreplace", newline="\n"
        ) as file:
            if target.exists():
                # Before the text is in it: a private file is at no moment readable by others.
                shutil.copymode(target, temporary)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(target.parent)


@contextmanager
def flush_behind() -> Iterator[Callable[[Path | Callable[[], object]], object]]:
    """Yield a `flush` that does not wait: while the disk takes one file in, the next is written.

    A function may be handed over instead of a file; it is called once all before it is done. When
    the block ends well, everything handed over is on the disk, or done. On any exception what has
    not begun is dropped, and no file is open any more.

    Raises:
        OSError: the first that a flush raised, at the end of the block; or what a function raised.
    """
    # One thread: a second flush at the same time only takes turns at the disk with the first.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="flush") as background:
        begun = []
        try:
            yield lambda path: begun.append(
                background.submit(path) if callable(path) else background.submit(flush, path)
            )
            for flushed in begun:
                flushed.result()
        except BaseException:
            background.shutdown(wait=False, cancel_futures=True)
            raise


def flush(path: Path) -> None:
    """Ask the system to put a file, or the entries of a folder, on the disk.

    Some file systems cannot do the second: there nothing happens.
    """
    folder = path.is_dir()
    if folder and os.name != "posix":
        return
    try:
        handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if not folder or error.errno not in _NO_FOLDER_FLUSH:
            raise
