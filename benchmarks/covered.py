"""Which tests have been seen to pass: whole files where all of a file have, else what has."""

from __future__ import annotations

from collections.abc import Collection, Mapping


def covered(outcomes: Mapping[str, str]) -> list[str]:
    """The fewest names that stand for all that passed, and for nothing that did not.

    Args:
        outcomes: of every test of a run, or of a file that could not be read: "passed", "skipped"
            or anything else.
    """
    levels = (_file, _function, str)
    found: dict[str, None] = {}
    for test, outcome in outcomes.items():
        if outcome != "passed":
            continue
        for level in levels:
            name = level(test)
            alike = {each for other, each in outcomes.items() if level(other) == name}
            if alike <= {"passed", "skipped"}:
                found[name] = None
                break
    return list(found)


def is_covered(test: str, seen: Collection[str]) -> bool:
    """Whether a file, a test or a case of one is among `seen`, or part of what is."""
    return any(each in seen for each in (test, _function(test), _file(test)))


def _file(test: str) -> str:
    return test.partition("::")[0]


def _function(test: str) -> str:
    return test.partition("[")[0]
