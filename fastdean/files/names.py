"""What a folder of FastDEAN consists of: the names of its files, and whose a folder is."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from fastdean.files.declared import read_json
from fastdean.files.inventory import holds_only_listed

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


def holds_only(folder: Path, kind: str) -> bool:
    """Whether `folder` is a folder of this kind without a file of other origin."""
    try:
        config = read_json(folder / CONFIG_NAME)
    except (OSError, ValueError):
        return False
    if not isinstance(config, dict) or config.get("kind") != kind:
        return False
    if config.get("format_version") == 1:
        # Written before folders listed their files: by the only names there were.
        own = {CONFIG_NAME, f"{kind}.safetensors"}
        return {entry.name for entry in folder.iterdir()} <= own
    return holds_only_listed(folder, CONFIG_NAME)


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
