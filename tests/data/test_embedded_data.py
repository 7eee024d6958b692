"""The embedded rows: present, well formed, and varied instead of made from a template."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from importlib import resources
from statistics import mean

import pytest

from fastdean.debias.counterfactual import counterfactual

NAMES = ["fairness", "privacy", "general"]
PAIRED = ["fairness", "privacy"]
ALL = [*NAMES, "debias"]
FIELDS = ("prompt", "response", "unsafe", "text", "premise", "hypothesis")


def _rows(name: str) -> list[dict[str, str]]:
    text = (resources.files("fastdean.data") / "datasets" / f"{name}.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _words(text: str) -> list[str]:
    return re.sub(r"[^\w\s]", "", text.lower()).split()


def _sequences(row: dict[str, str], length: int) -> set[tuple[str, ...]]:
    fields = [_words(row[key]) for key in FIELDS if key in row]
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


@pytest.mark.parametrize("name", ALL)
def test_rows_cover_many_topics(name):
    assert len({row["topic"] for row in _rows(name)}) >= 12


@pytest.mark.parametrize("name", ALL)
def test_no_six_words_are_shared_by_two_rows(name):
    assert {s: ids for s, ids in _rows_by_sequence(name, 6).items() if len(ids) > 1} == {}


@pytest.mark.parametrize("name", ALL)
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


def test_debiasing_rows_are_texts_or_entailment_pairs():
    rows = _rows("debias")
    forms = Counter(tuple(row) for row in rows)
    assert forms.keys() == {("id", "topic", "text"), ("id", "topic", "premise", "hypothesis")}
    assert forms["id", "topic", "text"] >= 240
    assert forms["id", "topic", "premise", "hypothesis"] >= 40
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({row.get("text", row.get("premise")) for row in rows}) == len(rows)


def test_debiasing_texts_open_in_many_ways():
    texts = [row["text"] for row in _rows("debias") if "text" in row]
    openings = Counter(" ".join(_words(text)[:2]) for text in texts)
    assert {opening: n for opening, n in openings.items() if n > 6} == {}


def test_debiasing_texts_are_gendered_both_ways_and_some_are_not():
    texts = [set(_words(row["text"])) for row in _rows("debias") if "text" in row]
    female = sum(bool(words & {"she", "her", "hers", "herself"}) for words in texts)
    male = sum(bool(words & {"he", "him", "his", "himself"}) for words in texts)
    assert 0.8 < female / male < 1.25
    neither = [row for row in _rows("debias") if "text" in row and not counterfactual(row["text"])]
    assert 30 <= len(neither) <= 60


def test_every_entailment_pair_has_a_gendered_word_on_both_sides():
    pairs = [row for row in _rows("debias") if "premise" in row]
    assert [
        row["id"]
        for row in pairs
        if not (counterfactual(row["premise"]) and counterfactual(row["hypothesis"]))
    ] == []
