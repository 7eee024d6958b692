"""Runs whose model stays in its files while the sets are scored, and what is loaded afterwards."""

from __future__ import annotations

import logging

import pytest
import tiny_models
import torch
from tiny_folders import save_model, write_sources

from fastdean.coupling.results.scores import Scores
from fastdean.jobs import run
from fastdean.jobs.coupling.job import Job
from fastdean.masks import NeuronMask
from fastdean.models import loading
from fastdean.models.identity import PassingWeights, model_identity, weights_digest
from fastdean.models.layers.streaming import StreamedModel

QUICK = {"ratio": 0.05, "examples": 5, "eval_examples": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    model = save_model(folder / "model")
    return {"model": str(model), **{n: str(p) for n, p in write_sources(folder).items()}}


@pytest.fixture
def loaded(monkeypatch):
    """The models that were loaded whole."""
    names, real = [], loading.load_model

    def load_model(name, **options):
        names.append(name)
        return real(name, **options)

    monkeypatch.setattr(loading, "load_model", load_model)
    monkeypatch.setattr("fastdean.jobs.session.load_model", load_model)
    return names


def too_large(monkeypatch):
    monkeypatch.setattr(StreamedModel, "fits_in_memory", lambda self: False)


def same_masks(one, other):
    first, second = NeuronMask.from_pretrained(one), NeuronMask.from_pretrained(other)
    assert first.summary().total == second.summary().total and len(first) == len(second) > 0
    for name in first.entries:
        assert torch.equal(first.entries[name].index, second.entries[name].index)
        assert torch.equal(first.entries[name].original, second.entries[name].original)


def test_nothing_is_loaded_whole_where_nothing_is_measured(place, tmp_path, loaded, caplog):
    run(Job(**place, **QUICK, order="batches"), tmp_path / "whole", progress=False)
    assert len(loaded) == 1
    loaded.clear()
    with caplog.at_level(logging.INFO, "fastdean"):
        results = run(Job(**place, **QUICK, order="layers"), tmp_path / "run", progress=False)
    assert loaded == []
    same_masks(tmp_path / "run" / "mask", tmp_path / "whole" / "mask")
    same_masks(tmp_path / "run/controls/released", tmp_path / "whole/controls/released")
    (said,) = [line for line in caplog.messages if "stay in their files" in line]
    assert said.endswith("; nothing is loaded whole, since nothing is to be measured")
    assert any(text.startswith("The control 'random' is left out") for text in results["warnings"])
    steps = [row["step"] for row in results["cost"]]
    named = "score fairness, privacy, general"
    assert steps == ["read data", "load model", "check model", named, "couple"]


def test_the_whole_model_is_loaded_to_be_measured_after_the_scoring(
    place, tmp_path, loaded, monkeypatch, caplog
):
    options = {**QUICK, "eval_examples": 5}
    whole = run(Job(**place, **options, order="batches"), tmp_path / "whole", progress=False)
    loaded.clear()
    saved, real = [], Scores.save_pretrained

    def save_pretrained(self, folder, **others):
        saved.append(list(loaded))
        return real(self, folder, **others)

    monkeypatch.setattr(Scores, "save_pretrained", save_pretrained)
    with caplog.at_level(logging.INFO, "fastdean"):
        found = run(Job(**place, **options, order="layers"), tmp_path / "run", progress=False)
    assert saved == [[], [], []] and len(loaded) == 1
    for key in ("coupling", "margins", "perplexity", "hsic", "findings"):
        assert found[key] == whole[key], key
    (said,) = [line for line in caplog.messages if "stay in their files" in line]
    assert said.endswith("; the whole model is loaded after that")


def test_a_model_that_does_not_fit_is_scored_and_coupled_and_says_why_no_more(
    place, tmp_path, loaded, monkeypatch, caplog
):
    too_large(monkeypatch)
    options = {**QUICK, "eval_examples": 5}
    with caplog.at_level(logging.INFO, "fastdean"):
        results = run(Job(**place, **options), tmp_path / "run", progress=False)
    assert loaded == [] and results["coupling"]["total"]["kept"] > 0
    told = "Nothing was measured: the model is not loaded whole, with 0.00 GB of weights and"
    assert any(text.startswith(told) for text in results["warnings"])
    assert not any("was measured on" in text for text in results["warnings"])
    (said,) = [line for line in caplog.messages if "stay in their files" in line]
    assert "; nothing is measured, since the model is not loaded whole, with" in said


@pytest.mark.parametrize("asked", [{"granularity": "unit", "ratio": 0.2}, {"rule": "random"}])
def test_masks_that_need_the_model_have_it_or_are_refused_before_the_scoring(
    place, tmp_path, loaded, monkeypatch, asked
):
    job = Job(**place, **{**QUICK, **asked}, order="layers")
    run(job, tmp_path / "run", progress=False)
    whole = Job(**place, **{**QUICK, **asked}, order="batches")
    run(whole, tmp_path / "whole", progress=False)
    same_masks(tmp_path / "run" / "mask", tmp_path / "whole" / "mask")
    too_large(monkeypatch)
    option = next(iter(asked))
    with pytest.raises(ValueError, match=f"{option} must be another than .* not loaded whole, got"):
        run(job, tmp_path / "other", progress=False)
    assert not (tmp_path / "other").exists()


def test_the_top_set_of_the_whole_model_loads_it_as_before(place, tmp_path, loaded):
    job = Job(**place, **QUICK, order="layers", scope="model")
    assert run(job, tmp_path / "run", progress=False)["coupling"]["total"]["kept"] > 0
    assert len(loaded) == 1


def test_a_streamed_model_has_the_identity_of_the_loaded_one(place):
    model, tokenizer = loading.load_model(place["model"])
    stream = loading.stream_model(place["model"])
    passing = PassingWeights(stream)
    assert passing.digest is None
    weights = passing.read()
    assert weights == passing.digest == weights_digest(model)
    found = model_identity(stream.model, tokenizer, weights=weights, device=stream.device)
    assert found == model_identity(model, tokenizer)


def test_a_run_goes_on_whether_its_model_is_streamed_or_loaded(
    place, tmp_path, loaded, monkeypatch
):
    """What fits into memory may be another thing when the run is called again."""
    job, real = Job(**place, **{**QUICK, "eval_examples": 5}), NeuronMask.save_pretrained

    def stopped(self, folder, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        too_large(patch)
        patch.setattr(NeuronMask, "save_pretrained", stopped)
        run(job, tmp_path / "run", progress=False)
    assert loaded == [] and real is NeuronMask.save_pretrained
    results = run(job, tmp_path / "run", progress=False)
    assert results["margins"] and len(loaded) == 1
    scored = [row["step"] for row in results["cost"] if row["step"].startswith("score")]
    assert scored == [f"score {n}, by an earlier call" for n in ("fairness", "privacy", "general")]


def test_weights_that_changed_since_they_were_scored_are_not_gone_on_with(
    tmp_path, place, monkeypatch
):
    """Also those that no score is of, and although they are not read before the scoring."""
    save_model(tmp_path / "model")
    job = Job(**{**place, "model": str(tmp_path / "model")}, **QUICK, order="layers")

    def stopped(self, folder, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(NeuronMask, "save_pretrained", stopped)
        run(job, tmp_path / "run", progress=False)
    model = tiny_models.llama()
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="on other input, which differs in model weights"):
        run(job, tmp_path / "run", progress=False)
