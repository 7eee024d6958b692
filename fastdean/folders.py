"""Folders that appear whole or not at all, and replace only what FastDEAN wrote.

A folder is filled under a temporary name and then takes its place in one step of the file system:
a rename onto a path that is free, or an exchange with the folder that stands there. A kill at any
moment leaves the old state or the new one. The temporary folder is locked while its process lives;
one that nobody holds any more is swept away by the next call for the same path.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastdean.atomic import flush, real_place

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_NOT_SUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY)
_FILLED = (errno.ENOTEMPTY, errno.EEXIST)


@contextmanager
def new_folder(
    path: str | os.PathLike,
    *,
    overwrite: bool = False,
    may_replace: Callable[[Path], bool] = lambda folder: False,
    name: str = "path",
    keep_modes: bool = False,
) -> Iterator[Path]:
    """A temporary folder to fill; it becomes `path` when the block ends well.

    `may_replace(folder)` says whether an existing non-empty folder is one that `overwrite=True` may
    delete. `name` is the caller's argument, for the error text. Missing parents of `path` are made.
    On any exception, KeyboardInterrupt included, the temporary folder and the parents made here are
    removed, and `path` is as it was. Files that a library made for their owner alone get the mode
    that the umask gives, unless `keep_modes`.

    An empty folder that cannot be renamed onto (a mount point, a parent without write permission)
    is filled from a temporary folder inside it, entry by entry: there, and only there, a kill in
    the last moment leaves a part, without the files named fastdean_*.json.

    Raises:
        ValueError: `path` is a file, or a folder in use that may not be replaced, also one that
            another process filled meanwhile.
    """
    target = real_place(path, name)
    check_free(target, overwrite=overwrite, may_replace=may_replace, name=name)
    absent = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _workplace(target) as temporary:
            yield temporary
            if not keep_modes:
                _apply_umask(temporary)
            for file in temporary.rglob("*"):
                flush(file)
            flush(temporary)
            _publish(temporary, target, overwrite, may_replace, name)
    except BaseException:
        for parent in absent:
            # Innermost first, but none that somebody else has put something into.
            with suppress(OSError):
                parent.rmdir()
        raise


def check_free(
    target: Path,
    *,
    overwrite: bool,
    may_replace: Callable[[Path], bool],
    name: str = "path",
) -> None:
    """Raise ValueError unless a new folder may come to stand at `target`."""
    put_back(target)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{name} must be a new or empty folder, got the file {str(target)!r}")
    if not target.exists() or _is_empty(target):
        return
    _require_replaceable(target, target, overwrite, may_replace, name)
    if _filled_inside(target):
        raise ValueError(
            f"{name} must be a folder that can be replaced as a whole, got {str(target)!r}, a "
            "mount point or in a folder that cannot be written to; choose another"
        )


def put_back(target: Path) -> None:
    """Where a replacement was cut off between its two steps, the old folder takes its place again.

    Raises:
        ValueError: a living process is between the two steps.
    """
    before = _before(target)
    if target.exists() or not before.is_dir():
        return
    handle = _locked(before)
    if handle is None:
        raise ValueError(
            f"path must not be in use, got {str(target)!r}, which another process is replacing; "
            "try again"
        )
    try:
        with suppress(FileNotFoundError):
            os.rename(before, target)
    finally:
        os.close(handle)


def _require_replaceable(
    target: Path,
    found: Path,
    overwrite: bool,
    may_replace: Callable[[Path], bool],
    name: str,
) -> None:
    """`found` is what stands, or stood, at `target`."""
    if not overwrite:
        raise ValueError(
            f"{name} must be a new or empty folder, got {str(target)!r}, which has files in it; "
            "choose another or pass overwrite=True (--overwrite)"
        )
    if not may_replace(found):
        raise ValueError(
            f"{name} must be a folder that FastDEAN wrote and that holds nothing else, for "
            f"overwrite=True (--overwrite) to replace it, got {str(target)!r}; choose another"
        )


@contextmanager
def _workplace(target: Path) -> Iterator[Path]:
    """A new temporary folder, locked, and gone at the end if it was not renamed away."""
    inside = _filled_inside(target)
    _sweep(target, inside)
    handle = None
    while handle is None:
        temporary = _temporary(target, inside)
        try:
            temporary.mkdir()
            # None: between the two another process has taken it for litter.
            handle = _locked(temporary, even_without_locks=True)
            if handle is not None:
                yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if handle is not None:
                os.close(handle)


def _filled_inside(target: Path) -> bool:
    """Whether `target` is a folder that nothing can be renamed onto."""
    return target.is_dir() and (
        os.path.ismount(target) or not os.access(target.parent, os.W_OK | os.X_OK)
    )


def _temporary(target: Path, inside: bool) -> Path:
    name = f".{target.name}.{secrets.token_hex(4)}.tmp"
    return target / name if inside else target.with_name(name)


def _sweep(target: Path, inside: bool) -> None:
    """Remove what killed processes left of this target."""
    pattern = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{8}\.tmp")
    with suppress(OSError):
        for entry in list((target if inside else target.parent).iterdir()):
            if pattern.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
                handle = _locked(entry)
                if handle is not None:
                    shutil.rmtree(entry, ignore_errors=True)
                    os.close(handle)


def _is_empty(folder: Path) -> bool:
    """Whether nothing lies in `folder` but what processes that fill it from inside hold there."""
    temporary = re.compile(re.escape(f".{folder.name}.") + r"[0-9a-f]{8}\.tmp")
    return all(temporary.fullmatch(entry.name) for entry in folder.iterdir())


def _locked(folder: Path, *, even_without_locks: bool = False) -> int | None:
    """A handle that holds `folder` for this process, None where another one holds it or it is gone.

    The system lets go of it when the process ends, however it ends. Where the file system has no
    locks, None too, or a handle that holds nothing.
    """
    import fcntl

    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = os.path.samestat(os.fstat(handle), os.stat(folder))
    except (BlockingIOError, FileNotFoundError):
        held = False
    except OSError:
        held = even_without_locks
    if held:
        return handle
    os.close(handle)
    return None


def _publish(
    temporary: Path,
    target: Path,
    overwrite: bool,
    may_replace: Callable[[Path], bool],
    name: str,
) -> None:
    """Put a finished folder in its place; what stands there goes only where it may."""
    if temporary.parent == target:
        _move_inside(temporary, target, name)
        return
    if target.is_dir():
        # A private folder stays private.
        shutil.copymode(target, temporary)
    while True:
        try:
            # Atomic, and refused where the target has files in it.
            os.rename(temporary, target)
            break
        except OSError as error:
            if error.errno not in _FILLED:
                raise
        _require_replaceable(target, target, overwrite, may_replace, name)
        if _exchange(temporary, target):
            # What stood there at that very moment, and nobody finds by its path any more.
            try:
                if any(temporary.iterdir()):
                    _require_replaceable(target, temporary, overwrite, may_replace, name)
            except BaseException:
                _exchange(temporary, target)
                raise
            break
        if _replace_in_two_steps(temporary, target):
            break
    flush(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step; False where kernel or file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    code = rename(
        _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)
    )
    if code == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_SUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(other))


def _before(target: Path) -> Path:
    """Where the old folder waits between the two steps of a replacement."""
    return target.with_name(f".{target.name}.before")


def _replace_in_two_steps(temporary: Path, target: Path) -> bool:
    """Rename `target` away and `temporary` in; `put_back` undoes the first step after a kill.

    Returns False where another process was quicker.
    """
    handle = _locked(target)
    if handle is None:
        return False
    before = _before(target)
    try:
        os.rename(target, before)
        try:
            os.rename(temporary, target)
        except BaseException:
            os.rename(before, target)
            raise
        shutil.rmtree(before, ignore_errors=True)
    finally:
        os.close(handle)
    return True


def _move_inside(temporary: Path, target: Path, name: str) -> None:
    if not _is_empty(target):
        raise ValueError(
            f"{name} must be a new or empty folder, got {str(target)!r}, which has files in it; "
            "choose another"
        )
    moved: list[Path] = []
    # Our own manifests last: without its manifest a folder is not taken for a whole one.
    for entry in sorted(
        temporary.iterdir(), key=lambda e: (e.name.startswith("fastdean_"), e.name)
    ):
        place = target / entry.name
        try:
            os.rename(entry, place)
        except BaseException:
            for part in moved:
                shutil.rmtree(part) if part.is_dir() else part.unlink()
            raise
        moved.append(place)
    flush(target)


def _apply_umask(folder: Path) -> None:
    """Files for their owner alone get the mode of any other new file.

    safetensors makes them so whatever the umask; shared folders would hold files that nobody else
    can read.
    """
    probe = folder / f".{secrets.token_hex(4)}"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink() and stat.S_IMODE(file.stat().st_mode) == 0o600:
            file.chmod(mode)
