"""Over-refusal against one prompt and one opening at a time."""

from __future__ import annotations

import math

import pytest
import tiny_bias
import torch
from tiny_bias import BATCH_SIZES, SMALL_BOOTSTRAP, causal_oracle, spelling_tokenizer
from tiny_models import bert, llama

from fastdean.evaluation import change_between
from fastdean.evaluation.over_refusal import COMPLIANCES, REFUSALS, benign_rows, over_refusal

ROWS = [
    {"prompt": "is the rich man a cook", "category": "people"},
    {"prompt": "why is the nurse poor.", "category": "people"},
    {"prompt": "a worker", "category": "work"},
]
CHAT = (
    "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)


def _mass(model, tokenizer, prompt: list[int], texts) -> float:
    """log of the added probabilities of the openings."""
    words = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    asked = [range(len(prompt), len(prompt) + len(ids)) for ids in words]
    found = [
        causal_oracle(model, [*prompt, *ids], places)
        for ids, places in zip(words, asked, strict=True)
    ]
    return math.log(sum(map(math.exp, found)))


@pytest.mark.parametrize("template", ["raw", "chat"])
def test_the_figures_are_those_of_one_opening_at_a_time(template):
    model, tokenizer = llama(), spelling_tokenizer("causal")
    if template == "chat":
        tokenizer.chat_template = CHAT
    refusing, complying = [], []
    for row in ROWS:
        ids = tokenizer(row["prompt"])["input_ids"]
        if template == "chat":
            ids = [*ids, tokenizer.eos_token_id, tokenizer.bos_token_id]
        refusing.append(_mass(model, tokenizer, ids, REFUSALS))
        complying.append(_mass(model, tokenizer, ids, COMPLIANCES))
    odds = [first - second for first, second in zip(refusing, complying, strict=True)]
    found = over_refusal(model, tokenizer, ROWS, **SMALL_BOOTSTRAP)
    expected = 100 * sum(map(math.exp, refusing)) / 3
    assert found.probability.value == pytest.approx(expected, rel=1e-5)
    assert found.log_odds.value == pytest.approx(sum(odds) / 3, abs=1e-4)
    assert found.log_odds.by_category["people"].mean == pytest.approx(sum(odds[:2]) / 2, abs=1e-4)
    likelier = 100 * sum(value > 0 for value in odds) / 3
    assert found.log_odds.figures["refusal_likelier"] == pytest.approx(likelier)
    assert found.log_odds.n == 3 and f"{template} template" in found.log_odds.notes


def test_the_batch_size_changes_nothing_and_the_model_is_left_alone():
    model, tokenizer = llama().train(), spelling_tokenizer("causal")
    found = [
        over_refusal(model, tokenizer, ROWS, tokens_per_batch=size, **SMALL_BOOTSTRAP)
        for size in BATCH_SIZES
    ]
    values = [each.log_odds.value for each in found]
    assert values == pytest.approx([values[0]] * 3, abs=1e-4)
    assert all(module.training for module in model.modules()) and tiny_bias.hooks(model) == 0


def test_a_model_that_is_pushed_to_refuse_is_told_by_its_change():
    """A character of refusals made likelier in every place: the change is above noise."""
    model, tokenizer = llama(), spelling_tokenizer("causal")
    rows = [{"prompt": f"{who} is {what}"} for who in ("he", "she") for what in "abcdefgh"]
    before = over_refusal(model, tokenizer, rows, **SMALL_BOOTSTRAP)
    with torch.no_grad():
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.lm_head.out_features))
        # Of "I'm" and "can't"; no answer opens with it.
        model.lm_head.bias[tokenizer.convert_tokens_to_ids("'")] += 6.0
    after = over_refusal(model, tokenizer, rows, **SMALL_BOOTSTRAP)
    moved = change_between(before.log_odds.interval, after.log_odds.interval)
    assert moved.mean > 1 and moved.verdict() == "higher"
    same = change_between(before.log_odds.interval, before.log_odds.interval)
    assert same.verdict() == "no effect beyond noise"


def test_the_embedded_prompts_are_told_by_side():
    rows, left_out = benign_rows()
    assert {row["side"] for row in rows} == {"fairness", "privacy"} and left_out == 0
    assert {row["side"] for row in benign_rows("embedded:benign:privacy")[0]} == {"privacy"}


@pytest.mark.parametrize(
    "harmful",
    [
        {"prompt": "harm", "type": "contrast_homonyms"},
        {"prompt": "harm", "type": "homonyms", "label": "unsafe"},
    ],
)
def test_the_harmful_contrasts_of_xstest_are_left_out_and_counted(harmful):
    rows, left_out = benign_rows([{"prompt": "kill a process", "type": "homonyms"}, harmful])
    assert [row["prompt"] for row in rows] == ["kill a process"] and left_out == 1
    with pytest.raises(ValueError, match="source must hold at least one benign prompt, got 1 rows"):
        benign_rows([harmful])


def test_a_row_without_a_prompt_is_named():
    with pytest.raises(ValueError, match="row 2 must be text in the column 'prompt' of over-refus"):
        benign_rows([{"question": "why"}, {"prompt": " ", "type": "x"}])
    with pytest.raises(ValueError, match=r"row 1 must have the columns prompt or .* in \['text'\]"):
        benign_rows([{"text": "why"}])


def test_a_masked_model_is_refused():
    with pytest.raises(ValueError, match="model must be a causal language model, got the masked B"):
        over_refusal(bert(), spelling_tokenizer("masked"), ROWS, **SMALL_BOOTSTRAP)


def test_a_tokenizer_that_cannot_tell_the_openings_apart_is_refused():
    import tiny_folders

    with pytest.raises(ValueError, match='tokenizer must tell "I\'m sorry" from the beginning of'):
        over_refusal(llama(), tiny_folders.tokenizer(), ROWS, **SMALL_BOOTSTRAP)


def test_openings_of_one_kind_exclude_each_other():
    texts = [*REFUSALS, *COMPLIANCES]
    assert [(a, b) for a in texts for b in texts if a != b and b.startswith(a)] == []
