"""Ctrl-C between any two lines: an interrupt at a chosen line of chosen files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection


def moments(call: Callable[[], object], files: Collection[str]) -> list[int]:
    """When to interrupt a call: before each line of the files, at its first run and at its last.

    Returns:
        Ascending numbers for `interrupt`.
    """
    lines = _traced(call, files, None)
    first = {line: number for number, line in reversed(list(enumerate(lines)))}
    last = {line: number for number, line in enumerate(lines)}
    return sorted({*first.values(), *last.values()})


def interrupt(call: Callable[[], object], files: Collection[str], moment: int) -> None:
    """Run `call` and raise KeyboardInterrupt before the line that it runs as number `moment`.

    The exception and what it held on to are gone on return.
    """
    try:
        _traced(call, files, moment)
    except KeyboardInterrupt:
        pass
    else:
        raise AssertionError(f"line {moment} was not reached, or its interrupt swallowed")


def _traced(
    call: Callable[[], object], files: Collection[str], moment: int | None
) -> list[tuple[str, int]]:
    seen: list[tuple[str, int]] = []

    def at_event(frame, event, arg):
        if event == "line":
            seen.append((frame.f_code.co_filename, frame.f_lineno))
            if len(seen) - 1 == moment:
                raise KeyboardInterrupt
        return at_event

    def at_call(frame, event, arg):
        return at_event if frame.f_code.co_filename in files else None

    before = sys.gettrace()
    sys.settrace(at_call)
    try:
        call()
    finally:
        sys.settrace(before)
    return seen
