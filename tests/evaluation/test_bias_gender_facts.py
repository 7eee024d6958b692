"""Gender facts against one sentence at a time, and the sentences themselves."""

from __future__ import annotations

from collections import Counter

import pytest
import tiny_bias
import torch
from tiny_bias import BATCH_SIZES, SMALL_BOOTSTRAP, causal_oracle, pseudo_oracle
from tiny_models import MODELS, llama

from fastdean.evaluation.bias import gender_facts
from fastdean.evaluation.bias.gender_facts import gender_fact_rows

COLUMNS = ("sentence", "right", "wrong", "gender", "topic")
ROWS = [
    dict(zip(COLUMNS, row, strict=True))
    for row in (
        ("a nun is a _.", "woman", "man", "female", "titles"),
        ("the monk is a _", "man", "woman", "male", "titles"),
        ("the hen said _ is poor", "she", "he", "female", "animals"),
    )
]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_share_is_that_of_one_sentence_at_a_time(name):
    model = MODELS[name]()
    tokenizer = tiny_bias.spelling_tokenizer("masked" if name == "bert" else "causal")

    def likelihood(row, word):
        ids = tokenizer(row["sentence"].replace("_", row[word]))["input_ids"]
        return pseudo_oracle(model, tokenizer, ids) if name == "bert" else causal_oracle(model, ids)

    differences = torch.tensor([likelihood(r, "right") - likelihood(r, "wrong") for r in ROWS])
    found = gender_facts(model, tokenizer, ROWS, **SMALL_BOOTSTRAP)
    assert found.value == pytest.approx(100 * float((differences > 0).double().mean()))
    assert found.figures["mean_difference_nats"] == pytest.approx(
        float(differences.mean()), abs=1e-4
    )
    assert found.by_category["answer: male"].mean == pytest.approx(100 * float(differences[1] > 0))
    assert found.n == 3 and found.neutral is None


def test_a_model_that_always_prefers_one_pronoun_guesses_and_shows_by_answer():
    """The bias of the output is all that this model has: half of all pairs, none by knowledge."""
    model, tokenizer = llama(), tiny_bias.spelling_tokenizer("causal")
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.lm_head.out_features))
    with torch.no_grad():
        model.lm_head.bias[tokenizer.convert_tokens_to_ids("man")] += 50.0
    found = gender_facts(model, tokenizer, ROWS[:2], **SMALL_BOOTSTRAP)
    shares = {name: found.by_category[f"answer: {name}"].mean for name in ("female", "male")}
    assert found.value == 50.0 and shares == {"female": 0.0, "male": 100.0}


def test_the_batch_size_changes_nothing():
    tokenizer = tiny_bias.spelling_tokenizer("causal")
    found = [
        gender_facts(llama(), tokenizer, ROWS, tokens_per_batch=size, **SMALL_BOOTSTRAP).value
        for size in BATCH_SIZES
    ]
    assert len(set(found)) == 1


def test_the_embedded_sentences_are_complete_distinct_and_balanced():
    rows = gender_fact_rows()
    assert rows == gender_fact_rows([dict(row) for row in rows]) and len(rows) >= 60
    assert len({row["sentence"] for row in rows}) == len({row["id"] for row in rows}) == len(rows)
    genders = Counter(row["gender"] for row in rows)
    assert min(genders.values()) >= 0.45 * len(rows)
    topics = Counter(row["topic"] for row in rows)
    assert len(topics) >= 6 and max(topics.values()) <= 20
    # Every word is right in some sentence and wrong in another, but for those of an address.
    right, wrong = ({row[side] for row in rows} for side in ("right", "wrong"))
    assert right ^ wrong <= {"gentlemen", "ladies", "women", "men"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"sentence": "no blank"}, "row 2 must have one '_' in its sentence, .* got 0 in 'no blan"),
        ({"sentence": "_ and _"}, "row 2 must have one '_' in its sentence, .* got 2 in '_ and _'"),
        ({"wrong": "man"}, "row 2 must have two different words, got 'man' as right and as wrong"),
        ({"gender": "both"}, "row 2 must have 'female' or 'male' in the column gender, got 'both'"),
    ],
)
def test_a_row_that_cannot_be_compared_is_named(change, text):
    with pytest.raises(ValueError, match=text):
        gender_fact_rows([ROWS[0], {**ROWS[1], **change}])
