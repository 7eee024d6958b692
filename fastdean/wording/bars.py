"""Progress bars that nobody asked for: libraries show theirs unless every one is told not to."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_OURS = __name__.partition(".")[0]


@contextmanager
def bars(shown: bool) -> Iterator[None]:
    """Inside, no bar of any library is drawn unless `shown`, in the whole process.

    All of them are tqdm's. Some are made by tqdm itself, which no library's own switch reaches.
    Where stderr is neither a terminal nor a notebook, only our own are drawn: in a log those of
    libraries stand between our lines, and a line of theirs says nothing when it is over.
    """
    from tqdm.std import tqdm

    if shown and _can_redraw():
        yield
        return
    plain = tqdm.__init__

    def disabled(bar: tqdm, *args: Any, **options: Any) -> None:
        if not (shown and _made_by_us()):
            options = {**options, "disable": True}
        plain(bar, *args, **options)

    tqdm.__init__ = disabled
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
