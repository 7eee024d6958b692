"""Text that a terminal or a page may be given: what would steer either is written out.

Names of files, modules, models and rows come from others. In them may stand escape sequences that
move the cursor or retitle the window, marks that turn the reading direction, and line breaks that
begin a line of somebody else.
"""

from __future__ import annotations

import unicodedata

# Joiners that words of Persian, of Indic scripts, and emoji are written with.
_JOINERS = "\u200c\u200d"
# Control, format (the turns of direction among them), lone surrogates, line and paragraph breaks.
_STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")


def printable(text: str) -> str:
    r"""`text` with all that is no character to read as JSON writes it (`\u001b`).

    Line breaks and tabs stay: see `one_line` for what is a line, or a part of one.
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


def is_steering(character: str) -> bool:
    """Whether a character is none to read but changes what is shown, or where."""
    return unicodedata.category(character) in _STEERING and character not in _JOINERS


def _escaped(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))
