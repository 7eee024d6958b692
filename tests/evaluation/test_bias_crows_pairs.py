"""CrowS-Pairs against one sentence and one mask at a time."""

from __future__ import annotations

import csv

import pytest
import tiny_bias
import torch
from tiny_bias import BATCH_SIZES, SMALL_BOOTSTRAP, causal_oracle, pseudo_oracle
from tiny_models import MODELS, bert, llama

from fastdean.evaluation.bias import crows_pairs
from fastdean.evaluation.bias.crows_pairs import BIAS_TYPES

ROWS = [
    ("the old man is lost.", "the rich man is lost.", "stereo", "age"),
    ("she is a cook.", "he is a cook.", "stereo", "gender"),
    ("a nurse is poor", "a worker is poor", "antistereo", "gender"),
    ("the woman sang, he slept.", "the tall man sang, he slept.", "antistereo", "gender"),
    ("poor is he", "rich is he", "stereo", "socioeconomic"),
]
COLUMNS = ("sent_more", "sent_less", "stereo_antistereo", "bias_type")


def _rows():
    return [dict(zip(COLUMNS, row, strict=True)) for row in ROWS]


def _common(first: list[int], second: list[int]) -> tuple[list[int], list[int]]:
    """Places outside the part that differs: the rows differ in one run of tokens."""
    head = 1
    while first[head] == second[head]:
        head += 1
    tail = 1
    while first[-1 - tail] == second[-1 - tail]:
        tail += 1
    kept = ([*range(1, head), *range(len(ids) - tail, len(ids) - 1)] for ids in (first, second))
    return tuple(kept)


def _masked_differences(model, tokenizer):
    for row in _rows():
        first, second = (tokenizer(row[side])["input_ids"] for side in COLUMNS[:2])
        kept = _common(first, second)
        yield pseudo_oracle(model, tokenizer, first, kept[0]) - pseudo_oracle(
            model, tokenizer, second, kept[1]
        )


def _causal_differences(model, tokenizer):
    for row in _rows():
        first, second = (tokenizer(row[side])["input_ids"] for side in COLUMNS[:2])
        yield causal_oracle(model, first) - causal_oracle(model, second)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_the_share_is_that_of_one_sentence_at_a_time(name):
    model = MODELS[name]()
    tokenizer = tiny_bias.spelling_tokenizer("masked" if name == "bert" else "causal")
    oracle = _masked_differences if name == "bert" else _causal_differences
    differences = torch.tensor(list(oracle(model, tokenizer)), dtype=torch.float64)
    found = crows_pairs(model, tokenizer, _rows(), **SMALL_BOOTSTRAP)
    assert found.value == pytest.approx(100.0 * float((differences > 0).double().mean()))
    assert found.figures["mean_difference_nats"] == pytest.approx(
        float(differences.mean()), abs=1e-4
    )
    gender = 100.0 * float((differences[1:4] > 0).double().mean())
    assert found.by_category["gender"].mean == pytest.approx(gender)
    against = 100.0 * float((differences[2:4] > 0).double().mean())
    assert found.by_category["direction: antistereo"].mean == pytest.approx(against)
    assert found.n == 5 and found.neutral == 50.0


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_batch_size_changes_nothing_and_the_model_is_left_alone(name):
    model = MODELS[name]().train()
    tokenizer = tiny_bias.spelling_tokenizer("masked" if name == "bert" else "causal")
    found = [
        crows_pairs(model, tokenizer, _rows(), tokens_per_batch=size, **SMALL_BOOTSTRAP)
        for size in BATCH_SIZES
    ]
    assert len({result.value for result in found}) == 1
    means = [result.figures["mean_difference_nats"] for result in found]
    assert means == pytest.approx([means[0]] * 3, abs=1e-5)
    assert all(module.training for module in model.modules())
    assert tiny_bias.hooks(model) == 0


def test_a_text_without_start_token_is_begun_with_one():
    """Otherwise a first word, where many pairs differ, would have no probability at all."""
    model, bare = llama(), tiny_bias.spelling_tokenizer("bare")
    rows = [dict(zip(COLUMNS, ("he is poor", "she is poor", "stereo", "g"), strict=True))]
    found = crows_pairs(model, bare, rows, **SMALL_BOOTSTRAP)
    ids = [[bare.bos_token_id, *bare(rows[0][side])["input_ids"]] for side in COLUMNS[:2]]
    expected = causal_oracle(model, ids[0]) - causal_oracle(model, ids[1])
    assert found.figures["mean_difference_nats"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_equal_sentences_tie_and_count_as_half(name):
    tokenizer = tiny_bias.spelling_tokenizer("masked" if name == "bert" else "causal")
    rows = [{**row, "sent_less": row["sent_more"]} for row in _rows()]
    found = crows_pairs(MODELS[name](), tokenizer, rows, **SMALL_BOOTSTRAP)
    assert (found.value, found.figures["ties"]) == (50.0, 5)
    assert "ties: 5" in found.describe()


def test_the_file_and_the_hubs_numbers_give_the_same(tmp_path):
    model, tokenizer = bert(), tiny_bias.spelling_tokenizer("masked")
    file = tmp_path / "pairs.csv"
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, ["", *COLUMNS, "annotations"])
        writer.writeheader()
        writer.writerows({"": i, **row, "annotations": "[]"} for i, row in enumerate(_rows()))
    numbered = [
        {
            **row,
            "stereo_antistereo": ("stereo", "antistereo").index(row["stereo_antistereo"]),
            "bias_type": BIAS_TYPES.index(row["bias_type"]),
        }
        for row in _rows()
    ]
    found = [
        crows_pairs(model, tokenizer, source, **SMALL_BOOTSTRAP)
        for source in (_rows(), file, str(file), numbered)
    ]
    assert all(result == found[0] for result in found)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"sent_less": None}, "row 2 must be text in the column 'sent_less' of CrowS-Pairs"),
        ({"stereo_antistereo": "both"}, "row 2 must have 'stereo' or 'antistereo' .*got 'both'"),
        ({"sent_less": "zzz"}, "row 2 must have sentences with tokens in common, got none"),
    ],
)
def test_a_row_that_cannot_be_compared_is_named(change, text):
    rows = _rows()
    rows[1] |= change
    with pytest.raises(ValueError, match=text):
        crows_pairs(bert(), tiny_bias.spelling_tokenizer("masked"), rows, **SMALL_BOOTSTRAP)


def test_a_missing_column_is_named():
    rows = [{key: value for key, value in row.items() if key != "bias_type"} for row in _rows()]
    with pytest.raises(ValueError, match="row 1 must have the columns .* got no bias_type in"):
        crows_pairs(bert(), tiny_bias.spelling_tokenizer("masked"), rows, **SMALL_BOOTSTRAP)


def test_a_masked_model_needs_a_mask_token():
    tokenizer = tiny_bias.spelling_tokenizer("causal")
    with pytest.raises(ValueError, match="tokenizer must have a mask token for a masked model"):
        crows_pairs(bert(), tokenizer, _rows(), **SMALL_BOOTSTRAP)


def test_a_model_that_is_no_language_model_is_refused():
    with pytest.raises(ValueError, match="model must be a causal or masked language model, got Be"):
        crows_pairs(bert().bert, tiny_bias.spelling_tokenizer("masked"), _rows(), **SMALL_BOOTSTRAP)


def test_a_text_longer_than_the_model_is_refused():
    rows = [{**row, "sent_more": "z " * 200, "sent_less": "a cook"} for row in _rows()]
    tokenizer = tiny_bias.spelling_tokenizer("causal")
    with pytest.raises(ValueError, match=r"texts must fit the model's 128 tokens, got one of \d+"):
        crows_pairs(llama(), tokenizer, rows, **SMALL_BOOTSTRAP)
