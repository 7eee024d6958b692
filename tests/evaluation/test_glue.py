"""GLUE: its scores by hand and by scipy, and a head that learns what can be learned."""

from __future__ import annotations

import json
import math

import pytest
import tiny_words
import torch
from scipy import stats
from tiny_models import bert, llama

from fastdean.evaluation import glue
from fastdean.evaluation.bias import bias_nli
from fastdean.evaluation.classifier import HeadCourse, class_logits, fine_tuned_classifier
from fastdean.evaluation.glue import TASKS, Labelled, labelled

# What decides is whether a woman or a man works: the first token, which the pooler reads.
TEXTS = [(f"{who} works with the {other} .",) for who in ("woman", "man", "girl", "boy")
         for other in ("nurse", "doctor", "teacher", "pilot")]  # fmt: skip
TARGETS = [float("woman" in text or "girl" in text) for (text,) in TEXTS]
COURSE = HeadCourse(epochs=20, learning_rate=3e-3, batch_size=4, max_length=16)


def test_the_scores_are_those_of_the_confusion_matrix():
    # TP 3, FP 1, FN 2, TN 4.
    predicted = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    targets = torch.tensor([1.0, 1, 1, 0, 1, 1, 0, 0, 0, 0])
    assert glue.accuracy(predicted, targets) == pytest.approx(0.7)
    assert glue.f1(predicted, targets) == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    matthews = (3 * 4 - 1 * 2) / math.sqrt((3 + 1) * (3 + 2) * (4 + 1) * (4 + 2))
    assert TASKS["cola"].score(predicted, targets) == pytest.approx(matthews)
    assert TASKS["mrpc"].score(predicted, targets) == pytest.approx((0.7 + 6 / 9) / 2)
    # One answer for all: Matthews' correlation has no value, F1 of nothing named and none there.
    assert glue.correlation(torch.ones(3), targets[:3]) == 0.0
    assert glue.f1(torch.zeros(2), torch.zeros(2)) == 0.0


def test_correlations_are_scipys_with_ties():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(30, generator=generator).double()
    targets = torch.randint(0, 6, (30,), generator=generator).double()
    expected = (stats.pearsonr(scores, targets)[0] + stats.spearmanr(scores, targets)[0]) / 2
    assert TASKS["stsb"].score(scores, targets) == pytest.approx(expected, abs=1e-12)


def test_a_head_learns_a_task_and_leaves_the_model_and_the_random_state_alone():
    model, tokenizer = bert(), tiny_words.tokenizer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, rows = torch.get_rng_state(), Labelled(TEXTS, TARGETS)

    def score(**options):
        return glue.glue(model, tokenizer, "cola", rows, rows, progress=False, **options)

    learned = score(course=COURSE)
    assert learned == 100.0
    short = HeadCourse(2, 1e-3, 16, 16)
    assert score(course=short) == score(course=short) < learned
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    assert tokenizer.backend_tokenizer.truncation is None
    scored = Labelled(TEXTS, [4.0 * target + 0.5 for target in TARGETS])
    found = glue.glue(model, tokenizer, "stsb", scored, scored, course=COURSE, progress=False)
    assert found > 80.0


def test_the_encoder_is_the_models_and_the_head_is_new():
    model, tokenizer = bert(), tiny_words.tokenizer()
    still = HeadCourse(epochs=1, learning_rate=1e-12)
    head = fine_tuned_classifier(
        model, tokenizer, TEXTS, TARGETS, labels=("a", "b"), course=still, progress=False
    )
    ids = torch.tensor([tokenizer("she works")["input_ids"]])
    own, its = (m.base_model(ids).last_hidden_state for m in (model, head))
    assert torch.allclose(own, its, atol=1e-6) and head.config.id2label == {0: "a", 1: "b"}
    one = class_logits(head, tokenizer, TEXTS[:1], still)
    assert torch.allclose(class_logits(head, tokenizer, TEXTS, still)[:1], one, atol=1e-6)


def test_bias_nli_reads_a_head_of_inference():
    pairs = [(f"the {a} works", f"the {b} works") for a in ("nurse", "man") for b in ("man", "boy")]
    neutral = fine_tuned_classifier(
        bert(), tiny_words.tokenizer(), pairs * 4, [1.0] * 16,
        labels=glue.NLI_LABELS, course=COURSE, progress=False,
    )  # fmt: skip
    rows = [{"premise": a, "hypothesis": b} for a, b in pairs]
    assert bias_nli(neutral, tiny_words.tokenizer(), rows).fraction_neutral.value == 1.0


def test_rows_are_read_by_number_or_name_and_unknown_labels_are_left_out(tmp_path):
    rows = [{"sentence1": "a", "sentence2": "b", "label": label, "idx": 3}
            for label in (1, "0", "not_entailment", -1, "-")]  # fmt: skip
    task = TASKS["rte"]
    found = labelled(rows, task.columns, task.labels)
    assert found == Labelled([("a", "b")] * 3, [1.0, 0.0, 1.0])
    assert labelled([{**rows[0], "label": "2.5"}], task.columns, ()).targets == [2.5]
    for name, part in (("train", rows), ("validation", rows[:1])):
        path = tmp_path / f"rte-{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
    train, validation = glue.glue_rows("rte", tmp_path)
    assert train == found and validation.targets == [1.0]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"sentence": "a", "label": 2}, "row 1 must have one of unacceptable, acceptable or its"),
        ({"text": "a", "label": 1}, r"row 1 must have text in the columns sentence, got \['label"),
        ({"sentence": "a", "label": -1}, "rows must hold at least one with a known label, got no"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(row, said):
    with pytest.raises(ValueError, match=said):
        labelled([row], TASKS["cola"].columns, TASKS["cola"].labels)


def test_what_cannot_be_done_is_refused_in_a_line(tmp_path):
    with pytest.raises(ValueError, match="one of cola, .* got 'wnli'; give one task at a time"):
        glue.glue_rows("wnli")
    with pytest.raises(ValueError, match="source must be a folder with the file rte-train in .cs"):
        glue.glue_rows("rte", tmp_path)
    with pytest.raises(ValueError, match="model must be a masked language model, got the causal "):
        fine_tuned_classifier(llama(), tiny_words.tokenizer(), TEXTS, TARGETS)
    with pytest.raises(ValueError, match="texts must be at least one and as many as targets, got"):
        fine_tuned_classifier(bert(), tiny_words.tokenizer(), TEXTS, [])


def test_a_head_learns_inside_of_autocast_as_without_its_cache():
    def trained(cached):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            head = fine_tuned_classifier(
                bert(), tiny_words.tokenizer(), TEXTS, TARGETS, labels=("a", "b"), progress=False
            )
        return head.state_dict()

    kept, expected = trained(cached=True), trained(cached=False)
    assert all(torch.equal(kept[name], each) for name, each in expected.items())
