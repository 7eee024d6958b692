"""What changed in the figures of a job's bias measures, tested as one family."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from fastdean.evaluation import Interval, change_between, change_of_distance
from fastdean.evaluation.statistics.changes import of_confidence
from fastdean.evaluation.statistics.families import Change, judged_together
from fastdean.evaluation.statistics.intervals import BOOTSTRAP, share_interval
from fastdean.jobs.bias.figures import Found
from fastdean.wording.verdicts import (
    ABOVE,
    BELOW,
    CLOSER,
    FARTHER,
    HIGHER,
    LOWER,
    reworded,
)

# Of the changes of a table: their name, and which of them; or another test that is read with them.
_Key = tuple[str, str]
_VALUE, _CHANGE, _DISTANCE = "before", "raw_change", "change"


def results(
    states: Mapping[str, Found],
    *,
    others: Mapping[str, Change] | None = None,
    seed: int = 0,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any], dict[str, dict[str, Any]]]:
    """`report.bias_section`'s input from the figures "before" and, maybe, "after".

    All tests of the table are one family: of one model those of its figures against their neutral
    values, of two each figure's change and, where it has a neutral value, that of its distance to
    it.

    Args:
        others: changes that are read with them, by name, as `judged_together` takes them.
        seed: of the tests' draws.
    Returns:
        The table; how its tests were adjusted, empty without a test; and `others`, judged.
    """
    before, after = states["before"], states.get("after")
    changes: dict[_Key, Change] = {}
    for name, figures in before.items():
        if after is not None:
            changes |= _changes_of(name, figures, after[name], seed)
        elif figures["neutral"] is not None:
            changes[name, _VALUE] = _tested(figures, partial(_at, figures, seed))
    for name, change in (others or {}).items():
        changes[name, ""] = change
    judged, family = judged_together(changes)
    table = {}
    for name, figures in before.items():
        row = {
            "unit": figures["unit"],
            "neutral": figures["neutral"],
            "definition": "; ".join(figures["notes"]),
            "before": _numbers(figures) | _test_of(judged.get((name, _VALUE)), BELOW, ABOVE),
            "by_category": {"before": figures["by_category"]},
        }
        if after is not None:
            row["after"] = _numbers(after[name])
            moved = moved_items(figures, after[name], family.confidence_of_each)
            row["by_category"]["after"] = after[name]["by_category"]
            row[_CHANGE] = _change(judged[name, _CHANGE]) | moved
            # That of the figure itself where there is nothing to come closer to.
            row[_DISTANCE] = row[_CHANGE]
            if (name, _DISTANCE) in judged:
                row[_DISTANCE] = _change(judged[name, _DISTANCE], CLOSER, FARTHER) | moved
                row["definition"] = "; ".join(
                    [*figures["notes"], "closer and farther are of the distance to the neutral "
                     "value"]
                )  # fmt: skip
        table[name] = row
    told = {name: judged[name, ""] for name in others or {}}
    return table, family.to_dict() if family.tests else {}, told


def _changes_of(
    name: str, before: Mapping[str, Any], after: Mapping[str, Any], seed: int
) -> dict[_Key, Change]:
    found: dict[_Key, Change] = {(name, _CHANGE): change_of(before, after, seed)}
    neutral = before["neutral"]
    if neutral is not None:
        found[name, _DISTANCE] = _tested(
            before,
            lambda confidence: change_of_distance(
                _at(before, seed, confidence), _at(after, seed, confidence), neutral, seed=seed
            ),
        )
    return found


def moved_items(
    before: Mapping[str, Any], after: Mapping[str, Any], confidence: float
) -> dict[str, Any]:
    """How many items changed and, in %, how many of all such items do at most.

    Of items that are all as they were a mean has no spread, and its interval no width; the share
    that changes has an exact one. Nothing of a figure that is not made of items.
    """
    old, new = (each["made_of"]["values"] for each in (before, after))
    if old is None or new is None or not len(old) == len(new) > 1:
        return {}
    moved = np.not_equal(old, new)
    share = share_interval(100.0 * moved, 100.0, confidence=confidence)
    return {"changed": int(moved.sum()), "changed_most": share.high}


def change_of(before: Mapping[str, Any], after: Mapping[str, Any], seed: int = 0) -> Change:
    """How a kept figure changed, as `judged_together` takes it."""
    return _tested(
        before,
        lambda confidence: change_between(
            _at(before, seed, confidence), _at(after, seed, confidence), seed=seed
        ),
    )


def _tested(figures: Mapping[str, Any], take: Callable[[float], Interval]) -> Change:
    """`take`, or what it gives of a figure whose interval has no test."""
    if figures["interval_method"] == BOOTSTRAP:
        return take(figures["confidence"])
    return take


def _at(figures: Mapping[str, Any], seed: int, confidence: float) -> Interval:
    """A kept figure's interval of a confidence."""
    return of_confidence(_interval(figures), confidence, seed=seed)


def _test_of(judged: Mapping[str, Any] | None, lower: str, higher: str) -> dict[str, Any]:
    """The test of a figure against its neutral value, and its interval among the others'."""
    if judged is None:
        return {}
    kept = ("low", "high", "p_value", "p_holm", "test", "detects")
    verdict = reworded(judged["verdict"], lower, higher)
    return {key: judged[key] for key in kept} | {"verdict": verdict}


def _interval(figures: Mapping[str, Any]) -> Interval:
    """A kept figure's interval, with what changes are computed from."""
    low, high = (math.nan if figures[end] is None else figures[end] for end in ("low", "high"))
    made_of = dict(figures["made_of"])
    for name in ("values", "weights", "replicates"):
        made_of[name] = None if made_of[name] is None else np.array(made_of[name])
    return Interval(
        figures["value"],
        low,
        high,
        figures["n"],
        figures["confidence"],
        figures["interval_method"],
        no_effect=figures["neutral"],
        p_value=figures["p_value"],
        test=figures["test"],
        **made_of,
    )


def _change(judged: Mapping[str, Any], lower: str = LOWER, higher: str = HIGHER) -> dict[str, Any]:
    found = dict(judged)
    verdict = reworded(found["verdict"], lower, higher)
    return {"value": found.pop("mean"), **found, "verdict": verdict}


def _numbers(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {key: figures[key] for key in ("value", "low", "high", "n")}
