"""What a terminal shows that cannot show every character: the nearest plain ones, and no error."""

from __future__ import annotations

import codecs
import sys
import unicodedata

# What lines and tables are drawn with, and the signs of our own texts.
_PLAIN = {
    **dict.fromkeys("─━═╌╴╶╸╺", "-"),
    **dict.fromkeys("│┃║╎╵╷╹╻", "|"),
    **dict.fromkeys("█▉▊▋▌▍▎▏▇▆▅▄▃▂▁", "#"),
    **dict.fromkeys("•·", "*"),
    **dict.fromkeys("–—−", "-"),
    **dict.fromkeys("‘’", "'"),
    **dict.fromkeys("“”", '"'),
    "×": "x",
}
_CORNERS = range(0x2500, 0x2580)


def write_what_can_be_shown() -> None:
    """From now on no character of a text makes writing to stdout or stderr fail."""
    codecs.register_error("fastdean", _replaced)
    for stream in (sys.stdout, sys.stderr):
        # Something else may stand in its place, such as a recorder.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="fastdean")


def shows_everything(encoding: str | None) -> bool:
    """Whether a stream of this encoding can show any character."""
    return (encoding or "").lower().replace("-", "").startswith("utf")


def _replaced(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    failing = error.object[error.start : error.end]
    return "".join(_plain(character) for character in failing), error.end


def _plain(character: str) -> str:
    if character in _PLAIN:
        return _PLAIN[character]
    if ord(character) in _CORNERS:
        return "+"
    # Of a letter with a mark, the letter.
    bare = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return bare or character.encode("ascii", "backslashreplace").decode()
