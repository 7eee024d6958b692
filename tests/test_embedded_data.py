"""The embedded rows: present, well formed, and varied instead of made from a template."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from importlib import resources
from statistics import mean

import pytest

NAMES = ["fairness", "privacy", "general"]
PAIRED = ["fairness", "privacy"]


def _rows(name: str) -> list[dict[str, str]]:
    text = (resources.files("fastdean") / "datasets" / f"{name}.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _words(text: str) -> list[str]:
    return re.sub(r"[^\w\s]", "", text.lower()).split()


def _sequences(row: dict[str, str], length: int) -> set[tuple[str, ...]]:
    fields = [_words(row[key]) for key in ("prompt", "response", "unsafe") if key in row]
    return {
        tuple(words[start : start + length])
        for words in fields
        for start in range(len(words) - length + 1)
    }


def _rows_by_sequence(name: str, length: int) -> dict[str, list[str]]:
    holders = defaultdict(list)
    for row in _rows(name):
        for sequence in _sequences(row, length):
            holders[" ".join(sequence)].append(row["id"])
    return holders


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_complete(name):
    rows = _rows(name)
    assert len(rows) >= 96
    keys = ["id", "topic", "prompt", "response"] + (["unsafe"] if name in PAIRED else [])
    for row in rows:
        assert list(row) == keys, row["id"]
        assert [key for key in keys if not row[key] or row[key] != row[key].strip()] == [], row[
            "id"
        ]


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_distinct(name):
    for key in ("id", "prompt", "response"):
        repeated = [v for v, n in Counter(row[key] for row in _rows(name)).items() if n > 1]
        assert repeated == []


@pytest.mark.parametrize("name", NAMES)
def test_rows_cover_many_topics(name):
    assert len({row["topic"] for row in _rows(name)}) >= 12


@pytest.mark.parametrize("name", NAMES)
def test_no_six_words_are_shared_by_two_rows(name):
    assert {s: ids for s, ids in _rows_by_sequence(name, 6).items() if len(ids) > 1} == {}


@pytest.mark.parametrize("name", NAMES)
def test_no_four_words_are_a_habit(name):
    assert {s: ids for s, ids in _rows_by_sequence(name, 4).items() if len(ids) > 4} == {}


@pytest.mark.parametrize("name", NAMES)
def test_prompts_open_in_many_ways(name):
    openings = Counter(" ".join(_words(row["prompt"])[:3]) for row in _rows(name))
    assert {opening: n for opening, n in openings.items() if n > 4} == {}


@pytest.mark.parametrize("name", PAIRED)
def test_safe_and_unsafe_answers_are_of_one_length(name):
    # Otherwise a margin between the two would measure length.
    rows = _rows(name)
    safe = mean(len(_words(row["response"])) for row in rows)
    unsafe = mean(len(_words(row["unsafe"])) for row in rows)
    assert abs(safe - unsafe) <= 0.1 * max(safe, unsafe)


@pytest.mark.parametrize("name", PAIRED)
def test_safe_and_unsafe_answers_differ(name):
    assert [row["id"] for row in _rows(name) if row["response"] == row["unsafe"]] == []
