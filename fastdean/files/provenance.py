"""The time, versions and names that every manifest records.

Manifests, cards and reports are published: they name a model, a file or a folder without the path
to it on somebody's disk.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

_PACKAGES = ("fastdean", "torch", "transformers", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """Python and package versions; a package that is not installed is left out."""
    return {"python": platform.python_version()} | _installed()


@cache
def _installed() -> dict[str, str]:
    # Every manifest asks, and reading what a package says of itself takes 2 ms each.
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def public_name(name_or_path: str) -> str:
    """A hub id unchanged; of a path on this machine, the last part."""
    if not name_or_path:
        return ""
    if re.match(r"[A-Za-z]:[\\/]|\\\\", name_or_path):
        return re.split(r"[\\/]", name_or_path.rstrip("\\/"))[-1]
    if not _is_path(name_or_path):
        return name_or_path
    # "." and ".." have no name of their own.
    return os.path.basename(os.path.abspath(os.path.expanduser(name_or_path)))


def public_source(source: str) -> str:
    """`NAME=PATH::key=value` with the last part of PATH only; see `sources.load_rows`."""
    place, mark, options = source.partition("::")
    return f"{_public_place(place)}{mark}{options}"


def _public_place(place: str) -> str:
    """A path, or what stands before a path, such as `--source=fairness=PATH` or `FILE=PATH`."""
    name, equals, rest = place.partition("=")
    # The sign may be part of a path, too.
    if not equals or (_is_path(name) and not Path(name).expanduser().is_file()):
        return public_name(place)
    return f"{public_name(name)}={_public_place(rest)}"


def public_command(command: str) -> str:
    """A command line with `public_source` applied to each of its words."""
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    return shlex.join(map(public_source, words))


def _is_path(text: str) -> bool:
    """Whether a text names a place on this machine, rather than something on the hub."""
    if text.startswith(("/", "~", "./", "../")) or text in (".", "..") or text.count("/") > 1:
        return True
    try:
        return os.sep in text and Path(text).exists()
    except (OSError, ValueError):
        return False
