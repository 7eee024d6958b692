"""The main job: folders that are refused, runs that stop half-way, and what is measured on what."""

from __future__ import annotations

import errno
import inspect
import json
import logging
import math
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import torch
import tqdm.auto
from tiny_folders import WORDS, rows, save_model, write_jsonl, write_sources
from torch import distributed
from torch.distributed import HashStore, PrefixStore

import fastdean
from fastdean.cli import commands
from fastdean.coupling import order
from fastdean.coupling.layers import by_layers
from fastdean.coupling.results.scores import Scores
from fastdean.coupling.resuming.resumable import Resumable
from fastdean.coupling.sets import RULES
from fastdean.jobs import folder as run_folder
from fastdean.jobs import run, session
from fastdean.jobs.collapse.measuring import CollapseJob
from fastdean.jobs.collapse.training import DebiasJob
from fastdean.jobs.costs import Costs
from fastdean.jobs.coupling import figures, measuring, scoring, steps
from fastdean.jobs.coupling import model as run_model
from fastdean.jobs.coupling.job import DATA_SETS, Job, ScoreJob
from fastdean.jobs.coupling.results import _about_rows
from fastdean.jobs.coupling.scoring import run as run_score
from fastdean.jobs.coupling.split_rows import split_rows
from fastdean.jobs.options import option_fields
from fastdean.masks import NeuronMask
from fastdean.models import loading
from fastdean.models.layers import replay
from fastdean.models.layers import windows as model_windows
from fastdean.models.layers.streaming import StreamedModel
from fastdean.models.ranks import earlier_starts

OPTIONS = {"ratio": 0.05, "examples": 5, "eval_examples": 5}
# For what does not hang on the measurements, which take most of a tiny run.
QUICK = {**OPTIONS, "eval_examples": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model and three sources of 10 rows."""
    folder = tmp_path_factory.mktemp("place")
    return {"model": str(save_model(folder / "model")), **as_text(write_sources(folder))}


def as_text(paths):
    return {name: str(path) for name, path in paths.items()}


@pytest.fixture
def job(place):
    return Job(**place, **QUICK)


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """The run folder of an uninterrupted run, and its results; not to be written to."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, run(Job(**place, **QUICK), out, progress=False)


@pytest.fixture(scope="module")
def measured(place, tmp_path_factory):
    """The same with measurements."""
    out = tmp_path_factory.mktemp("measured") / "run"
    return out, run(Job(**place, **OPTIONS), out, progress=False)


def lasting(results):
    """What must be the same in a run that was stopped and resumed."""
    return {k: v for k, v in results.items() if k not in ("created", "cost", "command", "manifest")}


def tree(folder):
    """Relative path -> content of every file."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture
def scored(monkeypatch):
    """The names of the data sets that were scored; `scored.fail` maps a name to an error."""

    class Record(list):
        fail = {}

    record, real = Record(), steps.score_sets

    def score_sets(model, loaders, *, finished, **options):
        def noted(name, scores):
            if f"score {name}" in record.fail:
                raise record.fail[f"score {name}"]
            record.append(f"score {name}")
            finished(name, scores)

        return real(model, loaders, finished=noted, **options)

    monkeypatch.setattr(steps, "score_sets", score_sets)
    return record


def nothing_loaded(monkeypatch):
    def load_model(*args, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(session, "load_model", load_model)
    monkeypatch.setattr(run_model, "load_or_stream", load_model)


def test_a_run_writes_its_parts_and_its_results(measured):
    out, results = measured
    assert json.loads((out / "results.json").read_text()) == results
    assert NeuronMask.from_pretrained(out / "mask").manifest["rule"] == "paper"
    for rule in ("random", "released"):
        assert NeuronMask.from_pretrained(out / "controls" / rule).manifest["rule"] == rule
    assert len(Scores.from_pretrained(out / "scores" / "privacy")) == 6
    page = (out / "report.html").read_text()
    for sentence in results["findings"]:
        assert sentence.split(",")[0] in page
    assert results["margins"]["privacy"]["pairs"] == 5
    assert results["hsic"]["n"] == 5 and len(results["overlap"]) == 11
    assert json.loads((out / "fastdean_run.json").read_text())["finished"] is True
    assert not [name for name in tree(out) if name.endswith(".tmp")]


def test_fewer_measured_rows_than_asked_for_are_told(place, measured):
    told = "The set fairness was measured on 5 rows, fewer than the 6 asked for: there are no more."
    job = Job(**place, **{**OPTIONS, "eval_examples": 6})
    rows = {name: split_rows(name, job) for name in DATA_SETS}
    assert told in list(_about_rows(job, rows))
    assert not [text for text in measured[1]["warnings"] if "asked for" in text]


@pytest.mark.parametrize("kind", [Job, CollapseJob, DebiasJob])
def test_a_dtype_has_one_name_in_every_job(kind):
    asked = {"model": "m", "text": "t"}
    if kind is Job:
        asked = {"model": "m", "fairness": "f", "privacy": "p", "general": "g"}
    if kind is DebiasJob:
        asked = {"model": "m", "method": "causal"}
    assert kind(**asked, dtype="bf16") == kind(**asked, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"dtype must be one of .*bfloat16.*bf16.*, got 'int8'"):
        kind(**asked, dtype="int8")


def test_the_mask_is_that_of_score_and_couple_by_hand(place, finished):
    from fastdean import couple, score
    from fastdean.data.sources import load_rows, sample_rows
    from fastdean.models.loading import load_model

    model, tokenizer = load_model(place["model"], progress=False)
    fair, priv, gen = (
        score(model, sample_rows(load_rows(place[name]), 5, 0)[0], tokenizer=tokenizer)
        for name in ("fairness", "privacy", "general")
    )
    assert NeuronMask.from_pretrained(finished[0] / "mask") == couple(
        fair, priv, general=gen, ratio=0.05
    )


def test_an_equal_job_gives_equal_results(place, measured, tmp_path):
    again = run(Job(**place, **OPTIONS), tmp_path / "again", progress=False)
    assert lasting(again) == lasting(measured[1])


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ("score privacy", KeyboardInterrupt()),
        ("score general", OSError(errno.ENOSPC, "No space left")),
    ],
)
def test_a_stopped_run_is_resumed_with_the_scores_that_are_there(
    job, finished, scored, tmp_path, step, error
):
    scored.fail = {step: error}
    with pytest.raises(type(error)):
        run(job, tmp_path / "run", progress=False)
    done = list(scored)
    scored.clear()
    scored.fail = {}
    results = run(job, tmp_path / "run", progress=False)
    assert done + scored == ["score fairness", "score privacy", "score general"]
    assert step in scored and "score fairness" not in scored
    assert lasting(results) == lasting(finished[1])
    steps = [row["step"] for row in results["cost"]]
    assert "score fairness, by an earlier call" in steps


def test_an_interrupt_while_measuring_restores_the_model_and_loses_nothing(
    place, measured, scored, tmp_path, monkeypatch
):
    """The mask is on the model at that moment."""
    job = Job(**place, **OPTIONS)
    models, real = [], figures.response_margins

    def response_margins(model, *args, **options):
        models.append(model)
        if len(models) == 3:
            raise KeyboardInterrupt
        return real(model, *args, **options)

    monkeypatch.setattr(figures, "response_margins", response_margins)
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path / "run", progress=False)
    expected = tiny_models.llama().state_dict()
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, expected[name]), name

    # As if another version had left other masks and half a control there.
    shutil.rmtree(tmp_path / "run" / "controls" / "random")
    NeuronMask({}).save_pretrained(tmp_path / "run" / "mask", overwrite=True)
    scored.clear()
    assert lasting(run(job, tmp_path / "run", progress=False)) == lasting(measured[1])
    assert scored == []
    assert len(NeuronMask.from_pretrained(tmp_path / "run" / "mask")) > 0


FAILING_WRITES = {
    "scores": ("fastdean.files.storage._write_shard", "scores"),
    "mask": ("fastdean.files.storage._write_shard", "mask"),
    "results": ("fastdean.jobs.session.write_json_atomic", "results.json"),
    "report": ("fastdean.jobs.session.write_report", "report.html"),
}


@pytest.mark.parametrize("part", FAILING_WRITES)
def test_a_full_disk_leaves_what_was_finished_and_the_same_call_goes_on(
    job, finished, scored, tmp_path, monkeypatch, part
):
    import importlib

    target, fragment = FAILING_WRITES[part]
    module_name, _, name = target.rpartition(".")
    real = getattr(importlib.import_module(module_name), name)

    def write(*args, **options):
        # The second one, where there are several.
        if any(fragment in os.fspath(a) for a in args if isinstance(a, os.PathLike)):
            writes.append(1)
            if len(writes) == (2 if part in ("scores", "mask") else 1):
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **options)

    writes = []
    monkeypatch.setattr(target, write)
    out = tmp_path / "run"
    with pytest.raises(OSError, match="No space left"):
        run(job, out, progress=False)
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]
    assert not (out / "report.html").exists()
    # Whatever is there is whole.
    for folder in (out / "scores").iterdir():
        Scores.from_pretrained(folder)
    before = len(scored)
    assert lasting(run(job, out, progress=False)) == lasting(finished[1])
    assert "score fairness" not in scored[before:]


@pytest.mark.parametrize("target", ["os.fsync", "safetensors.torch.save_file"])
def test_a_disk_that_was_full_from_the_start_leaves_no_folder(job, tmp_path, monkeypatch, target):
    def write(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(target, write)
    with pytest.raises(OSError, match="No space left"):
        run(job, tmp_path / "run", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_was_full_from_the_start_leaves_an_empty_folder_to_any_job(
    place, job, tmp_path, monkeypatch
):
    def save_file(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", save_file)
        with pytest.raises(OSError, match="No space left"):
            run(job, tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []
    other = Job(**place, **QUICK, seed=1)
    assert run(other, tmp_path, progress=False)["options"]["seed"] == 1


def test_weights_that_are_offloaded_are_refused_before_anything_is_scored(
    job, scored, tmp_path, monkeypatch
):
    """Masks are applied to weights in memory; the device "auto" may leave some elsewhere."""
    from accelerate import cpu_offload

    real = loading.load_model

    def load_model(*args, **options):
        model, tokenizer = real(*args, **options)
        cpu_offload(model.model.layers[1], execution_device=torch.device("cpu"))
        return model, tokenizer

    monkeypatch.setattr(loading, "load_model", load_model)
    with pytest.raises(
        ValueError,
        match=r"device must hold .* offloads 3 of 6 matrices, such as model\.layers\.1\..*; use a",
    ):
        run(job, tmp_path / "run", progress=False)
    assert scored == [] and list(tmp_path.iterdir()) == []


def test_the_revision_of_the_model_is_loaded_and_recorded(place, tmp_path, monkeypatch):
    real, asked = session.load_model, []

    def load_model(name, *, revision, **options):
        asked.append(revision)
        return real(name, **options)

    monkeypatch.setattr(session, "load_model", load_model)
    quick = {**QUICK, "order": "batches"}
    results = run(Job(**place, **quick, revision="v2"), tmp_path / "run", progress=False)
    assert asked == ["v2"]
    assert results["model"]["revision"] == results["manifest"]["job"]["revision"] == "v2"
    mask = NeuronMask.from_pretrained(tmp_path / "run" / "mask")
    assert mask.manifest["first"]["model"]["revision"] == "v2"
    with pytest.raises(ValueError, match="holds another run"):
        run(Job(**place, **quick, revision="v3"), tmp_path / "run", progress=False)


def test_a_run_that_is_refused_leaves_no_folder(place, tmp_path):
    with pytest.raises(ValueError, match="target_modules must match at least one"):
        run(Job(**place, **QUICK, target_modules="no_such_layer"), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_taken(job, finished, tmp_path):
    (tmp_path / "run").mkdir()
    assert lasting(run(job, tmp_path / "run", progress=False)) == lasting(finished[1])


def test_a_finished_run_is_refused_before_any_work_and_kept(job, finished, monkeypatch):
    nothing_loaded(monkeypatch)
    before = tree(finished[0])
    with pytest.raises(ValueError, match="holds this run, finished; see its report.html, or pass"):
        run(job, finished[0], progress=False)
    assert tree(finished[0]) == before


def test_another_run_is_refused_before_any_work_and_kept(place, finished, monkeypatch):
    nothing_loaded(monkeypatch)
    before = tree(finished[0])
    with pytest.raises(
        ValueError, match="another run, which differs in seed=0 .now 1.; choose another folder"
    ):
        run(Job(**place, **QUICK, seed=1), finished[0], progress=False)
    assert tree(finished[0]) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_other_origin_are_refused_before_any_work(job, tmp_path, monkeypatch, overwrite):
    nothing_loaded(monkeypatch)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="which holds other files; choose another"):
        run(job, tmp_path, overwrite=overwrite)
    assert tree(tmp_path) == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_and_a_folder_below_a_file_are_refused(job, tmp_path, overwrite):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="out must be a new or empty folder, got .* is a file"):
            run(job, out, overwrite=overwrite)


def test_overwrite_replaces_another_run(place, finished, scored, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "run")
    (out / "controls" / "stale").mkdir()
    shutil.copytree(out / "mask", out / "controls" / "stale", dirs_exist_ok=True)
    (out / ".results.json.1a2b3c4d.tmp").write_text("left by a crash")
    results = run(Job(**place, **QUICK, seed=1), out, overwrite=True, progress=False)
    assert len(scored) == 3
    assert results["options"]["seed"] == 1
    assert json.loads((out / "results.json").read_text()) == results
    assert sorted(path.name for path in (out / "controls").iterdir()) == ["random", "released"]
    assert not list(out.glob(".*"))


@pytest.mark.parametrize(
    "foreign",
    [
        "notes.txt",
        ".notes.tmp",
        "scores/mine.csv",
        "scores/.notes.tmp",
        "mask/mine.csv",
        "controls/mine/deep.csv",
    ],
)
def test_overwrite_never_deletes_what_lies_beside_a_run(
    job, finished, tmp_path, monkeypatch, foreign
):
    nothing_loaded(monkeypatch)
    out = shutil.copytree(finished[0], tmp_path / "run")
    (out / foreign).parent.mkdir(exist_ok=True)
    (out / foreign).write_text("mine")
    before = tree(out)
    with pytest.raises(
        ValueError, match=f"that FastDEAN did not write: .*{foreign[:4]}.*; move them"
    ):
        run(job, out, overwrite=True, progress=False)
    assert tree(out) == before


@pytest.mark.parametrize("moved", ["scores", "scores/privacy", "mask", "controls/random"])
def test_overwrite_refuses_parts_that_were_moved_to_another_place(
    job, finished, tmp_path, monkeypatch, moved
):
    nothing_loaded(monkeypatch)
    out = shutil.copytree(finished[0], tmp_path / "run")
    elsewhere = (out / moved).rename(tmp_path / "elsewhere")
    (out / moved).symlink_to(elsewhere)
    before = tree(out), tree(elsewhere)
    with pytest.raises(ValueError, match=f"did not write: {moved}; move them"):
        run(job, out, overwrite=True, progress=False)
    assert (tree(out), tree(elsewhere)) == before


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_kill_while_a_run_is_removed_does_not_stop_the_next_overwrite(
    job, finished, tmp_path, monkeypatch, after
):
    out = shutil.copytree(finished[0], tmp_path / "run")
    calls, real = [], shutil.rmtree

    def rmtree(folder, **options):
        calls.append(folder)
        if len(calls) > after:
            # As SIGKILL leaves it: half of the files are gone.
            for file in [file for file in folder.rglob("*") if file.is_file()][::2]:
                file.unlink()
            raise KeyboardInterrupt
        real(folder, **options)

    monkeypatch.setattr(run_folder.shutil, "rmtree", rmtree)
    with pytest.raises(KeyboardInterrupt):
        run_folder._remove_run(out)
    monkeypatch.undo()
    results = run(job, out, overwrite=True, progress=False)
    assert json.loads((out / "results.json").read_text()) == results
    assert sorted(tree(out)) == sorted(tree(finished[0]))


def test_a_kill_while_a_run_begins_does_not_stop_the_next(job, finished, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".fastdean_run.json.1a2b3c4d.tmp").write_text("{")
    run(job, out, progress=False)
    assert sorted(tree(out)) == sorted(tree(finished[0]))


def test_an_old_run_stays_until_there_is_something_to_replace_it_with(
    place, finished, scored, tmp_path
):
    out = shutil.copytree(finished[0], tmp_path / "run")
    scored.fail = {"score fairness": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run(Job(**place, **QUICK, seed=1), out, overwrite=True, progress=False)
    assert tree(out) == tree(finished[0])


def test_rows_that_changed_since_are_not_resumed(place, scored, tmp_path):
    sources = as_text(write_sources(tmp_path))
    job = Job(**{**place, **sources}, **QUICK)
    scored.fail = {"score general": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path / "run", progress=False)
    write_jsonl(tmp_path / "privacy.jsonl", rows(10, 99, unsafe=True))
    with pytest.raises(
        ValueError, match="on other input, which differs in privacy rows; choose another"
    ):
        run(job, tmp_path / "run", progress=False)


def test_the_folder_of_the_model_is_only_read(place, tmp_path):
    model = save_model(tmp_path / "model")
    job = Job(**{**place, "model": str(model)}, **QUICK)
    with pytest.raises(ValueError, match="out must be a folder outside of model"):
        run(job, model / "inner", progress=False)
    assert not (model / "inner").exists()


def test_a_model_that_changed_since_is_not_mixed_with_its_scores(place, scored, tmp_path):
    model = save_model(tmp_path / "model")
    job = Job(**{**place, "model": str(model)}, **QUICK)
    scored.fail = {"score general": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path / "run", progress=False)
    tiny_models.llama(seed=1).save_pretrained(model)
    scored.fail = {}
    with pytest.raises(ValueError, match="which differs in model weights; choose"):
        run(job, tmp_path / "run", progress=False)


def test_truncated_scores_of_an_earlier_call_are_named(job, scored, tmp_path):
    scored.fail = {"score privacy": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path / "run", progress=False)
    file = tmp_path / "run" / "scores" / "fairness" / "scores.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="scores.safetensors' must be a whole safetensors file"):
        run(job, tmp_path / "run", progress=False)


BAD_OPTIONS = {
    "rule": ("best", f"rule must be one of {', '.join(RULES)}, got 'best'"),
    "granularity": ("head", "granularity must be one of weight, unit, got 'head'"),
    "signs": (
        "both",
        "signs must be one of any, same, opposite, got 'both'; leave it out for 'any'",
    ),
    "scope": ("layer", "scope must be one of matrix, model, got 'layer'"),
    "template": ("alpaca", "template must be one of raw, chat, published, got 'alpaca'"),
    "ratio": (1.5, "ratio must be above 0 and at most 1, got 1.5"),
    "min_k": (-1, "min_k must be at least 0, got -1"),
    "eval_examples": (-1, "eval_examples must be at least 0, got -1"),
    "examples": (0, "examples must be at least 1, got 0"),
    "seed": (-3, "seed must be at least 0, got -3"),
    "scale": (float("nan"), "scale must be finite, got nan"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_options_out_of_range_are_refused_at_once(place, name):
    value, text = BAD_OPTIONS[name]
    with pytest.raises(ValueError, match=text):
        Job(**place, **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("ratio", "0.1", "ratio must be a number, got '0.1'; give a number"),
        ("examples", "12", "examples must be an integer, got '12'; give an integer"),
        ("seed", True, "seed must be an integer, got True; give an integer"),
        ("memory_budget", "16GB", "memory_budget must be an integer, got '16GB'; give an integer"),
    ],
)
def test_an_option_that_is_no_number_is_refused_at_once(place, name, value, text):
    with pytest.raises(TypeError, match=f"^{text}"):
        Job(**place, **{name: value})
    assert repr(Job(**place, memory_budget=16e9).memory_budget) == "16000000000"


def test_a_ratio_that_selects_nothing_is_refused_before_scoring(place, scored, tmp_path):
    job = Job(**place, examples=5, ratio=1e-6)
    with pytest.raises(
        ValueError,
        match="none of the 2,048 of the largest matrix; the smallest that would is 0.000",
    ) as caught:
        run(job, tmp_path / "run", progress=False)
    assert scored == [] and list(tmp_path.iterdir()) == []
    smallest = float(str(caught.value).split("would is ")[1].split(",")[0])
    assert int(smallest * 2048) == 1 and int((smallest - 1e-5) * 2048) == 0


def test_a_ratio_that_selects_nothing_is_refused_before_the_model_is_loaded(
    place, tmp_path, monkeypatch
):
    def loaded(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(run_model.RunModel, "open", loaded)
    job = Job(**place, examples=5, ratio=1e-6)
    with pytest.raises(ValueError, match="none of the 2,048 of the largest matrix"):
        run(job, tmp_path / "run", progress=False)
    for fine in ({"ratio": 1e-6, "min_k": 1}, {"ratio": 0.5}):
        with pytest.raises(AssertionError, match="the model was loaded"):
            run(Job(**place, examples=5, **fine), tmp_path / "run", progress=False)


def test_min_k_keeps_as_many_scores_as_it_needs(place, tmp_path):
    job = Job(**place, examples=5, eval_examples=0, ratio=1e-6, min_k=40)
    results = run(job, tmp_path / "run", progress=False)
    assert {row["k"] for row in results["coupling"]["rows"]} == {40}


def test_the_scope_of_the_whole_model(place, tmp_path):
    results = run(Job(**place, **OPTIONS, scope="model"), tmp_path / "run", progress=False)
    assert results["coupling"]["total"]["first"] == int(0.05 * 6 * 2048)
    assert "overlap" not in results
    assert any("overlap over ratios is left out" in text for text in results["warnings"])
    # Its matrices have top sets of different sizes, which this rule cannot compare.
    assert any("control 'released' is left out: rule 'rel" in text for text in results["warnings"])
    assert set(results["margins"]["fairness"]["masks"]) == {"paper", "random"}


def test_signs_choose_what_the_run_edits_and_are_counted(place, tmp_path):
    found = {}
    for signs in ("same", "opposite"):
        results = run(Job(**place, **QUICK, signs=signs), tmp_path / signs, progress=False)
        total, sentence = results["coupling"]["total"], results["findings"][0]
        assert total["same"] + total["opposite"] == total["coupled"] > 0
        assert f"zeroing {total['same']} of the {total['coupled']} weights in both" in sentence
        found[signs] = NeuronMask.from_pretrained(tmp_path / signs / "mask")
        random = NeuronMask.from_pretrained(tmp_path / signs / "controls" / "random")
        assert len(random) == len(found[signs]) == total["kept"] <= total[signs]
        assert NeuronMask.from_pretrained(tmp_path / signs / "controls" / "released")
    plain = run(Job(**place, **QUICK), tmp_path / "any", progress=False)
    assert "same" not in plain["coupling"]["total"]
    assert sum(map(len, found.values())) == plain["coupling"]["total"]["kept"]
    with pytest.raises(
        ValueError, match="^signs must be 'any' with rule 'released', which selects"
    ):
        Job(**place, **QUICK, signs="same", rule="released")


def test_units(place, tmp_path):
    job = Job(**place, **{**QUICK, "ratio": 0.3}, granularity="unit")
    results = run(job, tmp_path / "run", progress=False)
    assert results["coupling"]["total"]["first"] == 2 * int(0.3 * 64)
    kept = results["coupling"]["total"]["kept"]
    assert len(NeuronMask.from_pretrained(tmp_path / "run" / "mask")) == kept * 32 > 0


def test_a_number_that_nobody_asked_for_is_told_nobody(place, caplog):
    job = Job(**place)
    with caplog.at_level(logging.WARNING, logger="fastdean"):
        rows = {name: split_rows(name, job) for name in DATA_SETS}
    assert [len(split.scored) for split in rows.values()] == [10, 10, 10]
    told = list(_about_rows(job, rows))
    assert "The set fairness was measured on 10 rows: there are no more." in told
    assert not caplog.records and not [text for text in told if "asked for" in text]


def test_rows_that_are_too_few_are_all_taken_with_a_warning(place, tmp_path, caplog):
    job = Job(**place, **{**OPTIONS, "examples": 50})
    with caplog.at_level(logging.WARNING, logger="fastdean"):
        results = run(job, tmp_path / "run", progress=False)
    assert "has 10 rows, fewer than the 50 asked for: all are taken" in caplog.text
    assert results["data"]["fairness"]["examples"] == 10
    assert (
        "The set fairness has 10 rows, fewer than the 50 asked for: all were scored."
        in (results["warnings"])
    )
    assert any(
        "privacy rows that were measured on are scored ones" in w for w in results["warnings"]
    )


def test_what_is_measured_on_shares_no_prompt_with_what_is_scored(place, tmp_path):
    """Data sets hold several answers to a prompt."""
    doubled = rows(6, 0, unsafe=True)
    doubled += [{**row, "response": WORDS[7]} for row in doubled]
    source = write_jsonl(tmp_path / "doubled.jsonl", doubled)
    split = split_rows("fairness", Job(**{**place, "fairness": str(source)}, **OPTIONS))
    scored = {row["prompt"] for _, row in split.scored}
    measured = {row["prompt"] for _, row in split.measured}
    assert split.held_out and measured and not scored & measured


def test_without_pairs_only_perplexity_is_measured(place, tmp_path):
    plain = str(write_jsonl(tmp_path / "plain.jsonl", rows(10, 3, unsafe=False)))
    job = Job(**{**place, "fairness": plain, "privacy": plain}, **OPTIONS)
    results = run(job, tmp_path / "run", progress=False)
    assert results["margins"] == {} and "hsic" not in results
    assert results["perplexity"]["masks"]["paper"]["value"] > 1
    for topic in ("fairness", "privacy"):
        assert (
            f"No {topic} rows have an unsafe response beside the safe one: not measured on {topic}."
            in results["warnings"]
        )


def test_rows_of_text_are_scored_and_measured_as_general(place, tmp_path):
    text = [{"text": row["response"] + " w1 w2"} for row in rows(10, 5, unsafe=False)]
    source = str(write_jsonl(tmp_path / "text.jsonl", text))
    results = run(Job(**{**place, "general": source}, **OPTIONS), tmp_path / "run", progress=False)
    assert results["perplexity"]["tokens"] > 5
    (alike,) = (warning for warning in results["warnings"] if "general" in warning)
    assert "general text (5)" in alike


def test_nothing_is_measured_where_nothing_is_asked_for(job, tmp_path):
    results = run(job, tmp_path / "run", progress=False)
    assert results["warnings"] == ["Nothing was measured: eval_examples is 0."]
    assert results["findings"][2] == "Side effects were not measured."


def test_a_masked_model_is_scored_but_has_no_margins(place, tmp_path):
    bert = str(save_model(tmp_path / "bert", tiny_models.bert))
    results = run(Job(**{**place, "model": bert}, **OPTIONS), tmp_path / "run", progress=False)
    assert results["coupling"]["total"]["kept"] > 0
    assert results["margins"] == {} and "perplexity" not in results
    text = " ".join(results["warnings"])
    assert "Margins and perplexity were not measured: a masked language model sees" in text
    assert "scored on responses that it sees" in text
    assert results["findings"][1].startswith("Awareness was not measured")


def bad_source(place, tmp_path, name, row, position):
    content = rows(10, 0, unsafe=name != "general")
    content[position] |= row
    source = write_jsonl(tmp_path / f"bad_{name}.jsonl", content)
    return Job(**{**place, name: str(source)}, **{**OPTIONS, "examples": 10})


@pytest.mark.parametrize("name", ["fairness", "general"])
@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"response": ""}, "must have at least one target token, got none; its response is empty"),
        ({"response": "w " * 200}, r"must have at most 128 tokens .*; cut it with max_length"),
        (
            {"prompt": "", "response": "w1"},
            "must have at least one target token after its first token",
        ),
    ],
)
def test_a_row_that_cannot_be_scored_is_named_before_anything_is_scored(
    place, scored, tmp_path, name, row, text
):
    job = bad_source(place, tmp_path, name, row, position=3)
    with pytest.raises(ValueError, match=f"{name} '.*bad_{name}.jsonl': row 4 {text}"):
        run(job, tmp_path / "run", progress=False)
    assert scored == []


def test_a_model_with_nan_names_the_example(place, tmp_path):
    def broken():
        model = tiny_models.llama()
        model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
        return model

    model = str(save_model(tmp_path / "model", broken))
    with pytest.raises(ValueError, match=r"loss must be finite, got nan for example \d+; check"):
        run(Job(**{**place, "model": model}, **QUICK), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_figure_that_cannot_be_taken_does_not_cost_the_others(place, tmp_path, monkeypatch):
    def layer_dependence(*args, **options):
        raise ValueError("x must have a positive median distance")

    monkeypatch.setattr(measuring, "layer_dependence", layer_dependence)
    results = run(Job(**place, **OPTIONS), tmp_path / "run", progress=False)
    assert "HSIC was not measured: x must have a positive median distance." in results["warnings"]
    assert results["margins"]["fairness"]["masks"]


def infinite_margin(found):
    found.values[0] = -math.inf


def nan_perplexity(found):
    found.nll_sums[0] = math.nan


def nan_edited_perplexity(found):
    nan_perplexity(found[0])


def no_states(found):
    raise ValueError("model must return hidden states when asked to, got none")


# What fails on which call (first the model as it came), what is said, and what the results lack.
UNMEASURABLE = {
    "as it came": [
        (
            ("response_margins", 1, infinite_margin),
            "The fairness margin was not measured: log-probabilities must be finite, got others "
            "for 1 of 5 pairs; another dtype may hold them.",
            ("margins", "fairness"),
        ),
        (
            ("perplexity", 1, nan_perplexity),
            "Perplexity was not measured: perplexity must be finite, got nan; another dtype may "
            "hold the log-probabilities.",
            ("perplexity",),
        ),
        (
            ("last_token_states", 1, no_states),
            "HSIC was not measured: model must return hidden states when asked to, got none.",
            ("hsic",),
        ),
    ],
    "under the mask": [
        (
            ("response_margins", 3, infinite_margin),
            "The fairness margin under 'paper' was not measured: log-probabilities must be finite, "
            "got others for 1 of 5 pairs; another dtype may hold them.",
            ("margins", "fairness", "masks", "paper"),
        ),
        (
            ("perplexity_and_divergence", 1, nan_edited_perplexity),
            "Perplexity under 'paper' was not measured: perplexity must be finite, got nan; "
            "another dtype may hold the log-probabilities.",
            ("perplexity", "masks", "paper"),
        ),
        (
            ("last_token_states", 3, no_states),
            "HSIC under 'paper' was not measured: model must return hidden states when asked to, "
            "got none.",
            ("hsic",),
        ),
    ],
}


def without_holm(table):
    """Without the adjusted p-values, which hang on the others of the family."""
    if not isinstance(table, dict):
        return table
    return {key: without_holm(value) for key, value in table.items() if key != "p_holm"}


@pytest.mark.parametrize("model", UNMEASURABLE)
def test_what_the_model_gives_no_number_for_is_left_out_with_a_warning(
    place, measured, tmp_path, monkeypatch, model
):
    def spoiling(function, number, spoil):
        calls, real = [], getattr(figures, function)

        def spoiled(*args, **options):
            found = real(*args, **options)
            calls.append(function)
            if len(calls) == number:
                spoil(found)
            return found

        monkeypatch.setattr(figures, function, spoiled)

    expected = json.loads(json.dumps(measured[1]))
    for spoiled, _, (*path, last) in UNMEASURABLE[model]:
        spoiling(*spoiled)
        table = expected
        for key in path:
            table = table[key]
        del table[last]
    out = shutil.copytree(measured[0], tmp_path / "run")
    state = json.loads((out / "fastdean_run.json").read_text()) | {"finished": False}
    (out / "fastdean_run.json").write_text(json.dumps(state))
    results = run(Job(**place, **OPTIONS), out, progress=False)

    said = [text for _, text, _ in UNMEASURABLE[model]]
    before = measured[1]["warnings"]
    assert results["warnings"][: len(before)] == before
    assert sorted(results["warnings"][len(before) :]) == sorted(said)
    for name in ("margins", "perplexity", "hsic"):
        assert without_holm(results.get(name)) == without_holm(expected.get(name))
    assert results["tests"] == measured[1]["tests"]
    assert (out / "report.html").is_file()


def test_the_memory_of_a_step_is_the_models_devices(monkeypatch):
    def used(device):
        return {0: 5, 1: 7}[device.index]

    def lying_on(*devices):
        parameters = [SimpleNamespace(device=torch.device(device)) for device in devices]
        return SimpleNamespace(parameters=lambda: iter(parameters))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", used)
    costs = Costs()
    for name, model in (
        ("cpu", lying_on("cpu")),
        ("gpus", lying_on("cuda:0", "cuda:1", "cuda:0", "meta")),
    ):
        costs.watch(model)
        with costs.step(name, tokens=3):
            pass
    on_cpu, on_gpus = costs.steps
    # A process with torch loaded takes more than this.
    assert on_cpu["peak_bytes"] > 50_000_000
    assert on_gpus["peak_bytes"] == 12 and on_gpus["tokens"] == 3


def test_each_step_is_announced_before_it_begins_and_titles_its_bars(
    place, tmp_path, monkeypatch, capsys
):
    titles = []

    class Bar(tqdm.auto.tqdm):
        def __init__(self, *args, desc=None, **options):
            titles.append(desc)
            super().__init__(*args, desc=desc, **options)

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    # "auto" does not know beforehand how many steps there are.
    run(Job(**place, **OPTIONS, order="batches"), tmp_path / "run", progress=True)
    lines = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("fastdean: step")
    ]
    names = ["read data", "load model", "check model", *(f"score {name}" for name in DATA_SETS)]
    names += ["couple", "measure unmasked model"]
    names += [f"measure {rule} mask" for rule in ("paper", "random", "released")]
    steps = [f"step {n} of {len(names)}, {name}" for n, name in enumerate(names, start=1)]
    assert lines == [f"fastdean: {step}" for step in steps]
    assert {steps[3], f"{steps[9]}: margins", f"{steps[8]}: hidden states"} <= {*titles}
    assert all(title.startswith("step ") for title in titles)


@pytest.fixture
def windows(monkeypatch):
    """How often the weights of each layer were brought in, from memory or from their files."""
    entered, real, read = {}, model_windows.weights_in, StreamedModel._in

    def read_in(self, window):
        if window in self.layers:
            entered[window] = entered.get(window, 0) + 1
        return read(self, window)

    def weights_in(layer, there=None):
        entered[id(layer)] = entered.get(id(layer), 0) + 1
        return real(layer, there)

    monkeypatch.setattr(model_windows, "weights_in", weights_in)
    monkeypatch.setattr(StreamedModel, "_in", read_in)
    return entered


def little_memory(monkeypatch):
    """So that "auto" takes the order of the layers."""
    monkeypatch.setattr(order, "available_memory", lambda device: 200_000)


def scoring_steps(capsys):
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if re.fullmatch(r"fastdean: step [^:]*, score [^:]*", line)]


@pytest.mark.parametrize("by", ["layers", "auto"])
def test_all_data_sets_take_one_sweep_by_layers(
    place, finished, windows, tmp_path, monkeypatch, capsys, by
):
    little_memory(monkeypatch)
    results = run(Job(**place, **QUICK, order=by), tmp_path / "run", progress=True)
    assert set(windows.values()) == {2} and len(windows) == 2
    assert results["coupling"] == finished[1]["coupling"]
    assert results["overlap"] == finished[1]["overlap"]
    for name in DATA_SETS:
        found, expected = (
            Scores.from_pretrained(folder / "scores" / name)
            for folder in (tmp_path / "run", finished[0])
        )
        assert all(torch.equal(found.index(each), expected.index(each)) for each in expected)
        assert found.manifest["order"]["by"] == "layers"
        assert found.manifest["data"] == expected.manifest["data"]
    named = "score fairness, privacy, general"
    # Nothing is to be measured, and a streamed model not loaded: what is left is to couple.
    assert scoring_steps(capsys) == [f"fastdean: step 4 of 5, {named}"]
    (row,) = [row for row in results["cost"] if row["step"].startswith("score")]
    tokens = sum(data["tokens"] for data in results["data"].values())
    assert row["step"] == named and row["tokens"] == tokens and row["seconds"] > 0
    assert len(results["cost"]) == 5


def test_auto_that_takes_the_batches_has_a_step_for_each_data_set(
    place, finished, windows, tmp_path, capsys
):
    results = run(Job(**place, **QUICK, order="auto"), tmp_path / "run", progress=True)
    assert not windows and results["coupling"] == finished[1]["coupling"]
    names = [f"score {name}" for name in DATA_SETS]
    expected = [f"fastdean: step {n} of 7, {name}" for n, name in enumerate(names, 4)]
    assert scoring_steps(capsys) == expected
    costs = {row["step"]: row["tokens"] for row in results["cost"]}
    assert [costs[name] for name in names] == [results["data"][s]["tokens"] for s in DATA_SETS]
    assert len(costs) == 7


def test_auto_that_must_take_the_batches_after_all_counts_its_steps_anew(
    place, finished, tmp_path, monkeypatch, capsys
):
    def sweep(self):
        raise replay.NotByLayers("model.layers.1 must compute the same")

    little_memory(monkeypatch)
    monkeypatch.setattr(by_layers.Sweep, "run", sweep)
    results = run(Job(**place, **QUICK, order="auto"), tmp_path / "run", progress=True)
    assert results["coupling"] == finished[1]["coupling"]
    expected = ["step 4 of 5, score fairness, privacy, general"]
    expected += [f"step {n} of 7, score {name}" for n, name in enumerate(DATA_SETS, 4)]
    assert scoring_steps(capsys) == [f"fastdean: {step}" for step in expected]
    assert len(results["cost"]) == 7


@pytest.mark.parametrize("by", ["layers", "auto"])
def test_a_sweep_whose_scores_could_not_be_saved_is_not_run_again(
    place, finished, windows, tmp_path, monkeypatch, capsys, by
):
    little_memory(monkeypatch)
    job, real = Job(**place, **QUICK, order=by), Scores.save_pretrained

    def save_pretrained(self, folder, **options):
        if folder.name == "privacy":
            raise OSError(errno.ENOSPC, "No space left")
        return real(self, folder, **options)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Scores, "save_pretrained", save_pretrained)
        run(job, tmp_path / "run", progress=False)
    assert [path.name for path in (tmp_path / "run" / "scores").iterdir()] == ["fairness"]
    windows.clear()
    results = run(job, tmp_path / "run", progress=True)
    # Of a streamed model the first layer is read to try the hooks, and all to compare them.
    assert max(windows.values(), default=0) <= (2 if by == "layers" else 0)
    assert results["coupling"] == finished[1]["coupling"]
    named = "score fairness, privacy, general"
    assert scoring_steps(capsys) == [f"fastdean: step 4 of 5, {named}"]
    assert not (tmp_path / "run" / "sweep").exists()


def killed_after(steps, monkeypatch, call):
    """An interrupt when so many steps of a sweep are done."""
    reached = Resumable.reached

    def stopping(self, step):
        reached(self, step)
        if step + 1 == steps:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Resumable, "reached", stopping)
        call()


@pytest.mark.parametrize("by", ["layers", "auto"])
def test_a_run_that_is_stopped_in_a_sweep_goes_on_in_it(
    place, finished, windows, tmp_path, monkeypatch, by
):
    little_memory(monkeypatch)
    job = Job(**place, **QUICK, order=by)
    killed_after(3, monkeypatch, lambda: run(job, tmp_path / "run", progress=False))
    assert windows and (tmp_path / "run" / "sweep").is_dir()
    other = Job(**place, **{**QUICK, "seed": 1}, order=by)
    with pytest.raises(ValueError, match=r"another run, which differs in seed=0 \(now 1\)"):
        run(other, tmp_path / "run", progress=False)
    windows.clear()
    results = run(job, tmp_path / "run", progress=False)
    # Both layers forward and the loss of one data set were done. A streamed model is read once
    # more, to compare it with the one that the run began with; its first layer also for the trial.
    assert set(windows.values()) <= ({2, 3, 4} if by == "layers" else {1})
    assert results["coupling"] == finished[1]["coupling"]
    assert not (tmp_path / "run" / "sweep").exists()


def test_a_scoring_that_is_stopped_goes_on_where_its_scores_are_to_be(
    place, windows, tmp_path, monkeypatch
):
    def scored(out, order="layers"):
        job = ScoreJob(model=place["model"], data=place["privacy"], order=order)
        return run_score(job, out, overwrite=False, progress=False)

    expected = scored(tmp_path / "whole")
    killed_after(3, monkeypatch, lambda: scored(tmp_path / "out"))
    scored(tmp_path / "out", order="auto")
    found = Scores.from_pretrained(tmp_path / "out")
    for name in expected:
        assert torch.equal(found.entries[name].sums, expected.entries[name].sums)
        assert torch.equal(found.index(name), expected.index(name))


def _spoiled(path, source):
    """The rows of a source, with one that is not JSON, one without an answer and one too long."""
    lines = source.read_text("utf-8").splitlines()
    long = json.dumps({"prompt": "w1", "response": "w2 " * 200, "unsafe": "w3"})
    lines[1:1] = ['{"prompt": ', '{"prompt": "w1", "response": "", "unsafe": "w2"}', long]
    path.write_text("\n".join(lines), "utf-8")
    return path


def test_bad_rows_are_refused_with_the_way_to_skip_them_or_left_out_and_counted(
    place, tmp_path, caplog
):
    bad = _spoiled(tmp_path / "bad.jsonl", Path(place["privacy"]))
    job = {**place, "privacy": str(bad), **OPTIONS, "examples": None, "progress": False}
    with pytest.raises(ValueError, match=r"^privacy .* line 2: .*pass skip_bad_rows=True to leave"):
        fastdean.run(**job, out=tmp_path / "run")
    results = fastdean.run(**job, skip_bad_rows=True, out=tmp_path / "run")
    kept = results["data"]["privacy"]
    assert kept["examples"] == 10 and kept["skipped_rows"]["count"] == 3
    assert [row["row"] for row in kept["skipped_rows"]["first"]] == [2, 3, 4]
    stored = Scores.from_pretrained(tmp_path / "run" / "scores" / "privacy").manifest
    assert stored["data"]["skipped_rows"] == kept["skipped_rows"]
    assert "skipped_rows" not in results["data"]["fairness"]
    (told,) = [text for text in results["warnings"] if "left out" in text]
    assert told.startswith("privacy: 3 rows are left out: row 2 (") and "row 4 (" in told
    # Who skips them already need not be told to.
    assert "(row 3 must have at least one target token" in told and "skip" not in told
    assert kept["skipped_rows"]["first"][1]["reason"].startswith("row 3 must have at least one")
    assert caplog.messages.count(told) == 1
    clean = fastdean.run(
        **{**job, "privacy": place["privacy"]}, out=tmp_path / "clean", skip_bad_rows=True
    )
    assert clean["coupling"]["total"] == results["coupling"]["total"]


def test_options_that_fit_no_row_are_not_taken_for_bad_rows(place, tmp_path):
    job = {**place, **QUICK, "skip_bad_rows": True, "out": tmp_path / "run", "progress": False}
    with pytest.raises(ValueError, match="max_length must be at least 2 tokens"):
        fastdean.run(**job, max_length=1)
    with pytest.raises(
        ValueError, match="^fairness '.*every row had to be left out: .*chat template"
    ):
        fastdean.run(**job, template="chat")


def test_one_set_given_twice_is_told_by_its_content(place, tmp_path, caplog):
    lines = Path(place["privacy"]).read_text("utf-8").splitlines()
    copy = tmp_path / "copy.jsonl"
    copy.write_text("\n".join(reversed(lines)), "utf-8")
    job = {**place, **QUICK, "fairness": str(copy), "out": tmp_path / "run", "progress": False}
    results = fastdean.run(**job)
    told = "fairness and privacy hold the same rows: "
    assert [text for text in results["warnings"] if "same rows" in text][0].startswith(told)
    assert len([text for text in caplog.messages if told in text]) == 1
    # Not again for every mask that is made of the two.
    assert [text for text in caplog.messages if "same examples" in text] == []


def test_what_all_masks_of_a_run_share_is_told_once(place, tmp_path, caplog):
    # Entries of an MLP's matrices: 2048; of attention's, at most half as many.
    job = {**place, **QUICK, "target_modules": "all", "ratio": 1 / 2048}
    fastdean.run(**job, out=tmp_path / "run", progress=False)
    assert len([text for text in caplog.messages if "selects nothing from" in text]) == 1


def test_couple_tells_scores_of_the_same_examples(finished, tmp_path, caplog):
    fair, general = (
        Scores.from_pretrained(finished[0] / "scores" / s) for s in ("fairness", "general")
    )
    fastdean.couple(fair, fair, general=general, ratio=0.05)
    (told,) = [text for text in caplog.messages if "same examples" in text]
    assert told.startswith("first and second were scored on the same examples")


def test_one_call_does_what_the_command_does(place, finished, tmp_path):
    results = fastdean.run(**place, **QUICK, out=tmp_path / "run", progress=False)
    assert lasting(results) == lasting(finished[1])
    assert tree(tmp_path / "run").keys() == tree(finished[0]).keys()
    with pytest.raises(ValueError, match="this run, finished"):
        fastdean.run(**place, **QUICK, out=tmp_path / "run", progress=False)
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        fastdean.run(**place, out=tmp_path / "other", colour="red")
    with pytest.raises(TypeError, match="general must be the SRC of its rows, got none"):
        fastdean.run(model="m", fairness="f", privacy="p", out=tmp_path / "other")


def test_the_call_has_the_arguments_of_the_command():
    call = inspect.signature(fastdean.run).parameters
    command = inspect.signature(commands.run).parameters
    shown = {"preview", "quiet", "as_json"}
    assert {*call} - {"progress"} == {*command} - shown
    for name in {*call} - {"progress", "out"}:
        assert call[name].default == command[name].default, name


@pytest.mark.parametrize("kind", [Job, ScoreJob, CollapseJob, DebiasJob])
def test_a_jobs_own_options_come_before_those_it_shares(kind):
    names = [field.name for field in option_fields(kind)]
    own = [name for name in vars(kind)["__annotations__"] if getattr(kind, name, None) is not None]
    assert names[0] == "model" and names[-2:] == ["device", "seed"]
    assert [name for name in names if name in own] == own
    assert max(map(names.index, own), default=0) < names.index("revision")
    # And none is declared twice, but where its default is another.
    for name in vars(kind)["__annotations__"]:
        for base in kind.__mro__[1:]:
            if name in vars(base).get("__annotations__", {}):
                assert getattr(kind, name) != getattr(base, name)


def test_a_quiet_run_announces_nothing(place, tmp_path, capsys):
    run(Job(**place, **QUICK), tmp_path / "run", progress=False)
    assert "step" not in capsys.readouterr().err


def _change_json(file, change):
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def _change_weight(name):
    def change(folder):
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        weights[name][0, 0] += 1
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def _change_config(**values):
    return lambda folder: _change_json(folder / "config.json", lambda found: found.update(values))


def _swap_two_words(folder):
    def swap(content):
        words = content["model"]["vocab"]
        words["w0"], words["w1"] = words["w1"], words["w0"]

    _change_json(folder / "tokenizer.json", swap)


def _other_chat_template(folder):
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")


CHANGES = {
    "attention weights": (
        _change_weight("model.layers.0.self_attn.q_proj.weight"),
        "model weights",
    ),
    "head": (_change_weight("lm_head.weight"), "model weights"),
    "rotations": (
        _change_config(rope_parameters={"rope_type": "default", "rope_theta": 5000.0}),
        "model configuration",
    ),
    "attention implementation": (
        _change_config(attn_implementation="eager"),
        "attention implementation",
    ),
    "vocabulary": (_swap_two_words, "tokenizer"),
    "chat template": (_other_chat_template, "chat template"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_is_not_resumed_on_another_model(place, scored, tmp_path, change):
    model = save_model(tmp_path / "model")
    job = Job(**{**place, "model": str(model)}, **QUICK)
    scored.fail = {"score privacy": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path / "run", progress=False)
    scored.clear()
    scored.fail = {}
    make, named = CHANGES[change]
    make(model)
    with pytest.raises(ValueError, match=f"on other input, which differs in .*{named}.*; choose"):
        run(job, tmp_path / "run", progress=False)
    assert scored == []


def test_a_run_is_not_resumed_by_another_version_of_the_method(job, scored, tmp_path):
    scored.fail = {"score privacy": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path / "run", progress=False)

    def change(state):
        state["versions"]["fastdean"] = "0.0.1"

    _change_json(tmp_path / "run" / "fastdean_run.json", change)
    with pytest.raises(ValueError, match="which differs in the version of fastdean; choose"):
        run(job, tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    "name, earlier, now",
    [("torch", "0.1", None), ("FASTDEAN_IMPL", "unset", "reference"), ("ranks", "2", "1")],
)
def test_a_run_is_resumed_with_what_rounds_otherwise_and_says_so(
    job, scored, tmp_path, caplog, monkeypatch, name, earlier, now
):
    scored.fail = {"score privacy": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path / "run", progress=False)

    def change(state):
        state["versions"][name] = earlier

    _change_json(tmp_path / "run" / "fastdean_run.json", change)
    if name == "FASTDEAN_IMPL":
        monkeypatch.setenv(name, now)
    scored.fail = {}
    results = run(job, tmp_path / "run", progress=False)
    assert scored.count("score fairness") == 1
    said = [
        warning
        for warning in results["warnings"]
        if f"were done with {name} {earlier} (now {now or ''}" in warning
    ]
    assert len(said) == 1 and said[0] in caplog.text


def test_paths_that_are_no_utf8_are_recorded_and_resumed(place, scored, tmp_path):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/f\xe9.jsonl")
    shutil.copy(place["fairness"], odd)
    job = Job(**{**place, "fairness": odd}, **QUICK)
    scored.fail = {"score privacy": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path / "run", progress=False)
    scored.fail = {}
    run(job, tmp_path / "run", progress=False)
    assert scored.count("score fairness") == 1
    kept = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert kept["data"]["fairness"]["source"] == odd.rpartition("/")[2]
    assert "f\N{REPLACEMENT CHARACTER}" in (tmp_path / "run" / "report.html").read_text("utf-8")


def test_sets_that_became_tokens_otherwise_are_warned_of_once(place, tmp_path, caplog):
    """Plain text beside prompts and responses may be meant, so that it is no reason to refuse."""
    texts = [{"text": row["response"] + " w1"} for row in rows(10, 3, unsafe=False)]
    general = str(write_jsonl(tmp_path / "texts.jsonl", texts))
    results = run(Job(**{**place, "general": general}, **QUICK), tmp_path / "run", progress=False)
    said = "did not become tokens alike: fairness raw (5); privacy raw (5); general text (5)."
    assert sum(said in warning for warning in results["warnings"]) == 1
    assert caplog.text.count("did not become tokens alike") == 1
    assert results["data"]["general"]["rendered"] == {"text": 5}
    assert results["data"]["fairness"]["template"] is None


def test_an_example_of_each_set_is_in_the_report(finished):
    out, results = finished
    assert list(results["shown"]) == ["fairness", "privacy", "general"]
    (_, context), (_, target) = results["shown"]["privacy"]["parts"]
    page = (out / "report.html").read_text()
    assert context in page and target in page


@pytest.fixture
def starts(monkeypatch):
    """Starts of a torchrun job, as their first rank sees them: a process each, and one store."""
    shared = HashStore()

    @contextmanager
    def start(name, store=shared):
        monkeypatch.setattr(earlier_starts, "_START", name)
        store = PrefixStore(name, store)
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            distributed.destroy_process_group()

    return start


def test_scores_that_a_job_finished_are_its_own_when_it_is_started_again(
    place, tmp_path, starts, monkeypatch, caplog
):
    job = ScoreJob(model=place["model"], data=place["privacy"], keep_top=0.1)
    out = tmp_path / "out"

    def scored():
        return run_score(job, out, overwrite=False, progress=False)

    with monkeypatch.context() as patch, starts("killed while it reads"):
        patch.setattr(scoring, "take_rows", raises(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            scored()
    with starts("killed when all is done"):
        first = scored()
        with pytest.raises(ValueError, match="holds scores already, finished"):
            scored()  # by the same process, which nothing has ended
    written = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    with starts("again"):
        found = scored()
    assert "holds the scores already, which this job finished before" in caplog.text
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == written
    for name in first:
        assert torch.equal(found.select(name, 4), first.select(name, 4))
    # Of another job, however often that is started.
    other = HashStore()
    for name in ("another job", "another job again"):
        with (
            starts(name, other),
            pytest.raises(ValueError, match="holds scores already, finished"),
        ):
            scored()


def test_a_run_that_a_job_finished_is_its_own_when_it_is_started_again(
    job, tmp_path, starts, monkeypatch, caplog
):
    out = tmp_path / "out"

    def ran(job=job, **options):
        return run(job, out, progress=False, **options)

    with monkeypatch.context() as patch, starts("killed while it reads"):
        patch.setattr(steps, "split_rows", raises(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ran()
    with starts("killed when all is done"):
        first = ran()
        with pytest.raises(ValueError, match="holds this run, finished"):
            ran()  # by the same process, which nothing has ended
    written = tree(out)
    with starts("again"), monkeypatch.context() as patch:
        nothing_loaded(patch)
        assert ran() == first
        with pytest.raises(ValueError, match="another run, which differs in seed"):
            ran(replace(job, seed=1))
    assert caplog.text.count("holds the run already, which this job finished before") == 1
    assert tree(out) == written
    # What is to be replaced may be what was there before this job.
    before = (out / "results.json").stat().st_mtime_ns
    with starts("again, to replace it"):
        ran(overwrite=True)
    assert (out / "results.json").stat().st_mtime_ns > before
    # Of another job, however often that is started.
    other = HashStore()
    for name in ("another job", "another job again"):
        with starts(name, other), pytest.raises(ValueError, match="holds this run, finished"):
            ran()


def test_all_scores_are_kept_as_score_takes_it(place, tmp_path):
    job = ScoreJob(model=place["model"], data=place["privacy"], keep_top=None)
    assert run_score(job, tmp_path / "out", overwrite=False, progress=False).keep_top is None


def raises(error):
    def raising(*args, **options):
        raise error

    return raising
