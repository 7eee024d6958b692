"""Runs whose data sets have names of their own: which they may have, and what shows them."""

from __future__ import annotations

import json
import re

import pytest
from tiny_folders import rows, save_model, write_jsonl, write_sources
from typer.testing import CliRunner

import fastdean
from fastdean import cli
from fastdean.coupling.results.scores import Scores
from fastdean.coupling.resuming import resumable
from fastdean.jobs import run
from fastdean.jobs.coupling.data_sets import DataSets
from fastdean.jobs.coupling.job import Job
from fastdean.masks import NeuronMask
from fastdean.models.layers.streaming import StreamedModel
from fastdean.report import render_report

SETS = ("Toxic", "leaks", "chat", "code-2")
OPTIONS = {"ratio": 0.05, "examples": 5, "eval_examples": 0}
QUICK = ["--ratio", "0.05", "--examples", "5", "--eval-examples", "0", "--quiet"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, the three sources, and four of 10 rows, the first two with unsafe answers."""
    folder = tmp_path_factory.mktemp("place")
    save_model(folder / "model")
    write_sources(folder)
    for seed, name in enumerate(SETS, 10):
        write_jsonl(folder / f"{name}.jsonl", rows(10, seed, unsafe=name in SETS[:2]))
    return folder


def sources(place):
    return {name: str(place / f"{name}.jsonl") for name in SETS}


def call(*args):
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


def asked(place):
    """The arguments of a run of the four sets."""
    listed = [f"--set={name}={source}" for name, source in sources(place).items()]
    coupled = ["--couple", "Toxic,leaks", "--general", "chat,code-2"]
    return ["run", "--model", place / "model", *listed, *coupled, *QUICK]


@pytest.fixture
def windows(monkeypatch):
    """How often the weights of each layer were read from their files."""
    read, real = {}, StreamedModel._in

    def counted(self, window):
        read[window] = read.get(window, 0) + 1
        return real(self, window)

    monkeypatch.setattr(StreamedModel, "_in", counted)
    return read


def test_four_sets_go_end_to_end_in_one_sweep_and_are_shown_by_their_names(
    place, tmp_path, windows
):
    out = tmp_path / "run"
    options = ["--order", "layers", "--eval-examples", "5", "--json", "--out", out]
    result = call(*asked(place), *options)
    assert result.exit_code == 0, result.stderr
    # Each layer once forward and once backward, for all four sets together; what is outside once.
    layers = {window: times for window, times in windows.items() if "layers" in window}
    assert layers == {"model.layers.0": 2, "model.layers.1": 2}
    assert {windows[window] for window in set(windows) - set(layers)} == {1}
    results = json.loads(result.stdout)
    assert list(results["data"]) == list(SETS)
    assert list(results["margins"]) == ["Toxic", "leaks"]
    assert list(results["perplexities"]) == ["chat", "code-2"] and "perplexity" not in results
    assert results["hsic"]["sets"] == ["Toxic", "leaks"]
    assert results["title"] == "FastDEAN: coupled Toxic and leaks weights"
    assert results["options"]["general"] == ["chat", "code-2"]
    done, awareness, effects = results["findings"]
    assert "most important to Toxic are also" in done and "most important to chat or code-2" in done
    assert re.search(r"on Toxic \(.* and .* on leaks \(", awareness)
    assert "Perplexity on chat answers" in effects and "Perplexity on code-2 answers" in effects
    mask = NeuronMask.from_pretrained(out / "mask")
    assert [mask.manifest[which]["data"]["set"] for which in ("first", "second")] == list(SETS[:2])
    assert [each["data"]["set"] for each in mask.manifest["general"]] == list(SETS[2:])
    page = (out / "report.html").read_text("utf-8")
    for text in ("Toxic set", "leaks set", "in the Toxic and the leaks set", "Not chat or code-2"):
        assert text in page
    for name in SETS:
        assert Scores.from_pretrained(out / "scores" / name).manifest["data"]["set"] == name
    card = tmp_path / "edited"
    edit = ["--model", place / "model", "--mask", out / "mask", "--out", card]
    assert call("apply", *edit).exit_code == 0
    assert "on Toxic and leaks" in (card / "README.md").read_text("utf-8")
    shown = [
        file.read_text("utf-8") for file in out.rglob("*") if file.suffix in (".json", ".html")
    ]
    for text in (*shown, result.stderr, (card / "README.md").read_text("utf-8")):
        assert not re.search("fairness|privacy", text, re.IGNORECASE)


def test_the_mask_is_that_of_its_scores_and_the_call_does_what_the_command_does(place, tmp_path):
    out = tmp_path / "run"
    assert call(*asked(place), "--out", out).exit_code == 0
    scores = {name: Scores.from_pretrained(out / "scores" / name) for name in SETS}
    spared = [scores["chat"], scores["code-2"]]
    expected = fastdean.couple(scores["Toxic"], scores["leaks"], general=spared, ratio=0.05)
    assert NeuronMask.from_pretrained(out / "mask").summary().total == expected.summary().total
    found = fastdean.run(
        str(place / "model"),
        sets=sources(place),
        couple=("Toxic", "leaks"),
        general=("chat", "code-2"),
        **OPTIONS,
        out=tmp_path / "other",
        progress=False,
    )
    told = json.loads((out / "results.json").read_text())
    for key in ("data", "coupling", "overlap", "findings", "options", "warnings"):
        assert found[key] == told[key], key


def test_the_three_options_are_sets_of_their_names(place, tmp_path):
    """One job in either form: a run that was begun in one is found finished in the other."""
    three = {name: str(place / f"{name}.jsonl") for name in ("fairness", "privacy", "general")}
    job = Job(model=str(place / "model"), **three, **OPTIONS)
    named = Job(
        model=str(place / "model"),
        sets=dict(reversed(three.items())),
        couple="fairness,privacy",
        general="general",
        **OPTIONS,
    )
    assert named.asked() == job.asked() and {"sets", "couple"}.isdisjoint(job.asked())
    results = run(job, tmp_path / "run", progress=False)
    assert results["options"]["fairness"] == "fairness.jsonl"
    with pytest.raises(ValueError, match="this run, finished"):
        run(named, tmp_path / "run", progress=False)


def test_a_sweep_goes_on_for_a_job_that_names_its_sets_in_another_order(
    place, tmp_path, monkeypatch
):
    def job(given):
        names = {"couple": "Toxic,leaks", "general": "chat,code-2"}
        return Job(model=str(place / "model"), sets=given, **names, **OPTIONS, order="layers")

    given, steps, reached = sources(place), [], resumable.Resumable.reached

    def noted(self, step):
        reached(self, step)
        steps.append(step)
        if steps == [0, 1, 2]:
            raise KeyboardInterrupt

    expected = run(job(given), tmp_path / "expected", progress=False)
    monkeypatch.setattr(resumable.Resumable, "reached", noted)
    with pytest.raises(KeyboardInterrupt):
        run(job(given), tmp_path / "run", progress=False)
    results = run(job(dict(reversed(given.items()))), tmp_path / "run", progress=False)
    assert steps[3] == 3 and not list((tmp_path / "run").glob("sweep/*"))
    assert results["coupling"] == expected["coupling"]


def test_a_set_that_is_neither_coupled_nor_spared_is_scored_and_measured(place, tmp_path):
    given = {**sources(place), "other": str(place / "fairness.jsonl")}
    job = Job(
        model=str(place / "model"),
        sets=given,
        couple=["Toxic", "leaks"],
        **{**OPTIONS, "eval_examples": 4},
    )
    results = run(job, tmp_path / "run", progress=False)
    # Of those without unsafe answers there is nothing to compare.
    assert list(results["margins"]) == ["Toxic", "leaks", "other"]
    assert "perplexity" not in results and "perplexities" not in results
    assert len(results["data"]) == 5 and results["coupling"]["total"]["removed"] == 0
    assert "too, and rule" not in results["findings"][0]
    assert "not measured on chat and code-2" in results["findings"][1]
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "No set is spared" in page and ">Spared<" not in page
    mask = fastdean.NeuronMask.from_pretrained(tmp_path / "run" / "mask")
    assert "spared" not in str(mask.summary())


BAD = {
    "mixed": (["--fairness", "x.csv"], "--fairness must be left out with sets, got 'x.csv'"),
    "a path": (["--set", "a/b=x.csv"], "'a/b'; choose another name"),
    "two dots": (["--set", "..=x.csv"], "--set must have names of letters, digits, '-' and '_'"),
    "no name": (["--set", "=x.csv"], "--set must be typed as NAME=SRC, got '=x.csv'; give both"),
    "no source": (["--set", "a="], "--set must be typed as NAME=SRC, got 'a='; give both"),
    "twice": (["--set", "chat=x.csv"], "--set must have a name each, got 'chat' twice"),
    "case": (["--set", "CHAT=x.csv"], "differ by more than case, got 'chat' and 'CHAT'"),
    "long": (["--set", f"{'a' * 65}=x.csv"], "64 at most"),
    "unknown": (
        ["--general", "alpaca"],
        "--general must name sets, got 'alpaca'; choose from chat, code-2, and give",
    ),
    "three": (
        ["--couple", "chat"],
        "--couple must name two different sets, got 'Toxic, leaks, chat'",
    ),
    "both": (["--general", "leaks"], "--general must name sets that are not coupled"),
    "no file": (["--set", "model=nowhere.csv"], "fastdean: set 'model' must be an existing file"),
}


@pytest.mark.parametrize("case", BAD)
def test_sets_that_cannot_be_meant_are_one_line(place, tmp_path, case):
    options, text = BAD[case]
    result = call(*asked(place), *options, "--out", tmp_path / "run")
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert text in result.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({}, TypeError, "fairness must be the SRC of its rows, got none; name it, or pass sets="),
        ({"fairness": "f", "privacy": "p"}, TypeError, "general must be the SRC of its rows"),
        (
            {"fairness": "f", "privacy": "p", "general": ("a", "b")},
            TypeError,
            r"general must be one SRC without sets, got \['a', 'b'\]; pass sets=",
        ),
        (
            {"fairness": "f", "privacy": "p", "general": "g", "couple": "f,p"},
            ValueError,
            "couple must come with sets, whose names it takes, got 'f,p' alone",
        ),
        ({"sets": {"a": "x", "b": "y"}}, TypeError, "couple must name the two sets .* from a, b"),
        ({"sets": ["a=x"], "couple": "a,b"}, TypeError, "sets must be names with their SRC, got l"),
        ({"sets": {"a": 3, "b": "y"}, "couple": "a,b"}, TypeError, "sets must have a SRC each"),
        ({"sets": {"a": "x"}, "couple": "a,a"}, ValueError, "sets must be two at least, got 1"),
        (
            {"sets": {f"{n}{'a' * 60}": "x" for n in range(4)}, "couple": "a,b"},
            ValueError,
            "names of 200 characters at most together, got 247",
        ),
        ({"sets": {"a": "x", "b": "y"}, "couple": 3}, TypeError, "couple must be names of sets"),
    ],
)
def test_a_job_whose_sets_are_not_clear_is_refused(options, error, text):
    with pytest.raises(error, match=text):
        Job(model="m", **options)


def test_names_with_the_signs_of_folders_are_resumed(place, tmp_path, monkeypatch):
    """A sweep is called by its sets, and they may have hyphens."""
    given = {"a-b": str(place / "Toxic.jsonl"), "a": str(place / "leaks.jsonl")}
    given["b"] = str(place / "chat.jsonl")
    job = Job(
        model=str(place / "model"),
        sets=given,
        couple="a-b,a",
        general="b",
        order="layers",
        **OPTIONS,
    )
    real = Scores.save_pretrained

    def stopped(self, folder, **options):
        if folder.name == "a":
            raise KeyboardInterrupt
        return real(self, folder, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Scores, "save_pretrained", stopped)
        run(job, tmp_path / "run", progress=False)
    results = run(job, tmp_path / "run", progress=False)
    assert list(results["data"]) == ["a-b", "a", "b"]


def test_a_set_may_be_called_as_a_part_of_the_model(place, tmp_path):
    """What is noted of the rows must not be taken for what is noted of the model."""
    given = {"device": str(place / "Toxic.jsonl"), "tokenizer": str(place / "leaks.jsonl")}
    job = Job(model=str(place / "model"), sets=given, couple=("device", "tokenizer"), **OPTIONS)
    run(job, tmp_path / "run", progress=False)
    inputs = json.loads((tmp_path / "run" / "fastdean_run.json").read_text())["inputs"]
    assert {"device rows", "tokenizer rows", "device", "tokenizer"} <= set(inputs)


def test_the_preview_shows_named_sets(place, tmp_path):
    result = call(*asked(place), "--preview", "--json")
    assert result.exit_code == 0, result.stderr
    assert list(json.loads(result.stdout)["examples"]) == list(SETS)


def test_an_earlier_results_file_is_drawn_in_the_names_it_had():
    page = render_report({"coupling": {"total": {"coupled": 3}}, "options": {"general": "g.csv"}})
    assert "the fairness and the privacy set" in page
    page = render_report({"perplexity": {"origin": 3.0, "masks": {}}, "options": {"couple": 3}})
    assert "has a perplexity of 3" in page


def test_the_coupled_sets_come_first_among_the_compared():
    sets = DataSets.of(None, None, "d", dict.fromkeys("abcd", "x"), "c,b")
    assert sets.compared == ("c", "b", "a") and sets.spared == ("d",)
