"""What every manifest says about when and with what something was made."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib import metadata

_PACKAGES = ("fastdean", "torch", "transformers", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """Python and package versions; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
