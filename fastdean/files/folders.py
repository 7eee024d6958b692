"""Folders that appear whole or not at all, and replace only what FastDEAN wrote.

A folder is filled under a temporary name beside its place. It then comes there by one rename, or by
an exchange with the folder that stands there. A kill leaves the old state or the new one. Where the
file system cannot exchange, it is two renames: the old folder waits as `.<name>.before`, and the
next call for the path puts it back. A temporary folder is locked while its process lives and closed
to everybody else; the next call for the path removes those of killed processes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fastdean.files.atomic import flush, hidden_name, is_temporary, real_place, temporary_beside

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
# EPERM: a container that does not know the system call.
_NOT_SUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY, errno.EPERM)
_MOUNTS = Path("/proc/self/mountinfo")
_TRIES, _PAUSE_SECONDS = 200, 0.02
_FILLED = (errno.ENOTEMPTY, errno.EEXIST)


@dataclass(frozen=True)
class _Target:
    """The path of a new folder; `name` is that of the caller's argument, for errors."""

    path: Path
    overwrite: bool
    may_replace: Callable[[Path], bool]
    name: str

    def require_replaceable(self, found: Path) -> None:
        """Raise ValueError unless `found`, the folder at the path, may be deleted."""
        if not any(found.iterdir()):
            return
        if not self.overwrite:
            raise ValueError(
                f"{self.name} must be a new or empty folder, got {str(self.path)!r}, which has "
                "files in it; choose another or pass overwrite=True (--overwrite)"
            )
        if not self.may_replace(found):
            raise ValueError(
                f"{self.name} must be a folder that FastDEAN wrote and that holds nothing else, "
                f"for overwrite=True (--overwrite) to replace it, got {str(self.path)!r}; choose "
                "another"
            )


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
    that the umask gives, unless `keep_modes`. A folder that stood at `path` gives the new one its
    mode and group, and its owner where the system allows that.

    An empty folder that cannot be renamed onto (a mount point, a parent without write permission),
    or that the process stands in, is filled from a temporary folder inside it, entry by entry:
    there, and only there, a kill in the last moment leaves a part, without the files named
    fastdean_*.json.

    Raises:
        ValueError: `path` is a file, or a folder in use that may not be replaced, also one that
            another process filled meanwhile.
    """
    place = real_place(path, name)
    target = _Target(place, overwrite, may_replace, name)
    check_free(place, overwrite=overwrite, may_replace=may_replace, name=name)
    absent = [parent for parent in place.parents if not parent.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        for parent in absent:
            flush(parent.parent)
        with _workplace(target) as temporary:
            yield temporary
            _open_to_others(temporary, place, keep_modes)
            for written in (*temporary.rglob("*"), temporary):
                flush(written)
            _publish(temporary, target)
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
    """Raise ValueError unless a new folder may be put at `target`."""
    put_back(target, name)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{name} must be a new or empty folder, got the file {str(target)!r}")
    if not target.exists() or is_empty(target):
        return
    _Target(target, overwrite, may_replace, name).require_replaceable(target)
    if _filled_inside(target):
        raise ValueError(
            f"{name} must be a folder that can be replaced as a whole, got {str(target)!r}, "
            "which is the current folder, a mount point, or in a folder that cannot be written to; "
            "choose another"
        )


def is_empty(folder: Path) -> bool:
    """Whether `folder` holds nothing but what processes that fill it from inside have there."""
    return all(is_temporary(entry.name, folder.name) for entry in folder.iterdir())


def put_back(path: Path, name: str = "path") -> None:
    """Where a replacement was cut off between its two renames, put the old folder back.

    Raises:
        ValueError: a living process is between the two.
    """
    target = real_place(path, name)
    for _ in range(_TRIES):
        if target.exists() or not _before(target).is_dir():
            return
        handle = _locked(_before(target), even_without_locks=True)
        if handle is not None:
            try:
                with suppress(FileNotFoundError):
                    os.rename(_before(target), target)
            finally:
                os.close(handle)
            return
        time.sleep(_PAUSE_SECONDS)
    raise _in_use_error(target, name)


def _in_use_error(target: Path, name: str) -> ValueError:
    return ValueError(
        f"{name} must not be in use, got {str(target)!r}, which another process is replacing; "
        "try again"
    )


@contextmanager
def standing(folder: Path) -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether `folder` is still the same folder.

    It is held open meanwhile, so that no later folder gets its number.
    """
    try:
        handle = os.open(folder, getattr(os, "O_PATH", os.O_RDONLY))
    except OSError:
        yield lambda: not folder.exists() and not _before(real_place(folder, "path")).exists()
        return
    try:
        yield lambda: _is_held(folder, handle)
    finally:
        os.close(handle)


@contextmanager
def held(folder: Path, name: str) -> Iterator[None]:
    """Inside, `folder` is this process's own: another one that asks for it is refused.

    Where the file system has no locks nobody is. The folder may be removed inside.

    Args:
        name: of the caller's argument, for the error text.
    Raises:
        ValueError: another process holds it.
    """
    handle = None
    try:
        handle = _locked(folder, even_without_locks=True)
        if handle is None:
            raise ValueError(
                f"{name} must not be in use, got {str(folder)!r}, with which another process is at "
                "work; wait for it, or choose another folder"
            )
        yield
    finally:
        if handle is not None:
            os.close(handle)


def remove_folder(folder: Path) -> None:
    """Delete a folder and what is in it; a kill leaves all of it, or a temporary folder."""
    temporary = temporary_beside(folder)
    os.rename(folder, temporary)
    shutil.rmtree(temporary)


def sweep(target: Path, *, inside: bool = False) -> None:
    """Remove what killed processes left beside `target`, or in it, of writing or removing it."""
    with suppress(OSError):
        for entry in list((target if inside else target.parent).iterdir()):
            if is_temporary(entry.name, target.name) and entry.is_dir() and not entry.is_symlink():
                handle = _locked(entry)
                if handle is not None:
                    _discard(entry)
                    os.close(handle)


def _sweep_before(target: _Target) -> None:
    """Remove the old folder where a kill came after the second rename of a replacement."""
    before = _before(target.path)
    if not target.path.exists() or not before.is_dir() or before.is_symlink():
        return
    handle = _locked(before)
    if handle is not None:
        try:
            if target.may_replace(before):
                _discard_before(target.path)
        finally:
            os.close(handle)


def _discard(folder: Path) -> None:
    """Delete as much as there are permissions for; what remains does no harm."""
    with suppress(OSError):
        folder.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _workplace(target: _Target) -> Iterator[Path]:
    """A new temporary folder, locked, and gone at the end if it was not renamed away."""
    place = target.path
    inside = _filled_inside(place)
    sweep(place, inside=inside)
    _sweep_before(target)
    handle = None
    while handle is None:
        temporary = temporary_beside(place)
        if inside:
            temporary = place / temporary.name
        try:
            temporary.mkdir()
            # None: another process has just removed it as litter.
            handle = _locked(temporary, even_without_locks=True)
            if handle is not None:
                _close_to_others(temporary, place)
                yield temporary
        finally:
            if handle is not None:
                # Not what an exchange put there: `_replace` has judged that.
                if _is_held(temporary, handle):
                    _discard(temporary)
                os.close(handle)


def _close_to_others(temporary: Path, place: Path) -> None:
    """Let nobody else read in a folder while it is filled, nor what a kill leaves of it.

    What is copied may be private, and has its own mode only at the end. Group and setgid bit come
    first, since what is made in the folder inherits them.
    """
    mode = stat.S_IMODE(temporary.stat().st_mode)
    if place.is_dir():
        found = place.stat()
        mode = stat.S_IMODE(found.st_mode)
        # The owner too where root writes for somebody.
        for owner in (found.st_uid, -1):
            with suppress(OSError):
                os.chown(temporary, owner, found.st_gid)
                break
    temporary.chmod(mode & ~0o077 | 0o700)


def _open_to_others(temporary: Path, place: Path, keep_modes: bool) -> None:
    """Give a filled folder the mode of the one it replaces, or of any new one.

    Its files for their owner alone get the mode of any new file, unless `keep_modes`: safetensors
    makes them so whatever the umask, and others could not read them in a shared folder.
    """
    probe = temporary / f".{secrets.token_hex(4)}"
    probe.mkdir()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.rmdir()
    for file in temporary.rglob("*"):
        found = file.lstat().st_mode
        if not keep_modes and stat.S_ISREG(found) and stat.S_IMODE(found) == 0o600:
            file.chmod(mode & 0o666)
    temporary.chmod(stat.S_IMODE(place.stat().st_mode) if place.is_dir() else mode)


def _filled_inside(target: Path) -> bool:
    """Whether `target` is a folder that nothing may be renamed onto."""
    return target.is_dir() and (
        _is_mount(target) or _is_current(target) or not os.access(target.parent, os.W_OK | os.X_OK)
    )


def _is_current(folder: Path) -> bool:
    """Whether `folder` is the current one, or around it: the shell would stay in the old folder."""
    try:
        here = Path.cwd()
    except OSError:
        return False
    return here == folder or folder in here.parents


def _is_mount(folder: Path) -> bool:
    if os.path.ismount(folder):
        return True
    # Which overlooks a folder bound to another one of the same disk.
    try:
        places = [line.split()[4] for line in _MOUNTS.read_bytes().splitlines()]
    except OSError:
        return False
    # A space is written \040 there, and so on.
    return os.fsencode(folder) in (
        place.decode("unicode_escape").encode("latin-1") for place in places
    )


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
        held = _is_held(folder, handle)
    except BlockingIOError:
        held = False
    except OSError:
        held = even_without_locks and _is_held(folder, handle)
    if held:
        return handle
    os.close(handle)
    return None


def _is_held(folder: Path, handle: int) -> bool:
    """Whether `handle` is that of the folder now at this path."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(folder))
    except FileNotFoundError:
        return False


def _publish(temporary: Path, target: _Target) -> None:
    """Put a finished folder in its place; a folder there is deleted only if it may be."""
    if temporary.parent == target.path:
        _move_inside(temporary, target)
        return
    for _ in range(_TRIES):
        try:
            # Atomic, and refused where the target has files in it.
            os.rename(temporary, target.path)
            break
        except OSError as error:
            if error.errno not in _FILLED:
                raise
        try:
            target.require_replaceable(target.path)
            if _replace(temporary, target):
                break
        except FileNotFoundError:
            # Somebody else has moved the target away meanwhile.
            if target.path.exists():
                raise
        time.sleep(_PAUSE_SECONDS)
    else:
        raise _in_use_error(target.path, target.name)
    flush(target.path.parent)


def _replace(temporary: Path, target: _Target) -> bool:
    """Put `temporary` in the place of a folder and remove that; False: another process was quicker.

    The old folder is judged again once nobody finds it by its path any more: nothing comes into it
    afterwards.
    """
    # Held, or the old folder would be litter to others while it is judged.
    handle = _locked(target.path, even_without_locks=True)
    if handle is None:
        return False
    try:
        if not _exchange(temporary, target.path):
            return _replace_in_two_steps(temporary, target)
        try:
            target.require_replaceable(temporary)
        except BaseException:
            _exchange(temporary, target.path)
            raise
        _discard(temporary)
        return True
    finally:
        os.close(handle)


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
    """Where the old folder waits between the two renames of a replacement."""
    return target.with_name(hidden_name(target.name, ".before"))


def _discard_before(target: Path) -> None:
    # Under a name that is swept: `put_back` must never find a half of it.
    litter = temporary_beside(target)
    with suppress(OSError):
        os.rename(_before(target), litter)
        _discard(litter)


def _replace_in_two_steps(temporary: Path, target: _Target) -> bool:
    """Rename the target away and `temporary` in; `put_back` undoes the first step after a kill."""
    place, before = target.path, _before(target.path)
    try:
        os.rename(place, before)
    except OSError as error:
        if error.errno not in _FILLED:
            raise
        raise ValueError(
            f"{target.name} must have no earlier folder waiting beside it, got {str(before)!r}, "
            "left by a replacement that was cut off; move it away"
        ) from None
    try:
        target.require_replaceable(before)
        os.rename(temporary, place)
    except BaseException as error:
        try:
            os.rename(before, place)
        except FileNotFoundError:
            # On a file system without locks a reader has put it back.
            pass
        except OSError as taken:
            if taken.errno not in _FILLED:
                raise
            # Another process has put its own folder there, which replaces the old one.
            target.require_replaceable(before)
            _discard_before(place)
        if isinstance(error, OSError) and error.errno in _FILLED:
            return False
        raise
    _discard_before(place)
    return True


def _move_inside(temporary: Path, target: _Target) -> None:
    """Move the entries of a folder that was filled inside its place, if nothing else is there."""
    place = target.path
    in_use = ValueError(
        f"{target.name} must be a new or empty folder, got {str(place)!r}, which has files in it; "
        "choose another"
    )
    # Two that fill one folder do not mix.
    handle = _locked(place, even_without_locks=True)
    if handle is None:
        raise in_use
    # Our own manifests last: a folder without its manifest is refused.
    entries = sorted(temporary.iterdir(), key=lambda e: (e.name.startswith("fastdean_"), e.name))
    try:
        if not is_empty(place):
            raise in_use
        for entry in entries:
            if os.path.lexists(place / entry.name):
                raise in_use
            os.rename(entry, place / entry.name)
        flush(place)
    except BaseException:
        for entry in entries:
            if not os.path.lexists(entry):
                os.rename(place / entry.name, entry)
        raise
    finally:
        os.close(handle)
