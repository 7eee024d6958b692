"""Suggestions for a mistyped path."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

_MOST = 3


def nearest(path: str | Path) -> str:
    """Existing paths beside `path` with a similar last part, as the end of a sentence.

    Not `path` itself: what was refused may be there, and is not what was meant.
    """
    place = Path(path).expanduser()
    try:
        names = sorted({found.name for found in place.parent.iterdir()} - {place.name})
    except OSError:
        return ""
    close = get_close_matches(place.name, names, n=_MOST)
    found = ", ".join(repr(str(Path(path).parent / name)) for name in close)
    return f"; near it: {found}" if found else ""
