"""Progress bars that nobody asked for: libraries show theirs unless every one is told not to."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_OURS = __name__.partition(".")[0]
# What a bar of ours is in a log: a line after so many seconds, then one each time they have passed.
_SECONDS = 30.0
_LINES = {
    "delay": _SECONDS,
    "mininterval": _SECONDS,
    "maxinterval": 2 * _SECONDS,
    "bar_format": "fastdean: {desc}: {n_fmt} of {total_fmt} {unit}, {elapsed}, {remaining} left",
    "dynamic_ncols": False,
    "ncols": None,
    "ascii": True,
}


class _Lines:
    """A file for tqdm, which writes the same line anew: each text on a line of its own."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        line = text.strip()
        if line:
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        self._stream.flush()


@contextmanager
def bars(shown: bool) -> Iterator[None]:
    """Inside, no bar of any library is drawn unless `shown`, in the whole process.

    All of them are tqdm's. Some are made by tqdm itself, which no library's own switch reaches.
    Where stderr is neither a terminal nor a notebook, there are none: in a log those of libraries
    would stand between our lines, and ours are lines, one in a while where something takes long.
    """
    from tqdm.std import tqdm

    if shown and _can_redraw():
        yield
        return
    plain = tqdm.__init__

    def without_bar(bar: tqdm, *args: Any, **options: Any) -> None:
        if shown and _made_by_us():
            options = {**options, **_LINES, "file": _Lines(options.get("file") or sys.stderr)}
        else:
            options = {**options, "disable": True}
        plain(bar, *args, **options)

    tqdm.__init__ = without_bar
    try:
        yield
    finally:
        tqdm.__init__ = plain


def _can_redraw() -> bool:
    from tqdm.auto import tqdm

    in_notebook = any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)
    return in_notebook or bool(getattr(sys.stderr, "isatty", lambda: False)())


def _made_by_us() -> bool:
    """Whether a module of ours made the bar that is being made."""
    frame: FrameType | None = sys._getframe(2)
    # Kinds of tqdm's bars, whoever defines them, call on from an __init__ of their own.
    while frame is not None and frame.f_code.co_name == "__init__":
        frame = frame.f_back
    module = "" if frame is None else str(frame.f_globals.get("__name__"))
    return module.partition(".")[0] == _OURS
