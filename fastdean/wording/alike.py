"""Reasons of several things in one line, each reason once."""

from __future__ import annotations

import re
from collections.abc import Mapping

# Text in quotes; an apostrophe inside of a word begins none.
_QUOTED = re.compile(r"(?<!\w)'[^']*'(?!\w)")


def told_together(reasons: Mapping[str, str], called: str = "SRC") -> str:
    """Names with their reasons, those of one reason together.

    Reasons that differ only in what they quote are one: each name then stands with the first text
    that its own quotes, and the reason says `called` in place of it.
    """
    alike: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        alike.setdefault(_QUOTED.sub("''", reason), []).append(name)
    return "; ".join(_told({n: reasons[n] for n in names}, called) for names in alike.values())


def _told(reasons: Mapping[str, str], called: str) -> str:
    first = next(iter(reasons.values()))
    if len({*reasons.values()}) == 1:
        return f"{', '.join(reasons)} ({first})"
    own = {name: _QUOTED.findall(reason)[0] for name, reason in reasons.items()}
    named = ", ".join(f"{name} {text}" for name, text in own.items())
    return f"{named} ({first.replace(next(iter(own.values())), called)})"
