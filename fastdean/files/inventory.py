"""What a folder of FastDEAN lists of itself: every file it was written with, and its digest.

The manifest of a folder holds `sha256`: name, relative to the folder, -> digest of the file. The
list decides two things: what `overwrite` may delete, which is nothing that is not on it, and
whether what is read is what was written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path


def file_digest(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def listed(folder: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """name -> digest of the files of `folder`: those named, or all there are below it."""
    if names is None:
        found = (file for file in folder.rglob("*") if file.is_file())
        names = (file.relative_to(folder).as_posix() for file in found)
    return {name: file_digest(folder / name) for name in sorted(names)}


def holds_only_listed(folder: Path, manifest_name: str) -> bool:
    """Whether everything below `folder` is its manifest, or a file or folder that it lists.

    By name: a listed file that was edited since counts as ours, and goes with the folder. False for
    a manifest that lists nothing, cannot be read, or was written before there were lists.
    """
    files = _files_of(folder / manifest_name)
    if files is None:
        return False
    expected = {manifest_name, *files}
    folders = {parent.as_posix() for name in expected for parent in Path(name).parents}
    for entry in folder.rglob("*"):
        name = entry.relative_to(folder).as_posix()
        if entry.is_dir() and not entry.is_symlink():
            if name not in folders:
                return False
        elif name not in expected:
            return False
    return True


def _files_of(manifest: Path) -> Mapping[str, str] | None:
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return files if isinstance(files, Mapping) else None
