"""Progress bars that nobody asked for: libraries show theirs unless every one is told not to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def bars(shown: bool) -> Iterator[None]:
    """Inside, no bar of any library is drawn unless `shown`, in the whole process.

    All of them are tqdm's. Some are made by tqdm itself, which no library's own switch reaches.
    """
    from tqdm.std import tqdm

    if shown:
        yield
        return
    plain = tqdm.__init__

    def disabled(bar: tqdm, *args: Any, **options: Any) -> None:
        plain(bar, *args, **{**options, "disable": True})

    tqdm.__init__ = disabled
    try:
        yield
    finally:
        tqdm.__init__ = plain
