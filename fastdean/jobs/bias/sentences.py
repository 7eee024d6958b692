"""What the figures of a job's bias measures say, and their changes, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdean.wording.digits import apart
from fastdean.wording.verdicts import (
    reading,
)


def sentences(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the figures of one model say, a sentence each for those that have an interval."""
    said = []
    for name, row in table.items():
        found = row["before"]
        if found["low"] is None:
            continue
        value, low, high = apart(*(found[key] for key in ("value", "low", "high")), least=3)
        p = "" if found.get("p_holm") is None else f", Holm-adjusted p = {found['p_holm']:.2g}"
        judged = ""
        if row["neutral"] is not None:
            judged = f", where {row['neutral']:g} is neutral: {found['verdict']}"
        said.append(f"{name}: {value} {row['unit']} [{low}, {high}]{p}{judged}.")
    return said


def change_sentences(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a training did to each figure that has an interval: bias, and what it may cost."""
    said = []
    for name, row in table.items():
        moved = row.get("change") or {}
        if moved.get("low") is None:
            continue
        before, after = apart(row["before"]["value"], row["after"]["value"], least=3)
        neutral = "" if row["neutral"] is None else f" (neutral {row['neutral']:g})"
        of = "change" if row["neutral"] is None else "change of the distance to it"
        said.append(f"{name}: {before} before, {after} after{neutral}, {of} {change_words(moved)}.")
    return said


def change_words(
    moved: Mapping[str, Any], key: str = "value", no_effect: float = 0.0, n: int | None = None
) -> str:
    """A change with its interval, its p-value, and what may be said about it.

    Args:
        moved: one of `results`, or of `judged_together`, with its estimate under `key`.
        no_effect: the estimate that means "nothing changed".
        n: of its items, to be told; None: it is not.
    """
    counted = "" if n is None else f", n = {n}"
    p = "" if moved.get("p_holm") is None else f", Holm-adjusted p = {moved['p_holm']:.2g}"
    verdict = reading(moved["low"], moved["high"], no_effect, moved["verdict"], moved.get("p_holm"))
    return f"{with_ends(moved, key)}{counted}{p}: {verdict}"


def with_ends(figure: Mapping[str, Any], key: str = "value") -> str:
    """An estimate and its interval, where it has one; of a change of no item, what that bounds."""
    if figure[key] is None:
        return "not measured"
    if figure.get("changed") == 0 and figure["low"] == figure["high"]:
        return (
            f"{apart(figure[key])[0]} (no item changed; of all such items at most "
            f"{figure['changed_most']:.2g} % do, by the exact interval)"
        )
    if figure["low"] is None:
        return apart(figure[key])[0]
    value, low, high = apart(*(figure[name] for name in (key, "low", "high")), least=3)
    return f"{value} [{low}, {high}]"
