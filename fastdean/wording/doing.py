"""The running step of a job, for the titles of progress bars: "step 5 of 9, random mask"."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_STEP: ContextVar[str] = ContextVar("step", default="")


@contextmanager
def during(step: str) -> Iterator[None]:
    """Bars shown inside name this step."""
    before = _STEP.set(step)
    try:
        yield
    finally:
        _STEP.reset(before)


def titled(what: str) -> str:
    """The title of a bar that shows `what`, with the running step before it."""
    step = _STEP.get()
    if not step or step.endswith(what):
        return step or what
    return f"{step}: {what}"
