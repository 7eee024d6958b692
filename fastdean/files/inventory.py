"""What a folder of FastDEAN consists of: what its files are called, and the list of them it holds.

The manifest of a folder holds `sha256`: name, relative to the folder, -> digest of the file. The
list decides two things: what `overwrite` may delete, which is nothing that is not on it, and
whether what is read is what was written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from fastdean.files.declared import Anything, Maps, Record, Unfit, read_json

_MANIFEST = Record({"sha256": Maps(Anything())}, others=Anything())
CONFIG_NAME = "fastdean_config.json"


def file_patterns(kind: str) -> list[str]:
    """Patterns of the names that the files of a folder of this kind have."""
    return [
        CONFIG_NAME,
        f"{kind}.safetensors",
        f"{kind}-*-of-*.safetensors",
        f"{kind}.safetensors.index.json",
    ]


def is_ours(file_name: str, kind: str) -> bool:
    """Whether a folder of this kind may hold a file of this name."""
    return any(fnmatch(file_name, pattern) for pattern in file_patterns(kind))


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


def holds_only(folder: Path, kind: str) -> bool:
    """Whether `folder` is a folder of this kind without a file of other origin."""
    try:
        config = read_json(folder / CONFIG_NAME)
    except Unfit:
        return False
    if not isinstance(config, dict) or config.get("kind") != kind:
        return False
    if config.get("format_version") == 1:
        # Written before folders listed their files: by the only names there were.
        own = {CONFIG_NAME, f"{kind}.safetensors"}
        return {entry.name for entry in folder.iterdir()} <= own
    return holds_only_listed(folder, CONFIG_NAME)


def holds_only_listed(folder: Path, manifest_name: str) -> bool:
    """Whether everything below `folder` is its manifest, or a file or folder that it lists.

    By name: a listed file that was edited since counts as ours, and goes with the folder. False for
    a manifest that lists nothing, cannot be read, or was written before there were lists.
    """
    try:
        expected = {manifest_name, *read_json(folder / manifest_name, _MANIFEST)["sha256"]}
    except Unfit:
        return False
    folders = {parent.as_posix() for name in expected for parent in Path(name).parents}
    for entry in folder.rglob("*"):
        ours = folders if entry.is_dir() and not entry.is_symlink() else expected
        if entry.relative_to(folder).as_posix() not in ours:
            return False
    return True


def lies_in(file: Path, folder: Path) -> bool:
    """Whether `file`, links followed, is part of `folder`, which is given without links.

    In the hub's cache, models--owner--name/snapshots/<commit>/ consists of links to
    models--owner--name/blobs/.
    """
    real = file.resolve()
    homes = [folder]
    if folder.parent.name == "snapshots":
        homes.append(folder.parent.parent / "blobs")
    return any(real == home or home in real.parents for home in homes)
