"""What must be said beside the second method's figures is said, and nothing where all is well."""

from __future__ import annotations

import pytest
import torch

from fastdean.jobs.cautions import about_classes, about_precision, about_regularizer


def table(seen, tokens=40):
    return {"classes seen": seen, "tokens of a class": tokens}


def history(*terms):
    return [{"step": step, "collapse": term} for step, term in enumerate(terms, start=1)]


@pytest.mark.parametrize(
    "seen, text",
    [
        (0, "None of the words occurs in the measured text"),
        (4, "Only 4 of 10 classes occur in the measured text, in 40 tokens"),
        (5, None),
        (10, None),
    ],
)
def test_few_seen_classes_are_told(seen, text):
    said = about_classes(10, table(seen))
    assert said == [] if text is None else text in said[0] and len(said) == 1


def test_a_term_that_was_always_or_at_times_0_is_told():
    (said,) = about_regularizer(10.0, None, history(0.0, 0.0))
    assert "0 in every step" in said and "trained as without it" in said
    (said,) = about_regularizer(10.0, None, history(0.0, 0.2, 0.1))
    assert said == "The regulariser's term was 0 in 1 of 3 steps."
    assert about_regularizer(10.0, None, history(0.3, 0.2)) == []
    assert about_regularizer(0.0, None, history(0.0)) == []


@pytest.mark.parametrize("dtype, told", [("float32", False), ("bfloat16", True)])
def test_a_training_whose_steps_round_away_is_told(dtype, told):
    said = about_precision(torch.nn.Linear(2, 2, dtype=getattr(torch, dtype)))
    assert [f"trained in {dtype}" in sentence for sentence in said] == [True] * told


def test_a_control_is_told():
    (said,) = about_regularizer(10.0, "frequency", history(0.3))
    assert "are a control (frequency)" in said
