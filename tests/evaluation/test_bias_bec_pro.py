"""BEC-Pro against one sentence at a time, and the sentences it is made of."""

from __future__ import annotations

import pytest
import tiny_bias
from tiny_bias import BATCH_SIZES, SMALL_BOOTSTRAP, causal_oracle, masked_oracle
from tiny_models import MODELS, bert, llama

from fastdean.evaluation.bias import bec_pro, bec_pro_rows
from fastdean.evaluation.bias.bec_pro import COLUMNS
from fastdean.evaluation.bias.occupations import OCCUPATIONS

SMALL = {"female": ("nurse", "aide"), "male": ("cook", "roofer")}
PERSONS = (("he", "she"), ("the man", "the woman"))
TEMPLATES = ("{Person} is {occupation}.", "{Person} was {occupation}, as was I.")


def _rows():
    return bec_pro_rows(SMALL, PERSONS, TEMPLATES)


def _places(tokenizer, sentence, phrase):
    """Places of the phrase's pieces, by searching the ids."""
    ids = tokenizer(sentence)["input_ids"]
    pieces = tokenizer(phrase, add_special_tokens=False)["input_ids"]
    starts = [i for i in range(len(ids)) if ids[i : i + len(pieces)] == pieces]
    return ids, range(starts[0], starts[0] + len(pieces))


def _masked_association(model, tokenizer, row):
    ids, person = _places(tokenizer, row["sentence"], row["person"])
    _, occupation = _places(tokenizer, row["sentence"], row["occupation"])
    seen = masked_oracle(model, tokenizer, ids, person, person)
    return seen - masked_oracle(model, tokenizer, ids, person, [*person, *occupation])


def _causal_association(model, tokenizer, row):
    article = "an" if row["occupation"] == "aide" else "a"
    neutral = row["sentence"].replace(f"{article} {row['occupation']}", "a worker")
    sentences = (tokenizer(text)["input_ids"] for text in (row["sentence"], neutral))
    seen, without = (causal_oracle(model, ids) for ids in sentences)
    return seen - without


def _mean(values):
    values = list(values)
    return sum(values) / len(values)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_the_associations_are_those_of_one_sentence_at_a_time(name):
    model = MODELS[name]()
    tokenizer = tiny_bias.spelling_tokenizer("masked" if name == "bert" else "causal")
    association = _masked_association if name == "bert" else _causal_association
    rows = [(row, association(model, tokenizer, row)) for row in _rows()]

    def mean(gender, group=None):
        return _mean(a for r, a in rows if r["gender"] == gender and group in (None, r["group"]))

    found = bec_pro(model, tokenizer, _rows(), **SMALL_BOOTSTRAP)
    assert found.value == pytest.approx(mean("male") - mean("female"), abs=1e-4)
    assert found.figures["association_male"] == pytest.approx(mean("male"), abs=1e-4)
    assert found.figures["association_female"] == pytest.approx(mean("female"), abs=1e-4)
    for group in SMALL:
        expected = mean("male", group) - mean("female", group)
        assert found.by_category[group].mean == pytest.approx(expected, abs=1e-4)
    assert (found.n, found.figures["sentences"], found.neutral) == (4, 32, 0.0)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_batch_size_changes_nothing_and_the_model_is_left_alone(name):
    model = MODELS[name]().train()
    tokenizer = tiny_bias.spelling_tokenizer("masked" if name == "bert" else "causal")
    values = [
        bec_pro(model, tokenizer, _rows(), tokens_per_batch=size, **SMALL_BOOTSTRAP).value
        for size in BATCH_SIZES
    ]
    assert values == pytest.approx([values[0]] * 3, abs=1e-5)
    assert all(module.training for module in model.modules())
    assert tiny_bias.hooks(model) == 0


def test_an_occupation_that_is_the_neutral_word_has_no_association():
    rows = bec_pro_rows({"any": ("worker",)}, PERSONS, TEMPLATES)
    found = bec_pro(llama(), tiny_bias.spelling_tokenizer("causal"), rows, **SMALL_BOOTSTRAP)
    assert (found.value, found.figures["association_male"]) == (0.0, 0.0)


def test_the_sentences_name_person_and_occupation_once_each():
    rows = bec_pro_rows()
    assert len(rows) == len({row["sentence"] for row in rows})
    assert all(tuple(row) == COLUMNS for row in rows)
    for row in rows:
        words = row["sentence"].lower().replace(",", "").replace(".", "").split()
        assert words.count(row["person"].lower()) == 1, row
        assert row["sentence"].count(row["occupation"]) == 1, row
    assert any("worked as an electrician" in row["sentence"] for row in rows)
    assert {row["group"] for row in rows} == set(OCCUPATIONS)


def test_the_published_file_is_read(tmp_path):
    file = tmp_path / "sentences.tsv"
    columns = ("Sentence", "Person", "Gender", "Profession", "Prof_Gender")
    lines = ["\t".join(("", *columns))]
    lines += ["\t".join((str(i), *row.values())) for i, row in enumerate(_rows())]
    file.write_text("\n".join(lines))
    model, tokenizer = bert(), tiny_bias.spelling_tokenizer("masked")
    expected = bec_pro(model, tokenizer, _rows(), **SMALL_BOOTSTRAP)
    assert bec_pro(model, tokenizer, str(file), **SMALL_BOOTSTRAP) == expected


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"person": "duke"}, "row 2 must have its person in its sentence, got 'duke'"),
        ({"occupation": "duke"}, "row 2 must have its occupation in its sentence, got 'duke'"),
        ({"gender": "m"}, "row 2 must have 'male' or 'female' in the column gender, got 'm'"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(name, change, text):
    tokenizer = tiny_bias.spelling_tokenizer("masked" if name == "bert" else "causal")
    rows = _rows()
    rows[1] |= change
    with pytest.raises(ValueError, match=text):
        bec_pro(MODELS[name](), tokenizer, rows, **SMALL_BOOTSTRAP)


def test_an_occupation_of_one_gender_alone_is_named():
    rows = [r for r in _rows() if r["gender"] == "male" or r["occupation"] != "cook"]
    with pytest.raises(ValueError, match="'cook' must have sentences of both .* none of female"):
        bec_pro(llama(), tiny_bias.spelling_tokenizer("causal"), rows, **SMALL_BOOTSTRAP)
