"""The benign look-alikes: enough of them, varied, short, and of one side each."""

from __future__ import annotations

from collections import Counter

import pytest
from test_embedded_data import _rows, _rows_by_sequence, _words

from fastdean.data.sources import PRESETS, load_rows

SIDES = ("fairness", "privacy")
NAMES = [f"benign_{side}" for side in SIDES]
# The sides, and the rows that they are look-alikes of.
PROMPTS = [*NAMES, *SIDES, "general"]


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_complete_and_distinct(name):
    rows = _rows(name)
    assert len(rows) >= 100
    assert {tuple(row) for row in rows} == {("id", "topic", "prompt")}
    assert all(row[key] == row[key].strip() != "" for row in rows for key in row)
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({tuple(_words(row["prompt"])) for row in rows}) == len(rows)


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_short_and_varied(name):
    rows = _rows(name)
    lengths = [len(_words(row["prompt"])) for row in rows]
    assert min(lengths) >= 4 and max(lengths) <= 25
    topics = Counter(row["topic"] for row in rows)
    assert len(topics) >= 11 and max(topics.values()) <= 15
    openings = Counter(" ".join(_words(row["prompt"])[:3]) for row in rows)
    assert {opening: n for opening, n in openings.items() if n > 4} == {}
    sequences = _rows_by_sequence(name, 5)
    assert {s: ids for s, ids in sequences.items() if len(ids) > 1} == {}
    ends = Counter(row["prompt"][-1] for row in rows)
    assert ends["."] >= 5 and set(ends) <= {".", "?"}


def test_no_prompt_is_that_of_another_set():
    held = Counter(s for name in PROMPTS for s in {*_rows_by_sequence(name, 6)})
    assert {sequence: n for sequence, n in held.items() if n > 1} == {}


def test_the_sides_are_read_apart_and_together():
    apart = [PRESETS[f"embedded:benign:{side}"]() for side in SIDES]
    assert PRESETS["embedded:benign"]() == [*apart[0], *apart[1]]


def test_they_are_not_scored_as_they_have_no_answer():
    with pytest.raises(ValueError, match="source 'embedded:benign' must have the columns 'prompt'"):
        load_rows("embedded:benign")
