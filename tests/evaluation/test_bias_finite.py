"""A model that gives NaN or infinity has no bias: every measure names it and the row."""

from __future__ import annotations

import pytest
import test_bias_nli
import test_bias_seat
import test_bias_stereoset
import tiny_bias
import torch
from tiny_bias import SMALL_BOOTSTRAP
from tiny_models import MODELS, llama

from fastdean.evaluation.bias import (
    bec_pro,
    bias_nli,
    crows_pairs,
    seat,
    stereoset,
    winobias,
)
from fastdean.evaluation.bias.result import preferred

NAN = float("nan")
# NaN of one row in a batch may reach the others.
ONE_ROW = {**SMALL_BOOTSTRAP, "tokens_per_batch": 1}
# "zebra" stands in the second alone; its first letter is a token of its own.
_SENTENCES = ("the nurse is {}", "the zebra is {}", "the cook is {}")


def _crows():
    return [
        {
            "sent_more": text.format("poor"),
            "sent_less": text.format("rich"),
            "stereo_antistereo": "stereo",
            "bias_type": "gender",
        }
        for text in _SENTENCES
    ]


def _winobias():
    return [
        {"pro": f"{text.format('she')}.", "anti": f"{text.format('he')}.", "type": "type1"}
        for text in _SENTENCES
    ]


def _bec_pro():
    return [
        {
            "sentence": f"the {person} is a {occupation}",
            "person": person,
            "gender": gender,
            "occupation": occupation,
            "group": "all",
        }
        for occupation in ("cook", "zebra")
        for person, gender in (("man", "male"), ("woman", "female"))
    ]


def _stereoset():
    rows = test_bias_stereoset._flat()
    for label in test_bias_stereoset.LABELS:
        rows[1][label] = rows[1][label].replace("nurse", "zebra")
    rows[1]["context"] = rows[1]["context"].replace("nurse", "zebra")
    return rows


def _broken(model, tokenizer):
    """The model with NaN for an embedding of the letter z; its head, maybe tied, is left whole."""
    letter = tokenizer.convert_tokens_to_ids("z")
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: output.masked_fill((inputs[0] == letter)[..., None], NAN)
    )
    return model


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize(
    "measure, rows, place",
    [
        (crows_pairs, _crows, "row 2"),
        (winobias, _winobias, "line 2 of type1"),
        (stereoset, _stereoset, "row 2"),
        (bec_pro, _bec_pro, "row 3"),
    ],
)
def test_a_likelihood_that_is_no_number_is_refused_by_model_and_row(name, measure, rows, place):
    tokenizer = tiny_bias.spelling_tokenizer("masked" if name == "bert" else "causal")
    model = MODELS[name]()
    measure(model, tokenizer, rows(), **ONE_ROW)
    _broken(model, tokenizer)
    expected = f"must give finite numbers, got nan from {type(model).__name__} for {place};"
    with pytest.raises(ValueError, match=expected):
        measure(model, tokenizer, rows(), **ONE_ROW)


def test_an_infinite_likelihood_is_refused_too():
    tokenizer = tiny_bias.spelling_tokenizer("causal")
    model = llama()
    letter = tokenizer.convert_tokens_to_ids("z")
    model.lm_head.register_forward_hook(
        lambda module, inputs, output: output.index_fill(-1, torch.tensor(letter), -torch.inf)
    )
    with pytest.raises(ValueError, match="got -inf from LlamaForCausalLM for row 2;"):
        crows_pairs(model, tokenizer, _crows(), **ONE_ROW)


def test_a_representation_that_is_no_number_is_refused_by_set_and_sentence():
    tokenizer = tiny_bias.spelling_tokenizer("causal")
    test = {key: dict(part) for key, part in test_bias_seat.TEST.items()}
    test["attr1"]["examples"] = ["the cook", "the zebra"]
    model = _broken(llama(), tokenizer)
    with pytest.raises(ValueError, match="from LlamaForCausalLM for sentence 2 of attr1;"):
        seat(model, tokenizer, test, **ONE_ROW)


def test_a_classifier_that_gives_no_numbers_is_refused_by_row():
    tokenizer = tiny_bias.spelling_tokenizer("masked")
    rows = [dict(row) for row in test_bias_nli.ROWS[:4]]
    rows[2]["premise"] = "The zebra ran."
    model = _broken(test_bias_nli._classifier(), tokenizer)
    with pytest.raises(ValueError, match="from BertForSequenceClassification for row 3;"):
        bias_nli(model, tokenizer, rows, **ONE_ROW)


def test_no_number_is_no_preference():
    found = preferred(torch.tensor([NAN, 1.0, 1.0]), torch.tensor([1.0, NAN, 2.0]))
    assert found.isnan().tolist() == [True, True, False]
