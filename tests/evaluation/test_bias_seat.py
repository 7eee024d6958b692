"""SEAT: numbers worked by hand, and representations of one sentence at a time."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import tiny_bias
import torch
from tiny_bias import BATCH_SIZES, SMALL_BOOTSTRAP
from tiny_models import MODELS, bert, llama

from fastdean.evaluation.bias import seat
from fastdean.evaluation.bias.seat import (
    association,
    effect_size,
    permutation_p_value,
    sentence_states,
)

TEST = {
    "targ1": {"category": "Men", "examples": ["he is here.", "the man", "a man ran."]},
    "targ2": {"category": "Women", "examples": ["she is here.", "the woman", "a woman ran."]},
    "attr1": {"category": "Work", "examples": ["a worker is here.", "the cook"]},
    "attr2": {"category": "Care", "examples": ["the nurse is here.", "a nurse", "rich nurse"]},
}
SENTENCES = [sentence for part in TEST.values() for sentence in part["examples"]]


def _states(model, tokenizer, pooling="mean", layer=-1):
    """One sentence at a time, float64 [n, D]."""
    states = []
    for sentence in SENTENCES:
        ids = torch.tensor([tokenizer(sentence)["input_ids"]])
        with torch.no_grad():
            hidden = model.base_model(input_ids=ids, output_hidden_states=True).hidden_states
        own = hidden[1:][layer][0].double()
        end = -1 if tokenizer.mask_token_id is not None else None
        picked = {"mean": own[1:end].mean(0), "last": own[1:end][-1], "first": own[0]}
        states.append(picked[pooling])
    return torch.stack(states).numpy()


def _cosine(a, b):
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def _oracle(states, signs=(1, -1)):
    """The effect size with plain loops, NumPy's unbiased standard deviation."""
    x, y, a, b = np.split(states, [3, 6, 8])

    def s(w):
        near_a = np.mean([_cosine(w, other) for other in a])
        return signs[0] * near_a + signs[1] * np.mean([_cosine(w, other) for other in b])

    in_x, in_y = [s(w) for w in x], [s(w) for w in y]
    return (np.mean(in_x) - np.mean(in_y)) / np.std([*in_x, *in_y], ddof=1)


def test_association_and_effect_size_by_hand():
    cosines = torch.tensor([[1.0, 0.0, 0.5], [0.5, 0.5, 0.0]], dtype=torch.float64)
    assert association(cosines, 2).tolist() == [0.0, 0.5]
    # Means 3 and 1; mean 2, squares 4 + 0 + 0 + 4 over n - 1 = 3.
    s = torch.tensor([4.0, 2.0, 2.0, 0.0], dtype=torch.float64)
    assert float(effect_size(s, 2)) == pytest.approx(2.0 / math.sqrt(8.0 / 3.0))


def test_exact_p_values_by_hand():
    # Of the six pairs, {4, 3} alone has the largest sum, {4, 2} the next.
    s = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    assert permutation_p_value(s, 2) == (pytest.approx(1 / 6), 6, True)
    assert permutation_p_value(s[[0, 2, 1, 3]], 2)[0] == pytest.approx(2 / 6)
    assert permutation_p_value(s.flip(0), 2)[0] == pytest.approx(1.0)
    # Equal splits count: all six sums are the same.
    assert permutation_p_value(torch.full((4,), 0.1).double(), 2)[0] == pytest.approx(1.0)
    # Unequal sizes: {4} is the largest of four.
    assert permutation_p_value(s, 1) == (pytest.approx(1 / 4), 4, True)


def test_a_sampled_p_value_nears_the_exact_one_and_repeats():
    s = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    s[:6] += 0.5
    exact, splits, all_of_them = permutation_p_value(s, 6)
    assert (splits, all_of_them) == (924, True)
    sampled, splits, all_of_them = permutation_p_value(s, 6, permutations=900, seed=1)
    assert (splits, all_of_them) == (900, False)
    assert sampled == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 900))
    assert permutation_p_value(s, 6, permutations=900, seed=1)[0] == sampled
    # Never zero: the given split is one of those looked at.
    apart = torch.arange(24, 0, -1).double()
    assert permutation_p_value(apart, 12, permutations=50)[0] == pytest.approx(1 / 51)


@pytest.mark.parametrize(
    ("name", "pooling", "layer"),
    [
        ("bert", "mean", -1),
        ("bert", "first", 0),
        ("bert", "last", -1),
        ("llama", "mean", -1),
        ("gpt2", "last", 0),
    ],
)
def test_the_effect_is_that_of_one_sentence_at_a_time(name, pooling, layer):
    model = MODELS[name]()
    tokenizer = tiny_bias.spelling_tokenizer("masked" if name == "bert" else "causal")
    states = _states(model, tokenizer, pooling, layer)
    found = seat(model, tokenizer, TEST, pooling=pooling, layer=layer, **SMALL_BOOTSTRAP)
    assert found.value == pytest.approx(_oracle(states), abs=1e-3)
    by_category = {name: interval.mean for name, interval in found.by_category.items()}
    assert by_category["association with Work"] == pytest.approx(_oracle(states, (1, 0)), abs=1e-3)
    assert by_category["association with Care"] == pytest.approx(_oracle(states, (0, 1)), abs=1e-3)
    assert (found.n, found.figures["splits"], found.figures["exact"]) == (6, 20, 1)
    assert found.interval.low <= found.value <= found.interval.high


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_batch_size_changes_nothing_and_the_model_is_left_alone(name):
    model = MODELS[name]().train()
    tokenizer = tiny_bias.spelling_tokenizer("masked" if name == "bert" else "causal")
    found = [
        seat(model, tokenizer, TEST, tokens_per_batch=size, **SMALL_BOOTSTRAP)
        for size in BATCH_SIZES
    ]
    for result in found[1:]:
        assert result.value == pytest.approx(found[0].value, abs=1e-3)
        assert result.figures == found[0].figures
    assert all(module.training for module in model.modules())
    assert tiny_bias.hooks(model) == 0


@pytest.mark.parametrize(
    ("name", "pooling"), [("bert", "mean"), ("llama", "mean"), ("gpt2", "last")]
)
def test_the_states_are_those_of_one_sentence_at_a_time(name, pooling):
    model = MODELS[name]()
    tokenizer = tiny_bias.spelling_tokenizer("masked" if name == "bert" else "causal")
    found = sentence_states(model, tokenizer, SENTENCES, pooling=pooling, progress=False)
    expected = torch.from_numpy(_states(model, tokenizer, pooling))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_an_encoder_without_a_head_is_measured_too():
    model, tokenizer = bert(), tiny_bias.spelling_tokenizer("masked")
    with_head, without = (
        sentence_states(m, tokenizer, SENTENCES, progress=False) for m in (model, model.bert)
    )
    torch.testing.assert_close(with_head, without, atol=1e-5, rtol=1e-5)


def test_the_published_form_and_rows_give_the_same(tmp_path):
    model, tokenizer = llama(), tiny_bias.spelling_tokenizer("causal")
    shipped = tmp_path / "test.jsonl"
    shipped.write_text(json.dumps(TEST, indent=2))
    rows = [
        {"set": key, "category": part["category"], "sentence": sentence}
        for key, part in TEST.items()
        for sentence in part["examples"]
    ]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in rows))
    expected = seat(model, tokenizer, TEST, **SMALL_BOOTSTRAP)
    for source in (shipped, str(shipped), rows, lines):
        assert seat(model, tokenizer, source, **SMALL_BOOTSTRAP) == expected


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"attr1": None}, "source must hold the sets .* got no attr1"),
        ({"targ2": {"examples": ["one"]}}, "targ2 must hold at least 2 sentences under 'examples'"),
        ({"attr2": {"examples": []}}, "attr2 must hold at least 1 sentences"),
    ],
)
def test_a_set_that_is_missing_or_too_small_is_named(change, text):
    with pytest.raises(ValueError, match=text):
        seat(llama(), tiny_bias.spelling_tokenizer("causal"), TEST | change, **SMALL_BOOTSTRAP)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"pooling": "max"}, "pooling must be 'mean', 'last' or 'first', got 'max'"),
        ({"pooling": "first"}, "pooling must be 'mean' or 'last' for a causal model, got 'first'"),
        ({"layer": 7}, r"layer must be in -2\.\.1, got 7; the model has 2 layers"),
        ({"permutations": 0}, "permutations must be at least 1, got 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        seat(llama(), tiny_bias.spelling_tokenizer("causal"), TEST, **options, **SMALL_BOOTSTRAP)


def test_targets_that_are_all_alike_are_refused():
    alike = TEST | {key: {"examples": ["the man"] * 2} for key in ("targ1", "targ2")}
    with pytest.raises(ValueError, match="must tell the target sentences apart, got the same"):
        seat(llama(), tiny_bias.spelling_tokenizer("causal"), alike, **SMALL_BOOTSTRAP)
