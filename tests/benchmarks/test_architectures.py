"""The record of all architectures is what comes of them, and the page says what is recorded."""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace

import pytest
from tiny_models import llama

from benchmarks.architectures import __main__ as command
from benchmarks.architectures import isolated, parity, record
from benchmarks.architectures.classes import listed
from benchmarks.architectures.page import page

RECORD = record.read()
INSTALLED = importlib.metadata.version("transformers")


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORD["classes"])
def test_a_class_is_what_is_recorded_of_it(name):
    if name not in listed():
        assert RECORD["transformers"] != INSTALLED, f"{name} is no class of this version"
        pytest.skip(f"transformers {INSTALLED} has no {name}")
    found = isolated.outcome_of(name)
    assert record.compared(found) == record.compared(RECORD["classes"][name]), found


@pytest.mark.slow
def test_classes_that_are_not_in_the_record_are_those_of_another_version(capsys):
    new = sorted(set(listed()) - set(RECORD["classes"]))
    with capsys.disabled():
        for name in new:
            print(f"\n{name} is not in the record", end="")
    assert not new or RECORD["transformers"] != INSTALLED


def test_of_a_refusal_the_reason_is_recorded_without_what_could_have_been_asked_for():
    model = llama()
    examples, loop = parity._examples(model, "causal", 0), SimpleNamespace(own_loss=False)
    assert parity._case(model, examples, loop, "nothing", "batches", {}) == (
        "refused: target_modules must match at least one Linear layer of the model, got 'nothing'"
    )


def test_nothing_is_recorded_that_must_not_be():
    found = {name: record.outcome(result) for name, result in RECORD["classes"].items()}
    assert [name for name, outcome in found.items() if outcome == record.FAILURE] == []
    assert sum(outcome == record.EXACT for outcome in found.values()) > 150


def test_the_page_is_made_from_the_record():
    text = command.PAGE.read_text(encoding="utf-8")
    assert text == page(RECORD), "run python -m benchmarks.architectures --page"
