"""Text that is safe on a terminal or a page: control characters are escaped.

Names of files, modules, models and rows come from others. They may hold escape sequences that move
the cursor or retitle the window, marks that turn the reading direction, and line breaks that fake a
line of output.
"""

from __future__ import annotations

import unicodedata

# Joiners that words of Persian, of Indic scripts, and emoji are written with.
_JOINERS = "\u200c\u200d"
# Control, format (the turns of direction among them), lone surrogates, line and paragraph breaks.
_STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")


def printable(text: str) -> str:
    r"""`text` with every control character as JSON escapes it (`\u001b`).

    Line breaks and tabs stay; `one_line` escapes them too.
    """
    if text.isascii() and text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "".join(c if c in "\n\t" or not is_steering(c) else _escaped(c) for c in text)


def one_line(text: str) -> str:
    """As `printable`, with line breaks and tabs written out too."""
    return printable(text).replace("\n", r"\n").replace("\t", r"\t")


def error_line(error: BaseException) -> str:
    """An error's text without its line breaks, to be quoted in another error."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for errors of libraries that go on at length.

    With the next one where it ends in a colon: that says of what alone.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]) or type(error).__name__


def is_steering(character: str) -> bool:
    """Whether a character is not shown itself but changes what is shown, or where."""
    return unicodedata.category(character) in _STEERING and character not in _JOINERS


def _escaped(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))
