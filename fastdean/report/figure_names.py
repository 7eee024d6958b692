"""What the figures of measures are called where there is little room."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

# A name of at most so many characters stands whole beside others that begin alike.
_WHOLE = 56


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Of each name its part before the first comma, or more where others have the same part.

    The names of a table are told apart by what they are given here, so that none takes another's
    place: "BBQ, accuracy ..." and "BBQ, bias score ..." are both "BBQ" before the comma.
    """
    names = list(dict.fromkeys(names))
    alike = Counter(_first(name) for name in names)
    found = {}
    for name in names:
        others = [other for other in names if other != name]
        if alike[_first(name)] == 1:
            found[name] = _first(name)
        elif len(name) <= _WHOLE:
            found[name] = name
        else:
            found[name] = _told_apart(name, others)
    return found


def _first(name: str) -> str:
    return name.partition(",")[0]


def _told_apart(name: str, others: Iterable[str]) -> str:
    """The first words of a name, as many as no other name begins with."""
    words, others = name.split(" "), list(others)
    for count in range(1, len(words)):
        start = " ".join(words[:count])
        if not any(f"{other} ".startswith(f"{start} ") for other in others):
            return start.rstrip(",")
    return name
