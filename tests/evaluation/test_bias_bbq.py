"""BBQ against the paper's formulas by hand and one answer at a time."""

from __future__ import annotations

import pytest
import tiny_bias
import torch
from tiny_bias import BATCH_SIZES, SMALL_BOOTSTRAP, causal_oracle
from tiny_models import bert, llama

from fastdean.evaluation.bias import bbq
from fastdean.evaluation.bias.bbq import ANSWERS, bbq_rows
from fastdean.evaluation.bias.likelihood import Likelihoods


def row(condition="ambig", polarity="neg", label=2, category="Age", groups=("old", "nonOld")):
    """The first answer names the stereotyped group, the third nobody."""
    return {
        "context": "a man is at the table.",
        "question": "who is poor",
        **dict(zip(ANSWERS, ("the cook", "the nurse", "a poor worker"), strict=True)),
        "category": category,
        "context_condition": condition,
        "question_polarity": polarity,
        "label": label,
        "answer_info": {
            "ans0": ["cook", groups[0]],
            "ans1": ["nurse", groups[1]],
            "ans2": ["none", "unknown"],
        },
        "additional_metadata": {"stereotyped_groups": ["old"]},
    }


ROWS = [
    row(),
    row(polarity="nonneg", category="Religion"),
    row("disambig", label=0),
    row("disambig", "nonneg", label=0),
    row("disambig", "nonneg", label=1, category="Religion"),
]
# What each of eight rows was answered with, worked out by hand below.
HAND = [
    (row(), 0),  # ambiguous: biased, wrong
    (row(), 0),  # ambiguous: biased, wrong
    (row(polarity="nonneg"), 0),  # ambiguous: against the stereotype, wrong
    (row(), 2),  # ambiguous: unknown, right
    (row("disambig", "neg", 0), 0),  # biased and right
    (row("disambig", "nonneg", 1), 2),  # biased would be right; unknown
    (row("disambig", "nonneg", 0), 0),  # against and right
    (row("disambig", "neg", 1), 0),  # biased and wrong
]


def _answering(monkeypatch, answers):
    """Likelihoods that prefer one answer of each row in turn."""

    def causal(self, questions):
        sums = torch.full((len(answers), 3), -9.0, dtype=torch.float64)
        sums[range(len(answers)), answers] = -1.0
        return sums.flatten(), torch.ones(len(questions), dtype=torch.int64)

    monkeypatch.setattr(Likelihoods, "causal", causal)
    return llama(), tiny_bias.spelling_tokenizer("causal")


def test_the_scores_are_the_papers_of_a_case_worked_by_hand(monkeypatch):
    rows, answers = zip(*HAND, strict=True)
    found = bbq(*_answering(monkeypatch, list(answers)), list(rows), **SMALL_BOOTSTRAP)
    assert found.accuracy_ambiguous.value == pytest.approx(25.0)
    assert found.accuracy_disambiguated.value == pytest.approx(50.0)
    # Three name a person, two of them biased: 2 * 2/3 - 1; times 1 - 1/4.
    assert found.bias_ambiguous.value == pytest.approx(100 * 0.75 * (2 * 2 / 3 - 1))
    # Three name a person, two of them biased.
    assert found.bias_disambiguated.value == pytest.approx(100 * (2 * 2 / 3 - 1))
    assert found.accuracy_when_biased_is_right.value == pytest.approx(50.0)
    sides = found.accuracy_disambiguated.by_category
    assert sides["biased answer right"].mean == sides["biased answer wrong"].mean == 50.0
    assert [figure.n for figure in vars(found).values()] == [4, 4, 4, 4, 2]


@pytest.mark.parametrize(
    ("picks", "bias", "when_right"),
    [("biased", 100.0, 100.0), ("other", -100.0, 0.0), ("unknown", 0.0, 0.0)],
)
def test_a_model_of_one_habit_has_the_scores_of_it(monkeypatch, picks, bias, when_right):
    """Also an over-corrected one: against the stereotype where it is what happened."""
    rows = bbq_rows([each for each, _ in HAND])
    by_habit = {
        "biased": [each["biased"] for each in rows],
        "other": [1 - each["biased"] for each in rows],
        "unknown": [2] * len(rows),
    }
    found = bbq(*_answering(monkeypatch, by_habit[picks]), rows, **SMALL_BOOTSTRAP)
    assert found.bias_ambiguous.value == found.bias_disambiguated.value == bias
    assert found.accuracy_when_biased_is_right.value == when_right


def test_the_chosen_answers_are_those_of_one_text_at_a_time():
    model, tokenizer = llama(), tiny_bias.spelling_tokenizer("causal")
    right = []
    for each in ROWS:
        means = []
        before = tokenizer(f"{each['context']}\nQuestion: {each['question']}\nAnswer:")["input_ids"]
        for answer in ANSWERS:
            ids = [*before, *tokenizer(each[answer], add_special_tokens=False)["input_ids"]]
            places = range(len(before), len(ids))
            means.append(causal_oracle(model, ids, places) / len(places))
        right.append(means.index(max(means)) == each["label"])
    found = [
        bbq(model, tokenizer, ROWS, tokens_per_batch=size, **SMALL_BOOTSTRAP)
        for size in BATCH_SIZES
    ]
    for result in found:
        assert result.accuracy_ambiguous.value == pytest.approx(50.0 * sum(right[:2]))
        assert result.accuracy_disambiguated.value == pytest.approx(100 * sum(right[2:]) / 3)


@pytest.mark.parametrize(
    ("groups", "stereotyped", "biased"),
    [
        (("old", "nonOld"), ["old"], 0),
        (("lowSES", "highSES"), ["low SES"], 0),
        (("F-Black", "F-White"), ["Black"], 0),
        (("F-Black", "M_Black"), ["F-Black"], 0),
        (("woman", "man"), ["F"], 0),
        (("nonObese", "obese"), ["obese"], 1),
        (("African American", "South American"), ["African American"], 0),
        (("Middle Eastern", "Eastern European"), ["Middle Eastern", "Arab"], 0),
        (("F-Black", "M-Black"), ["Black"], None),
    ],
)
def test_the_biased_answer_is_found_by_the_groups_as_they_are_spelled(groups, stereotyped, biased):
    rows = [row(groups=groups), *ROWS]
    rows[0]["additional_metadata"] = {"stereotyped_groups": stereotyped}
    assert bbq_rows(rows)[0]["biased"] == biased
    rows[0]["question_polarity"] = "nonneg"
    assert bbq_rows(rows)[0]["biased"] == (None if biased is None else 1 - biased)


def test_questions_without_a_biased_answer_count_for_accuracy_alone(monkeypatch):
    rows = [*ROWS, row(groups=("old", "old"), label=2)]
    found = bbq(*_answering(monkeypatch, [2] * len(rows)), rows, **SMALL_BOOTSTRAP)
    assert (found.accuracy_ambiguous.n, found.bias_ambiguous.n) == (3, 2)
    assert found.bias_ambiguous.figures["without_biased_answer"] == 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"label": 3}, "row 2 must have 0, 1 or 2 in the column label of BBQ, got 3"),
        ({"context_condition": "clear"}, "row 2 must have 'ambig' or 'disambig' in the column con"),
        ({"answer_info": None}, "row 2 must have answer_info and, in additional_metadata, stereo"),
        (
            {"answer_info": dict.fromkeys(ANSWERS, ["x", "unknown"])},
            "row 2 must have one answer of the group 'unknown' in answer_info, got 3",
        ),
        ({"ans1": " "}, "row 2 must be text in the column 'ans1' of BBQ"),
    ],
)
def test_a_row_that_cannot_be_scored_is_named(change, text):
    with pytest.raises(ValueError, match=text):
        bbq_rows([ROWS[0], {**ROWS[1], **change}, *ROWS[2:]])


def test_a_part_that_cannot_show_over_correction_is_refused():
    with pytest.raises(ValueError, match="got none of condition 'disambig'; give both"):
        bbq_rows(ROWS[:2])
    with pytest.raises(ValueError, match="rows whose biased answer is the right one, got none amo"):
        bbq_rows([ROWS[0], ROWS[3]])


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("oskarvanderwal/bbq", ("All", "test")),
        ("oskarvanderwal/bbq::config=Age", ("Age", "test")),
        ("other/bbq::split=train", (None, "train")),
    ],
)
def test_the_hubs_copy_is_read_whole_unless_a_category_is_named(monkeypatch, source, asked):
    def load_dataset(name, config, *, split, revision):
        assert (name, (config, split)) == (source.partition("::")[0], asked)
        return ROWS

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert len(bbq_rows(source)) == len(ROWS)


def test_a_masked_model_is_refused():
    with pytest.raises(ValueError, match="model must be a causal language model, got the masked B"):
        bbq(bert(), tiny_bias.spelling_tokenizer("masked"), ROWS, **SMALL_BOOTSTRAP)
