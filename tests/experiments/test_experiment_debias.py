"""The debiasing study: fair arms, complete records, and honest intervals over seeds."""

from __future__ import annotations

import json
import math

import pytest
import tiny_words
import torch
from tiny_models import bert, llama

from benchmarks.harness import environment, models, store, tables
from benchmarks.harness.store import Record
from experiments.debias import encoder, figures, subject, table
from experiments.debias.__main__ import main
from experiments.debias.figures import MASKED_LOSS, NC3, PERPLEXITY, UNC3
from fastdean.collapse import collapse_metrics

BEC = "BEC-Pro, association with male minus female words"
ROWS = [{"text": text} for text in tiny_words.TEXTS]

pytestmark = pytest.mark.usefixtures("quick_benchmarks")


@pytest.fixture
def crows(tmp_path):
    """Five pairs, of which three are about gender."""
    rows = [
        {"sent_more": f"{who} said he works", "sent_less": f"{who} said she works"}
        | {"stereo_antistereo": "stereo", "bias_type": kind}
        for who, kind in (("the nurse", "gender"), ("the pilot", "age"), ("a doctor", "gender"))
    ]
    rows += [{**rows[0], "sent_more": "a man met him"}, {**rows[1], "bias_type": "religion"}]
    path = tmp_path / "crows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def benchmark(tmp_path, monkeypatch, crows):
    """The study on a tiny causal model and short text, without the tests before it."""
    texts = [{"text": text} for text in tiny_words.TEXTS for _ in range(2)]
    monkeypatch.setattr(subject, "load_rows", lambda source: texts)
    loaded = lambda *a: (llama(), tiny_words.tokenizer(), "tiny")  # noqa: E731
    monkeypatch.setattr(models, "load_model", loaded)

    def measure(*arguments):
        places = ["--device", "cpu", "--out", str(tmp_path / "results")]
        course = ["--steps", "2", "--batch-size", "4", "--seeds", "1", "--learning-rate", "1e-2"]
        flags = ["--no-gate", *places, *course, "--bias", f"crows_pairs={crows}"]
        return main(["run", *flags, *arguments])

    return measure


def read(tmp_path):
    return list(store.read(tmp_path / "results", "debias"))


def test_each_arm_is_recorded_half_way_and_at_the_end(benchmark, tmp_path, capsys):
    assert benchmark("--strength", "5", "--bias-rows", "2", "--seeds", "2") == 0
    rows = read(tmp_path)
    assert [(r.contender, r["strength"], r["seed"], r["step"]) for r in rows] == [
        ("base", 0, None, 0),
        *(
            (arm, strength, seed, step)
            for seed in (0, 1)
            for arm, strength in (("none", 0), ("words", 5), ("random", 5), ("frequency", 5))
            for step in (1, 2)
        ),
    ]
    base, *trained = rows
    for row in rows:
        names = list(row["figures"])
        assert names[:3] == [UNC3, NC3, PERPLEXITY] and names[3].startswith("CrowS-Pairs")
        assert all(math.isfinite(value) for value in row["figures"].values())
        assert row["neutral"] == dict(zip(names, (None, None, None, 50.0), strict=True))
        assert (row["trained_rows"], row["held_out_rows"], row["steps"]) == (15, 5, 2)
        assert row["settings"]["bias"] == ["crows_pairs=crows.jsonl"]
        assert str(tmp_path) not in json.dumps(vars(row))
    assert base["step_s"] is None and all(row["step_s"] > 0 for row in trained)
    regularised = [row for row in trained if row.contender != "none"]
    assert {row["classes"] for row in trained if row.contender == "none"} == {0}
    assert len({row["classes"] for row in regularised}) == 1 and regularised[0]["classes"] > 1
    assert all(row["labelled"] > 0 for row in regularised if row.contender == "words")
    printed = capsys.readouterr().out
    assert "| gender words, strength 5 |" in printed and "not measured" not in printed


def test_every_arm_starts_from_the_same_weights_and_the_seed_is_the_trainings(benchmark, tmp_path):
    def ends(*arguments):
        before = len(read(tmp_path)) if (tmp_path / "results").exists() else 0
        assert benchmark("--arm", *arguments) == 0
        return [r["figures"] for r in read(tmp_path)[before:] if r["step"] == 2]

    none, words = ends("none", "words")
    (alone,) = ends("words")
    assert alone == words != none
    first, second = ends("none", "--seeds", "2")
    assert first == none != second


def test_collapse_is_that_of_the_gender_words_on_the_held_out_text(crows):
    model, tokenizer = llama(), tiny_words.tokenizer()
    given = subject.Subject(model, tokenizer, "tiny", ROWS[:2], ROWS[2:])
    found = figures.HeldOut(given, [f"crows_pairs={crows}"], 2)(model)
    expected = collapse_metrics(model, ROWS[2:], given.words(), tokenizer=tokenizer, progress=False)
    assert found[UNC3].value == pytest.approx(expected.values["unc3_std"].value)
    assert found[NC3].value == pytest.approx(expected.values["nc3_mean"].value)
    total = count = 0.0
    for row in ROWS[2:]:
        ids = torch.tensor([tokenizer(row["text"])["input_ids"]])
        total += float(model(ids, labels=ids).loss.detach()) * (ids.numel() - 1)
        count += ids.numel() - 1
    assert found[PERPLEXITY].value == pytest.approx(math.exp(total / count), rel=1e-4)


def test_a_masked_model_is_judged_by_what_is_always_hidden():
    model, tokenizer = bert(), tiny_words.tokenizer()
    given = subject.Subject(model, tokenizer, "tiny", ROWS, ROWS)
    found = [figures.HeldOut(given, [], 1) for _ in range(2)]
    for example in found[0]._hidden:
        hidden = example.labels != -100
        assert 1 <= int(hidden.sum()) <= 2
        assert (example.input_ids[hidden] == tokenizer.mask_token_id).all()
    first, second = (held_out(model)[MASKED_LOSS] for held_out in found)
    assert first == second and first.unit == "nats"


def test_bias_is_that_of_gender_over_every_occupation(crows, tmp_path):
    taken = figures.bias_source("crows_pairs", str(crows), 10)
    assert len(taken) == 3 and {row["bias_type"] for row in taken} == {"gender"}
    assert figures.bias_source("crows_pairs", str(crows), 2) == taken[:2]
    for kind, count in ((2, 1), ("age", 0)):  # the hub's copy has numbers for names
        crows.write_text(json.dumps({**taken[0], "bias_type": kind}) + "\n")
        if count:
            assert len(figures.bias_source("crows_pairs", str(crows), 2)) == count
    with pytest.raises(ValueError, match="must have pairs of bias_type 'gender', got none in"):
        figures.bias_source("crows_pairs", str(crows), 2)
    rows = figures.bec_pro_subset(150)
    assert len(rows) == 144 and rows == figures.bec_pro_subset(191)
    assert len({(row["occupation"], row["gender"]) for row in rows}) == 48
    with pytest.raises(ValueError, match="bias-rows must be at least 48, a sentence of each gend"):
        figures.bec_pro_subset(47)


def test_finished_trainings_are_skipped_and_others_are_not(benchmark, tmp_path, monkeypatch):
    def measured(*arguments):
        assert benchmark("--resume", "--arm", "none", "words", *arguments) == 0
        return len(read(tmp_path))

    # The base and two states of each arm; then two states of each arm of the second seed.
    assert [measured(), measured(), measured("--seeds", "2")] == [5, 5, 9]
    # A strength of its own; "none" has none.
    assert measured("--strength", "3") == 11
    assert measured("--steps", "4") == 16
    monkeypatch.setattr(environment, "sources_checksum", lambda: "other sources")
    assert measured() == 21


def test_the_encoder_learns_the_text_and_knows_its_words_swapped_too(monkeypatch):
    monkeypatch.setattr(encoder, "_other_texts", lambda: [])
    monkeypatch.setattr(encoder, "HIDDEN", 32)
    texts = ["she met the Doctor .", "a poet slept ."]
    device = torch.device("cpu")
    state = torch.get_rng_state()

    def loss(steps):
        model, tokenizer = encoder.trained_encoder(texts, ["his aunt"], steps, device)
        assert not model.training
        assert {"[UNK]"}.isdisjoint(tokenizer.tokenize("he met the doctor . her uncle plumber"))
        rows = [{"text": text} for text in texts]
        given = subject.Subject(model, tokenizer, "encoder", rows, rows)
        return figures.HeldOut(given, [], 48)(model)[MASKED_LOSS].value

    untrained, trained = loss(1), loss(30)
    assert trained < untrained - 0.5
    assert torch.equal(torch.get_rng_state(), state)
    assert loss(30) == trained


def test_a_masked_model_is_debiased_by_bec(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "HIDDEN", 32)
    arguments = ["--masked", "--pretraining-steps", "1", "--arm", "words", "--bias", "bec_pro"]
    assert benchmark(*arguments, "--bias-rows", "48") == 0
    base, *_, end = read(tmp_path)
    assert (end["method"], end["strength"], end["seed"]) == ("bec", 100, 0)
    assert "trained from scratch for 1 steps on the embedded text" in end["model"]
    assert list(base["figures"]) == [UNC3, NC3, MASKED_LOSS, BEC]
    assert base["neutral"][BEC] == 0 and base["units"][BEC] == "nats"


def result(arm, seed, step, unc3, bec=0.5, day=2):
    known = next(store.read(store.RESULTS, "debias")).environment
    setup = {
        "strength": 0.0 if arm in ("base", "none") else 10.0, "seed": seed, "step": step,
        "steps": 4, "classes": 9, "labelled": 30 + (seed or 0), "trained_rows": 15,
        "held_out_rows": 5, "held_out_tokens": 60,
    }  # fmt: skip
    metrics = {
        "figures": {UNC3: unc3, BEC: bec}, "units": {UNC3: "", BEC: "nats"},
        "neutral": {UNC3: None, BEC: 0.0}, "step_s": None if arm == "base" else 1.5,
    }  # fmt: skip
    here = known | {"device": "Some CPU", "date": f"2026-01-0{day}"}
    return Record("debias", "tiny, causal", arm, setup, metrics=metrics, environment=here)


def test_eight_seeds_that_agree_are_an_effect():
    rows = [
        result("base", None, 0, 0.0),
        *(result("none", seed, 4, 0.1 * seed) for seed in range(8)),
        *(result("words", seed, 4, 0.1 * seed - 3.0, bec=(-1.0) ** seed) for seed in range(8)),
    ]
    lines = tables.rendered(table.TABLE, rows).splitlines()
    assert lines[4].endswith("| -3 [-3, -3], lower |")
    assert lines[7].endswith(", no effect beyond noise |")
