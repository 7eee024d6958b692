"""The command line: what it prints where, its exit codes, one clear line for every bad input."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import get_type_hints

import forked
import pytest
import tiny_models
import torch
import tqdm.auto
from safetensors.torch import load_file
from tiny_folders import rows, save_model, save_model_with_code, write_jsonl, write_sources
from typer.testing import CliRunner

import fastdean
from fastdean import cli
from fastdean.cli import running
from fastdean.cli.flags import in_flags
from fastdean.coupling.layers.by_layers import Sweep
from fastdean.coupling.passes import by_batches
from fastdean.jobs import run as run_job
from fastdean.jobs.collapse.job import CollapseJob, DebiasJob
from fastdean.jobs.coupling import scoring as coupling_scoring
from fastdean.jobs.coupling import steps as coupling_steps
from fastdean.jobs.coupling.job import Job, ScoreJob
from fastdean.jobs.folder import RunFolder
from fastdean.masks import NeuronMask
from fastdean.models.ranks import fresh_store, lost_ranks
from fastdean.wording import bars

GATED = ("gate_proj", "up_proj", "down_proj")
OPTIONS = ("--ratio", "0.05", "--examples", "5", "--eval-examples", "0", "--quiet")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    return {"model": save_model(folder / "model"), **write_sources(folder)}


@pytest.fixture(scope="module")
def run_folder(place, tmp_path_factory):
    """A finished run; not to be written to."""
    out = tmp_path_factory.mktemp("run") / "run"
    sources = {name: str(path) for name, path in place.items()}
    run_job(Job(**sources, ratio=0.05, examples=5, eval_examples=0), out, progress=False)
    return out


def call(*args, **options):
    """A command of the line in this process: exit_code, stdout, stderr."""
    result = CliRunner().invoke(cli.app, [str(arg) for arg in args], **options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def sources(place, **others):
    """--fairness, --privacy, --general and --model as arguments."""
    return [arg for name, value in {**place, **others}.items() for arg in (f"--{name}", value)]


def refused(result, text):
    """Exit code 2 and one line that says `text`, and nothing on stdout."""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.exit_code == 2, result.stderr
    assert len(lines) == 1 and lines[0].startswith("fastdean: "), result.stderr
    assert text in lines[0]
    assert result.stdout == ""


def test_a_run_says_what_it_found_and_prints_one_json_document(place, tmp_path):
    out = tmp_path / "run"
    result = call("run", *sources(place), "--out", out, *OPTIONS, "--json")
    assert result.exit_code == 0
    results = json.loads(result.stdout)
    assert results == json.loads((out / "results.json").read_text())
    for said in (
        results["findings"][0],
        f"report  {out}/report.html",
        "Note: Nothing was measured",
    ):
        assert said in result.stderr
    assert call("run", *sources(place), "--out", out, *OPTIONS).stdout == ""


BAD_SOURCES = {
    "missing": ("nowhere.csv", None, "must be an existing file, got 'nowhere.csv'"),
    "empty": ("empty.jsonl", b"", "must hold at least one row, got the empty file"),
    "malformed": ("bad.json", b"{", "must be a well-formed .json file"),
    "columns": ("c.csv", b"q,a\n1,2\n", "['a', 'q'] in row 1; map them with ::prompt=COLUMN"),
    "preset": ("embedded:faimess", None, "or one of beavertails:fairness"),
    "hub": ("nobody/nothing", None, "a reachable data set of the hub, got: "),
    "no target": ("t.jsonl", b'{"prompt": "w1", "response": ""}\n', "row 1 must have at least one"),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
@pytest.mark.parametrize("command", ["run", "score"])
def test_a_bad_source_is_one_line_and_writes_nothing(place, tmp_path, monkeypatch, command, case):
    name, content, text = BAD_SOURCES[case]
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    if command == "run":
        result = call("run", *sources(place, privacy=name), "--out", "out", *OPTIONS)
    else:
        result = call("score", "--model", place["model"], "--data", name, "--out", "out", "--quiet")
    refused_lines = [x for x in result.stderr.splitlines() if "fewer than the" not in x]
    assert result.exit_code == 2 and len(refused_lines) == 1 and text in refused_lines[0]
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("source", "asked"),
    [("lab/rows", True), ("beavertails:privacy", True), ("embedded:privacy", False), (None, False)],
)
def test_a_hub_that_cannot_be_reached_is_asked_once(place, tmp_path, monkeypatch, source, asked):
    """Left to themselves the libraries try six times."""
    import datasets
    from huggingface_hub import constants

    tried, seen = [], []

    def is_unreachable():
        tried.append(source)
        return True

    def load_dataset(*_, **__):
        seen.append(constants.HF_HUB_OFFLINE)
        raise ConnectionError("no network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("fastdean.jobs.rows.is_unreachable", is_unreachable)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = ("--model", tmp_path / "no", "--data", source or place["privacy"])
    result = call("score", *options, "--out", tmp_path / "out", "--examples", "5", "--quiet")
    refused(result, "got: no network" if asked else "--model must be an existing folder")
    assert tried == [source] * asked and seen == [True] * asked
    assert constants.HF_HUB_OFFLINE is False


def bad_models(tmp_path, place):
    def with_nan():
        model = tiny_models.llama()
        model.model.layers[0].mlp.up_proj.weight.data[3, 4] = float("nan")
        return model

    (tmp_path / "empty").mkdir()
    truncated = shutil.copytree(place["model"], tmp_path / "truncated")
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    return {
        "missing": ("./nowhere", "model must be an existing folder, got './nowhere'"),
        "hub": ("nobody/nothing", "a reachable hub id or a .gguf file, got 'nobody/nothing': "),
        "empty": (tmp_path / "empty", "must be a Hugging Face folder with a config.json"),
        "truncated": (truncated, "truncated': "),
        "nan": (
            save_model(tmp_path / "nan", with_nan),
            "loss must be finite, got nan for example ",
        ),
    }


@pytest.mark.parametrize("case", ["missing", "hub", "empty", "truncated", "nan"])
def test_a_bad_model_is_one_line_and_writes_nothing(place, tmp_path, case):
    model, text = bad_models(tmp_path, place)[case]
    out = tmp_path / "out"
    refused(call("run", *sources(place, model=model), "--out", out, *OPTIONS), text)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--target-modules", "nothing"], "--target-modules must match at least one Linear layer"),
        (["--target-modules", "("], "--target-modules must be"),
        (["--ratio", "1e-6"], "the smallest that would is 0.00049, or set --min-k 1"),
        (["--rule", "best"], "--rule must be one of paper, released"),
        (["--max-length", "1"], "--max-length must be at least 2 tokens, got 1"),
        (["--template", "chat"], "row "),
        (["--device", "tpu"], "--device must be cpu, cuda, mps or auto, got 'tpu'"),
        (["--memory-budget", "1e-9"], "--memory-budget must hold the sums of at least one matrix"),
        (["--memory-budget", "inf"], "--memory-budget must be a positive number of GB, got inf"),
        (["--memory-budget", "nan"], "--memory-budget must be a positive number of GB, got nan"),
        (["--memory-budget", "-1"], "--memory-budget must be a positive number of GB, got -1"),
        (["--tokens-per-batch", "0"], "--tokens-per-batch must be"),
    ],
)
def test_bad_options_of_a_run_are_one_line_and_write_nothing(place, tmp_path, options, text):
    result = call("run", *sources(place), "--out", tmp_path / "out", *OPTIONS, *options)
    refused(result, text)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("--seed", "-1", "--seed must be at least 0, got -1"),
        ("--examples", "0", "--examples must be at least 1, got 0"),
        ("--template", "own", "--template must be one of raw, chat, published, got 'own'"),
        ("--granularity", "head", "--granularity must be one of weight, unit, got 'head'"),
    ],
)
def test_bad_options_of_score_are_told_before_anything_is_read(tmp_path, option, value, text):
    places = {"model": tmp_path / "no-model", "data": "no-data.jsonl", "out": tmp_path / "out"}
    refused(call("score", *sources(places), option, value), f"fastdean: {text}")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"out": "loop"}, "out must be a path that can be followed, got "),
        ({"out": ""}, "out must be a value, got ''"),
        ({"data": ""}, "got ''"),
        ({"out": "model/scores"}, "out must be a folder outside of model"),
    ],
)
def test_bad_places_of_scores_are_one_line(place, tmp_path, options, text):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "model").symlink_to(place["model"])
    given = {"model": place["model"], "data": place["privacy"], "out": "out", **options}
    if given["out"]:
        given["out"] = tmp_path / given["out"]
    refused(call("score", *sources(given)), text)
    assert not (tmp_path / "out").exists() and not (place["model"] / "scores").exists()


def test_a_model_is_not_applied_into_its_own_folder(place, run_folder):
    mask, out = run_folder / "mask", place["model"] / "edited"
    result = call("apply", "--model", place["model"], "--mask", mask, "--out", out)
    refused(result, "out must be a folder outside of model")
    assert not out.exists()


def test_an_error_names_the_flag_of_the_source_it_is_about(place, run_folder, tmp_path):
    out = tmp_path / "out"
    nowhere = tmp_path / "nowhere"
    wanted = "must be an existing folder or a repository"
    no_folder_of_ours = f"must be a folder written by FastDEAN, got '{place['model']}'"
    scores = run_folder / "scores" / "fairness"
    given = {"first": scores, "second": scores, "general": scores, "out": out}
    for flag in ("first", "second", "general"):
        options = {**given, flag: nowhere}
        arguments = [part for name, path in options.items() for part in (f"--{name}", path)]
        refused(call("couple", *arguments), f"fastdean: --{flag} {wanted}")
        options[flag] = place["model"]
        arguments = [part for name, path in options.items() for part in (f"--{name}", path)]
        refused(call("couple", *arguments), f"fastdean: --{flag} {no_folder_of_ours}")
    for command, model in (("patch", "--checkpoint"), ("apply", "--model")):
        result = call(command, model, place["model"], "--mask", nowhere, "--out", out)
        refused(result, f"fastdean: --mask {wanted}")
        result = call(command, model, place["model"], "--mask", place["model"], "--out", out)
        refused(result, f"fastdean: --mask {no_folder_of_ours}")
    result = call("patch", "--checkpoint", nowhere, "--mask", run_folder / "mask", "--out", out)
    refused(result, "fastdean: --checkpoint must be a local folder of a checkpoint")
    result = call("run", *sources(place, privacy="nowhere.csv"), "--out", out, *OPTIONS)
    refused(result, "fastdean: --privacy must be an existing file")
    refused(call("run", *sources(place), *OPTIONS), "fastdean: --out must be a path, got none")
    unread = write_jsonl(tmp_path / "no-target.jsonl", [{"prompt": "w1", "response": ""}])
    result = call("run", *sources(place, privacy=unread), "--out", out, *OPTIONS)
    refused(result, f"fastdean: --privacy '{unread}': row 1 must have")


@pytest.mark.parametrize("form", ["preset", "file", "missing file", "folder"])
def test_patch_sends_gguf_to_apply(run_folder, tmp_path, form):
    """It edits files of safetensors, and never asks the hub for the demo model."""
    file = tmp_path / "gguf" / "m.gguf"
    file.parent.mkdir()
    if form != "missing file":
        file.touch()
    given = {"preset": "smollm2-135m-instruct", "folder": file.parent}.get(form, file)
    out = tmp_path / "out"
    result = call("patch", "--checkpoint", given, "--mask", run_folder / "mask", "--out", out)
    refused(result, "; edit it with `fastdean apply`, which loads the model and saves safetensors")
    assert "--checkpoint must " in result.stderr and "safetensors" in result.stderr


def test_an_empty_name_is_not_taken_for_the_current_folder(
    place, run_folder, tmp_path, monkeypatch
):
    """As a shell gives it for a variable that is not set."""
    mask, scores = run_folder / "mask", run_folder / "scores" / "fairness"
    given = {
        "apply": {"model": place["model"], "mask": mask},
        "patch": {"checkpoint": place["model"], "mask": mask},
        "couple": {"first": scores, "second": scores, "general": scores},
        "score": {"model": place["model"], "data": place["privacy"]},
        "run": place,
        "collapse": {"model": place["model"], "text": place["general"], "words": "gender"},
        "debias": {"model": place["model"], "data": place["general"], "method": "causal"},
    }
    for command, options in given.items():
        for flag in options:
            asked = sources({**options, flag: ""})
            asked += [] if command in ("apply", "patch", "couple") else ["--quiet"]
            result = call(command, *asked, "--out", tmp_path / "out")
            refused(result, f"fastdean: --{flag} must be ")
            assert "got ''" in result.stderr
    assert not (tmp_path / "out").exists()
    monkeypatch.chdir(shutil.copytree(run_folder, tmp_path / "run"))
    refused(call("report", ""), "fastdean: RUN_FOLDER must be a value, got ''; give one, or")
    refused(call("report", ".", "--out", ""), "fastdean: --out must be a value, got ''; give one")
    asked = ["--model", place["model"], "--text", place["general"], "--out", tmp_path / "out"]
    refused(call("collapse", *asked, "--bias", "crows_pairs="), "'crows_pairs=' must name a source")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "min_k must be 0 with scope='model', got 2",
            "--min-k must be 0 with --scope model, got 2",
        ),
        (
            "model must be one of its rules; the model",
            "--model must be one of its rules; the model",
        ),
        ("cut it with max_length.", "cut it with --max-length."),
        ("pass trust_remote_code=True (--trust-remote-code)", "pass --trust-remote-code"),
        ("seed=0 (now 1), template=unset", "--seed 0 (now 1), --template unset"),
        ("got 'max_length', model's 'seed=1'", "got 'max_length', model's 'seed=1'"),
        ('model="a b"', '--model "a b"'),
        (
            "load it, or pass loss_fn= to define its loss; pass template=",
            "load it, or from Python, pass loss_fn= to define its loss; pass --template",
        ),
        ("fastdean.model.max_length(x), a/seed=1", "fastdean.model.max_length(x), a/seed=1"),
    ],
)
def test_names_are_told_as_flags_and_quoted_text_stays(text, told):
    names = ("min_k", "scope", "model", "max_length", "trust_remote_code", "seed", "template")
    assert in_flags(text, {name: f"--{name.replace('_', '-')}" for name in names}) == told


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16"])
def test_another_run_is_refused_with_every_option_that_differs(place, run_folder, tmp_path, dtype):
    options = [*OPTIONS, "--ratio", "0.1", "--dtype", dtype]
    refused(
        call("run", *sources(place), "--out", run_folder, *options),
        "which differs in --ratio 0.05 (now 0.1), --dtype auto (now 'bfloat16'); choose",
    )


def test_a_budget_that_differs_is_shown_as_it_was_typed(place, run_folder, tmp_path):
    asked = [*OPTIONS, "--memory-budget", "2.5"]
    told = "which differs in --memory-budget unset (now 2.5 GB); choose"
    refused(call("run", *sources(place), "--out", run_folder, *asked), told)


def test_version_and_short_help(place):
    assert call("--version").stdout.strip() == fastdean.__version__
    for arguments in ([], *([command] for command in COMMANDS)):
        result = call(*arguments, "-h")
        assert result.exit_code == 0 and "Usage: " in result.stdout


def test_make_help_lists_the_targets():
    root = Path(__file__).parents[2]
    made = subprocess.run(
        # `make test` would have its own name and folder said around it.
        ["make", "--no-print-directory", "help"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    makefile = (root / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):(?!=)", makefile, re.MULTILINE))
    assert {line.split()[1] for line in made.stdout.splitlines()} == targets


def test_an_unknown_option_is_a_usage_error():
    result = call("run", "--colour", "red")
    assert result.exit_code == 2 and "--colour" in result.stderr and result.stdout == ""


def write_foreign(folder):
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    return folder


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("command", ["run", "score", "couple", "apply", "patch"])
def test_a_folder_with_other_files_is_refused_and_kept(
    place, run_folder, tmp_path, command, overwrite
):
    out, scores = write_foreign(tmp_path / "out"), run_folder / "scores"
    arguments = {
        "run": [*sources(place), *OPTIONS],
        "score": ["--model", place["model"], "--data", place["privacy"], "--quiet"],
        "couple": ["--first", scores / "fairness", "--second", scores / "privacy"],
        "apply": ["--model", place["model"], "--mask", run_folder / "mask"],
        "patch": ["--checkpoint", place["model"], "--mask", run_folder / "mask"],
    }
    result = call(command, *arguments[command], "--out", out, *overwrite)
    refused(result, "out must be a ")
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("command", ["run", "score", "couple", "apply"])
def test_every_command_that_loads_a_model_takes_its_revision(place, run_folder, tmp_path, command):
    """It is passed on to where a revision of a local folder is refused."""
    scores = run_folder / "scores"
    arguments = {
        "run": [*sources(place), *OPTIONS],
        "score": ["--model", place["model"], "--data", place["privacy"], "--quiet"],
        "couple": [
            *("--first", scores / "fairness", "--second", scores / "privacy"),
            *("--model", place["model"]),
        ],
        "apply": ["--model", place["model"], "--mask", run_folder / "mask"],
    }
    result = call(command, *arguments[command], "--out", tmp_path / "out", "--revision", "v2")
    refused(result, "revision must be of a hub id, got 'v2' for ")


def test_a_revision_of_no_model_is_refused(run_folder, tmp_path):
    scores = run_folder / "scores"
    command = ["couple", "--first", scores / "fairness", "--second", scores / "privacy"]
    result = call(*command, "--out", tmp_path / "out", "--revision", "v2")
    refused(result, "revision must come with model, whose revision it is, got 'v2' alone")


def test_score_records_the_revision(place, tmp_path, monkeypatch):
    from fastdean.jobs.coupling import scoring

    real = scoring.load_or_stream

    def load(name, *, revision, **options):
        return real(name, **options)

    monkeypatch.setattr(scoring, "load_or_stream", load)
    result = call(
        "score", "--model", place["model"], "--data", place["privacy"], "--out", tmp_path / "s",
        "--revision", "v2", "--quiet", "--json",
    )  # fmt: skip
    assert json.loads(result.stdout)["model"]["revision"] == "v2"


def test_make_demo_can_be_called_again(tmp_path, monkeypatch):
    """The second call finds the first one's finished run."""
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    arguments = re.search(r"^demo:.*\n\t\$\(BIN\)/fastdean (.+)$", makefile, re.MULTILINE)[1]
    done = []

    def run(job, out, *, overwrite, **options):
        folder = RunFolder(out, {"ratio": job.ratio}, overwrite)
        folder.claim()
        folder.finish()
        done.append(out)
        return {}

    monkeypatch.setattr("fastdean.jobs.run", run)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        result = call(*shlex.split(arguments))
        assert result.exit_code == 0, result.stderr
    assert done == [Path("fastdean-demo")] * 2


@pytest.mark.parametrize("given", [None, "active"])
def test_the_demo_lets_waiting_threads_sleep_before_torch_is_loaded(given):
    """OpenMP reads the policy when its library is loaded, which is with torch."""
    script = textwrap.dedent(
        """
        import os, sys
        from fastdean.cli import commands
        assert "torch" not in sys.modules
        class Stop:
            def find_spec(self, name, *_):
                if name == "torch":
                    print(os.environ["OMP_WAIT_POLICY"])
                    sys.stdout.flush()
                    os._exit(0)
        sys.meta_path.insert(0, Stop())
        commands.demo.__wrapped__(out="x")
        """
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    made = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60
    )
    assert made.stdout.split() == [given or "passive"], made.stderr


def test_score_refuses_a_used_folder_before_the_model_is_loaded(place, tmp_path, monkeypatch):
    def load_model(*args, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("fastdean.jobs.session.load_model", load_model)
    out = write_foreign(tmp_path / "out")
    refused(
        call("score", "--model", place["model"], "--data", place["privacy"], "--out", out),
        "which has files in it; choose another",
    )


@pytest.mark.parametrize("command", ["score", "couple", "apply", "patch"])
def test_a_folder_that_is_finished_is_said_to_be(place, run_folder, tmp_path, command):
    scores, mask = run_folder / "scores", ["--mask", run_folder / "mask"]
    asked, what = {
        "score": (["--model", place["model"], "--data", place["privacy"]], "scores"),
        "couple": (["--first", scores / "fairness", "--second", scores / "privacy",
                    "--ratio", 0.05], "a mask"),
        "apply": (["--model", place["model"], *mask], "an edited model"),
        "patch": (["--checkpoint", place["model"], *mask], "an edited model"),
    }[command]  # fmt: skip
    asked = [command, *asked, "--out", tmp_path / "out", "--quiet"]
    assert call(*asked).exit_code == 0
    told = f"which holds {what} already, finished; use that, choose another or pass --overwrite"
    refused(call(*asked), told)


def test_scores_of_two_models_are_named(place, run_folder, tmp_path):
    other = save_model(tmp_path / "other", lambda: tiny_models.llama(seed=1))
    result = call("score", "--model", other, "--data", place["privacy"], "--examples", 5,
                  "--keep-top", 0.05, "--out", tmp_path / "scores", "--quiet")  # fmt: skip
    assert result.exit_code == 0
    refused(
        call("couple", "--first", run_folder / "scores" / "fairness", "--ratio", 0.05,
             "--second", tmp_path / "scores", "--out", tmp_path / "mask"),
        "scores must be of one model, got two that differ in name ('model' and 'other'); score",
    )  # fmt: skip


@pytest.mark.parametrize("command", ["couple", "apply", "patch"])
def test_an_edit_says_how_it_is_measured(place, run_folder, tmp_path, command):
    scores, mask = run_folder / "scores", ["--mask", run_folder / "mask"]
    asked = {
        "couple": ["--first", scores / "fairness", "--second", scores / "privacy", "--ratio", 0.05],
        "apply": ["--model", place["model"], *mask],
        "patch": ["--checkpoint", place["model"], *mask],
    }[command]
    asked = [command, *asked, "--out", tmp_path / "out", "--overwrite"]
    told = call(*asked).stderr
    named = set(re.findall(r"`?fastdean ([a-z]+)", told))
    assert named and named <= {each.name or each.callback.__name__ for each in every_command()}
    (typed,) = re.findall(r"changes and costs: (.*?) \(ability", told)
    words = shlex.split(typed)
    # Without --model there is none to name.
    model = "MODEL" if command == "couple" else str(place["model"])
    made = tmp_path / "out" if command == "couple" else run_folder / "mask"
    assert words[:6] == ["fastdean", "eval", "--model", model, "--mask", str(made)]
    options = {word for word in words if word.startswith("--")}
    assert options <= set(re.findall(r"--[\w-]+", call("eval", "--help").stdout))
    assert "measure" not in call(*asked, "--quiet").stderr


def every_command():
    groups = [cli.app, *(group.typer_instance for group in cli.app.registered_groups)]
    return [each for group in groups for each in group.registered_commands]


def test_couple_without_general_scores_spares_nothing(run_folder, tmp_path):
    scores = run_folder / "scores"
    asked = ["--first", scores / "fairness", "--second", scores / "privacy", "--ratio", 0.05]
    told = call("couple", *asked, "--out", tmp_path / "a").stderr
    assert "coupled" in told and "spared" not in told
    told = call("couple", *asked, "--general", scores / "general", "--out", tmp_path / "b").stderr
    assert "spared" in told


def test_score_and_couple_give_the_mask_of_the_run(place, run_folder, tmp_path):
    for name in ("fairness", "privacy", "general"):
        result = call(
            "score", "--model", place["model"], "--data", place[name], "--out", tmp_path / name,
            "--examples", 5, "--keep-top", 0.05, "--quiet", "--json",
        )  # fmt: skip
        assert result.exit_code == 0
        assert json.loads(result.stdout)["data"]["sources"] == [place[name].name]
    for folder in (tmp_path, run_folder / "scores"):
        result = call(
            "couple", "--first", folder / "fairness", "--second", folder / "privacy",
            "--general", folder / "general", "--ratio", 0.05, "--out", tmp_path / "mask",
            "--overwrite", "--json",
        )  # fmt: skip
        mask = NeuronMask.from_pretrained(tmp_path / "mask")
        assert mask == NeuronMask.from_pretrained(run_folder / "mask")
        assert json.loads(result.stdout)["weights"] == len(mask)


def test_nothing_that_is_published_says_where_it_lay(place, tmp_path):
    home = str(place["model"].parent.parent)
    out = tmp_path / "run"
    assert call("run", *sources(place), "--out", out, *OPTIONS).exit_code == 0
    arguments = ["--model", place["model"], "--data", f"{place['privacy']}::prompt=prompt"]
    result = call("score", *arguments, "--out", tmp_path / "one", "--keep-top", "0.05", "--quiet")
    assert result.exit_code == 0, result.stderr
    told = [path for path in tmp_path.rglob("*") if path.is_file()]
    told = [path for path in told if home.encode() in path.read_bytes()]
    # What the run is resumed by stays where it is.
    assert [path.name for path in told] == ["fastdean_run.json"]
    command = json.loads((out / "results.json").read_text("utf-8"))["command"]
    assert "fastdean" in command


def test_couple_chooses_by_signs_of_scores_that_have_them(place, tmp_path):
    def score(name, *options):
        result = call(
            "score", "--model", place["model"], "--data", place[name], "--out", tmp_path / name,
            "--examples", 5, "--keep-top", 0.05, "--quiet", "--overwrite", *options,
        )  # fmt: skip
        assert result.exit_code == 0, result.stderr

    command = [
        *("couple", "--first", tmp_path / "fairness", "--second", tmp_path / "privacy"),
        *("--ratio", 0.05, "--overwrite", "--json", "--out", tmp_path / "mask"),
    ]
    for name in ("fairness", "privacy"):
        score(name)
    told = "--signs must be 'any' for scores without signs, got 'same' and none in the first"
    refused(call(*command, "--signs", "same"), told)
    for name in ("fairness", "privacy"):
        score(name, "--signs")
    kept = {}
    for signs in ("any", "same", "opposite"):
        table = json.loads(call(*command, "--signs", signs).stdout)["table"]
        kept[signs] = sum(row["kept"] for row in table)
        assert sum(row["same"] + row["opposite"] for row in table) == kept["any"]
    assert kept["same"] + kept["opposite"] == kept["any"] > 0


def test_couple_takes_the_whole_unit_where_asked(place, tmp_path):
    for name in ("fairness", "privacy"):
        result = call(
            "score", "--model", place["model"], "--data", place[name], "--out", tmp_path / name,
            "--examples", 5, "--granularity", "unit", "--keep-top", 1, "--quiet",
        )  # fmt: skip
        assert result.exit_code == 0, result.stderr
    command = [
        *("couple", "--first", tmp_path / "fairness", "--second", tmp_path / "privacy"),
        *("--ratio", 0.2, "--model", place["model"], "--overwrite", "--out", tmp_path / "mask"),
    ]
    sizes = {}
    for unit_weights in ("down", "all"):
        assert call(*command, "--unit-weights", unit_weights).exit_code == 0
        mask = NeuronMask.from_pretrained(tmp_path / "mask")
        kinds = {name.split(".")[-2] for name in mask.entries}
        assert kinds == ({"down_proj"} if unit_weights == "down" else set(GATED))
        sizes[unit_weights] = len(mask)
    assert sizes["all"] == 3 * sizes["down"]
    refused(call(*command, "--unit-weights", "some"), "--unit-weights must be 'down' or 'all'")


@pytest.mark.parametrize(
    ("granularity", "options", "text"),
    [
        ("weight", ["--unit-weights", "all"], "got 'all'; score with --granularity unit"),
        ("weight", ["--scope", "model"], "--scope model must have dense scores"),
        ("weight", ["--scope", "model"], "scores made with --keep-top; the model's"),
        ("weight", ["--ratio", 0.3], "than --keep-top 0.1 kept of"),
        ("weight", ["--ratio", 0.3], "score again with a larger --keep-top"),
        ("unit", ["--ratio", 0.05, "--unit-weights", "all"], "--model must be given with "),
        ("unit", ["--ratio", 0.05, "--unit-weights", "all"], "projections only, pass --model"),
    ],
)
def test_couple_advises_in_flags_also_of_the_command_that_scored(
    scores_of_both_kinds, tmp_path, granularity, options, text
):
    """In those of Python's functions a user of the command line has nothing to type."""
    scores = scores_of_both_kinds / granularity
    result = call("couple", "--first", scores, "--second", scores, "--out", tmp_path, *options)
    told = [line for line in result.stderr.splitlines() if "same examples" not in line]
    assert result.exit_code == 2 and len(told) == 1 and text in told[0], result.stderr
    assert not re.search(r"\b\w+=|_", told[0].split(" kept of ")[0])


@pytest.fixture(scope="module")
def scores_of_both_kinds(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("scores")
    for granularity in ("weight", "unit"):
        result = call(
            "score", "--model", place["model"], "--data", place["privacy"], "--examples", 3,
            "--granularity", granularity, "--keep-top", 0.1, "--out", out / granularity, "--quiet",
        )  # fmt: skip
        assert result.exit_code == 0, result.stderr
    return out


def test_score_takes_all_rows_where_more_are_asked_for(place, tmp_path, caplog):
    result = call(
        "score", "--model", place["model"], "--data", place["privacy"], "--out", tmp_path / "s",
        "--examples", 99, "--quiet", "--json",
    )  # fmt: skip
    assert json.loads(result.stdout)["data"]["examples"] == 10
    assert "has 10 rows, fewer than the 99 asked for: all are taken" in caplog.text


def test_apply_and_patch_give_the_same_tensors(place, run_folder, tmp_path):
    mask = run_folder / "mask"
    assert (
        call("apply", "--model", place["model"], "--mask", mask, "--out", tmp_path / "a").exit_code
        == 0
    )
    result = call(
        "patch", "--checkpoint", place["model"], "--mask", mask, "--out", tmp_path / "p", "--json"
    )
    assert " values edited in 1 file; the copy is in " in result.stderr
    applied = load_file(tmp_path / "a" / "model.safetensors")
    patched = load_file(tmp_path / "p" / "model.safetensors")
    original = load_file(place["model"] / "model.safetensors")
    assert applied.keys() == patched.keys()
    for name, value in applied.items():
        assert torch.equal(value, patched[name]), name
    edited = sum(int((value != original[name]).sum()) for name, value in applied.items())
    assert (
        json.loads(result.stdout)["values_edited"]
        == edited
        == len(NeuronMask.from_pretrained(mask))
    )
    assert (tmp_path / "a" / "tokenizer.json").is_file()


def publish(cache, repo, folder):
    """A folder as a download of the hub's repository leaves it in the cache."""
    commit = "5" * 40
    home = cache / f"models--{repo.replace('/', '--')}"
    (home / "snapshots" / commit).mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    shutil.copytree(folder, home / "blobs")
    for file in (home / "blobs").iterdir():
        (home / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{file.name}")


EDITORS = [("apply", "--model"), ("patch", "--checkpoint")]


@pytest.mark.parametrize(("command", "option"), EDITORS)
def test_models_and_masks_of_the_hub_are_edited(
    place, run_folder, tmp_path, monkeypatch, command, option
):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    model = shutil.copytree(place["model"], tmp_path / "model")
    (model / "LICENSE").write_text("terms", "utf-8")
    publish(tmp_path / "cache", "lab/model", model)
    publish(tmp_path / "cache", "lab/mask", run_folder / "mask")
    hub = (command, option, "lab/model", "--mask", "lab/mask", "--revision", "main")
    result = call(*hub, "--out", tmp_path / "hub")
    assert result.exit_code == 0, result.stderr
    local = (command, option, place["model"], "--mask", run_folder / "mask")
    assert call(*local, "--out", tmp_path / "local").exit_code == 0
    hub, local = (tmp_path / name / "model.safetensors" for name in ("hub", "local"))
    assert hub.read_bytes() == local.read_bytes()
    card = (hub.parent / "README.md").read_text("utf-8")
    assert card.startswith('---\nlibrary_name: transformers\nbase_model: "lab/model"\n')
    assert (hub.parent / "LICENSE").read_text("utf-8") == "terms"
    assert "base_model" not in (local.parent / "README.md").read_text("utf-8")
    result = call(command, option, "nobody/no", "--mask", run_folder / "mask", "--out", "out")
    refused(result, f"fastdean: {option} must be a ")
    assert "reachable hub id" in result.stderr and "'nobody/no'" in result.stderr
    assert "local_files_only" not in result.stderr


@pytest.mark.parametrize(("command", "option"), EDITORS)
def test_an_edited_model_comes_with_a_card(place, run_folder, tmp_path, command, option):
    model = shutil.copytree(place["model"], tmp_path / "model")
    (model / "README.md").write_text("the model's own card", "utf-8")
    licences = ("LICENSE", "LICENCE.txt", "NOTICE", "license_of_base.md", "USE_POLICY.md")
    for name in licences:
        (model / name).write_text(f"terms of {name}", "utf-8")
    (model / "notes.txt").write_text("no licence", "utf-8")
    out, mask = tmp_path / "out", run_folder / "mask"
    result = call(command, option, model, "--mask", mask, "--out", out)
    assert result.exit_code == 0, result.stderr
    card = (out / "README.md").read_text("utf-8")
    weights = len(NeuronMask.from_pretrained(mask))
    assert f"`model` with {weights:,} of its weights set to zero" in card
    assert str(tmp_path) not in card and "**Content warning.**" in card
    assert (out / "README.source.md").read_text("utf-8") == "the model's own card"
    for name in licences:
        assert (out / name).read_text("utf-8") == f"terms of {name}"
    # What is loaded and saved anew takes nothing else of the folder along.
    assert (out / "notes.txt").exists() == (command == "patch")
    listed = json.loads((out / "fastdean_patch.json").read_text("utf-8"))["sha256"]
    assert listed.keys() == {file.name for file in out.iterdir()} - {"fastdean_patch.json"}


def test_apply_follows_no_link_of_a_licence_out_of_the_model(place, run_folder, tmp_path, caplog):
    """The copy may be published."""
    model = shutil.copytree(place["model"], tmp_path / "model")
    (tmp_path / "secret").write_text("of another", "utf-8")
    (model / "LICENSE").symlink_to(tmp_path / "secret")
    arguments = ["--model", model, "--mask", run_folder / "mask", "--out", tmp_path / "out"]
    assert call("apply", *arguments).exit_code == 0
    assert not (tmp_path / "out" / "LICENSE").exists()
    assert "LICENSE of the model is a link out of its folder and left out" in caplog.text


def test_an_edited_model_is_replaced_by_another_edit_and_no_other_folder_is(
    place, run_folder, tmp_path
):
    out = tmp_path / "out"
    for (command, option), overwrite in zip(EDITORS * 2, [False, True, True, True], strict=True):
        arguments = (command, option, place["model"], "--mask", run_folder / "mask", "--out", out)
        if overwrite:
            refused(call(*arguments), "which holds an edited model already, finished; use that")
        assert call(*arguments, *(["--overwrite"] if overwrite else [])).exit_code == 0
    (out / "notes.txt").write_text("mine")
    for command, option in EDITORS:
        arguments = (command, option, place["model"], "--mask", run_folder / "mask", "--out", out)
        refused(call(*arguments, "--overwrite"), "out must be a ")
    assert (out / "notes.txt").read_text() == "mine"


def test_apply_says_where_a_model_was_masked_already(place, run_folder, tmp_path):
    arguments = ["--mask", run_folder / "mask", "--json"]
    once = call("apply", "--model", place["model"], *arguments, "--out", tmp_path / "once")
    again = call("apply", "--model", tmp_path / "once", *arguments, "--out", tmp_path / "again")
    weights = json.loads(once.stdout)["weights"]
    assert json.loads(once.stdout)["values_edited"] == weights
    assert json.loads(again.stdout)["values_edited"] == 0
    assert f"changed nothing: all {weights} values are zero already" in again.stderr
    assert "applied" in once.stderr and "applied" not in again.stderr


def test_masks_of_another_model_are_refused(place, run_folder, tmp_path):
    other = save_model(tmp_path / "other", lambda: tiny_models.llama(seed=1))
    shape = save_model(tmp_path / "shape", tiny_models.gpt2)
    mask = ["--mask", run_folder / "mask", "--out", tmp_path / "out"]
    refused(call("apply", "--model", other, *mask), "model.layers.0.mlp")
    refused(call("patch", "--checkpoint", other, *mask), "another model or already patched")
    refused(call("apply", "--model", shape, *mask), "model.layers.0.mlp")
    refused(call("patch", "--checkpoint", shape, *mask), "mask must name tensors of the checkpoint")
    assert not (tmp_path / "out").exists()


def cut(file):
    file.write_bytes(file.read_bytes()[:-20])


def test_truncated_and_foreign_files_are_refused(place, run_folder, tmp_path):
    mask = shutil.copytree(run_folder / "mask", tmp_path / "mask")
    cut(mask / "mask.safetensors")
    scores = shutil.copytree(run_folder / "scores" / "privacy", tmp_path / "scores")
    (scores / "scores.safetensors").write_bytes(b"something else")
    model = shutil.copytree(place["model"], tmp_path / "model")
    cut(model / "model.safetensors")
    good, out = run_folder / "mask", ["--out", tmp_path / "out"]
    text = "mask.safetensors' must be a whole safetensors file, got a truncated"
    refused(call("apply", "--model", place["model"], "--mask", mask, *out), text)
    refused(call("patch", "--checkpoint", place["model"], "--mask", mask, *out), text)
    refused(
        call("couple", "--first", scores, "--second", scores, *out),
        "scores.safetensors' must be a whole safetensors file",
    )
    refused(
        call("patch", "--checkpoint", model, "--mask", good, *out), "got a truncated or foreign one"
    )
    refused(call("apply", "--model", model, "--mask", good, *out), "model must be a Hugging Face")
    refused(
        call("couple", "--first", good, "--second", good, *out), "must be a folder of kind 'scores'"
    )
    assert not (tmp_path / "out").exists()


def test_a_full_disk_while_a_model_is_saved_leaves_nothing(
    place, run_folder, tmp_path, monkeypatch
):
    from safetensors import SafetensorError

    def save_file(*args, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", save_file)
    result = call(
        "apply", "--model", place["model"], "--mask", run_folder / "mask", "--out", tmp_path / "out"
    )
    refused(result, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_saved_model_without_the_masked_values_is_not_handed_over(
    place, run_folder, tmp_path, monkeypatch
):
    from transformers import LlamaForCausalLM

    real = LlamaForCausalLM.save_pretrained

    def save_pretrained(model, folder, **options):
        model.model.layers[1].mlp.down_proj.weight.data.add_(1)
        real(model, folder, **options)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save_pretrained)
    result = call(
        "apply", "--model", place["model"], "--mask", run_folder / "mask", "--out", tmp_path / "out"
    )
    refused(result, "must hold the masked values of 'model.layers.1.mlp.down_proj.weight'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device"),
        (
            running.Terminated(),
            143,
            "terminated; what is finished is kept, run the same command",
        ),
        (KeyboardInterrupt(), 130, "interrupted; what is finished is kept, run the same command"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "CUDA out of memory"),
    ],
)
def test_a_run_that_stops_is_one_line_and_goes_on_later(
    place, run_folder, tmp_path, monkeypatch, error, code, text
):
    from fastdean.jobs.coupling import steps

    real = steps.couple

    def couple(*args, **options):
        raise error

    monkeypatch.setattr(steps, "couple", couple)
    command = ["run", *sources(place), "--out", tmp_path / "run", *OPTIONS]
    result = call(*command)
    assert result.exit_code == code and result.stdout == ""
    assert text in result.stderr and len(result.stderr.splitlines()) == 1
    monkeypatch.setattr(steps, "couple", real)
    monkeypatch.setattr(steps, "score_sets", None)
    assert call(*command).exit_code == 0
    mask = NeuronMask.from_pretrained(tmp_path / "run" / "mask")
    assert mask == NeuronMask.from_pretrained(run_folder / "mask")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [(running.Terminated(), 143, "terminated"), (KeyboardInterrupt(), 130, "interrupted")],
)
@pytest.mark.parametrize("order", ["layers", "batches"])
def test_a_scoring_that_stops_says_whether_it_goes_on_and_how(
    place, tmp_path, monkeypatch, error, code, text, order
):
    """Layer by layer it does; batch by batch nothing is kept."""
    out = tmp_path / "a b"
    data = ("--model", place["model"], "--data", place["privacy"], "--quiet")
    command = ["score", *map(str, data), "--order", order, "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["fastdean", *command])
    where = (Sweep, "_backward") if order == "layers" else (by_batches, "_add_block")
    with monkeypatch.context() as patch:

        def stop(*_, **__):
            raise error

        patch.setattr(*where, stop)
        result = call(*command)
    assert result.exit_code == code
    goes_on = "; what is finished is kept, run the same command to go on: fastdean score --model"
    assert result.stderr.splitlines()[-1].startswith(f"fastdean: {text}")
    assert (goes_on in result.stderr) == (order == "layers") == out.exists()
    assert order != "layers" or result.stderr.endswith(f"--order layers --out '{out}'\n")
    assert call(*command).exit_code == 0


@pytest.mark.parametrize("error", [TypeError("unhashable"), RuntimeError("size"), KeyError("k")])
def test_a_fault_of_ours_shows_its_traceback(place, tmp_path, monkeypatch, error):
    """Raised outside the package, as by a library that was called wrongly."""

    def numbered_rows(*_, **__):
        raise error

    monkeypatch.setattr("fastdean.jobs.rows.numbered_rows", numbered_rows)
    result = call("run", *sources(place), "--out", tmp_path / "out", *OPTIONS)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr and type(error).__name__ in result.stderr


def test_debug_shows_the_traceback_of_bad_input(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTDEAN_VERBOSITY", "debug")
    result = call("report", tmp_path)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr and "\nfastdean: '" in result.stderr


def test_libraries_cannot_write_to_stdout(place, run_folder, tmp_path, monkeypatch):
    from fastdean import report

    def write_report(*args):
        print("a library speaks")

    monkeypatch.setattr(report, "write_report", write_report)
    result = call("report", run_folder, "--out", tmp_path / "r.html", "--json")
    assert json.loads(result.stdout) == {"out": str(tmp_path / "r.html")}
    assert "a library speaks" in result.stderr


def test_a_report_replaces_an_earlier_one_and_no_other_file(run_folder, tmp_path):
    out = tmp_path / "page.html"
    assert call("report", run_folder, "--out", out).exit_code == 0
    assert call("report", run_folder, "--out", out).exit_code == 0
    mine = tmp_path / "notes.html"
    mine.write_text("<!DOCTYPE html><p>mine</p>")
    refused(call("report", run_folder, "--out", mine), "must be a new file or an earlier report")
    assert mine.read_text() == "<!DOCTYPE html><p>mine</p>"


def test_a_way_round_a_folder_that_is_not_there_leads_to_the_same_one(place, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    command = ["run", *sources(place), "--out", tmp_path / "new" / ".." / "mine", *OPTIONS]
    refused(call(*command), "which holds other files")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]


@pytest.mark.parametrize(
    "ignored, number, exit_code",
    [("SIGUSR1", "SIGTERM", 143), ("SIGUSR1", "SIGHUP", 129), ("SIGHUP", "SIGHUP", 0)],
    ids=["terminated", "terminal_closed", "nohup"],
)
def test_a_terminated_patch_leaves_nothing(run_folder, tmp_path, ignored, number, exit_code):
    code = f"""
        import os, signal, sys
        from fastdean.masks import patched_copy
        from fastdean import cli
        # As a terminal starts its programs: whoever runs the tests may ignore the signal.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.{ignored}, signal.SIG_IGN)
        copy = patched_copy._copy_file
        def copy_file(*arguments):
            os.kill(os.getpid(), signal.{number})
            copy(*arguments)
        patched_copy._copy_file = copy_file
        sys.argv = ["fastdean", *sys.argv[1:]]
        cli.main()
    """
    model = json.loads((run_folder / "fastdean_run.json").read_text())["job"]["model"]
    arguments = ["--checkpoint", model, "--mask", run_folder / "mask", "--out", tmp_path / "out"]
    done = forked.run_script(textwrap.dedent(code), "patch", *map(str, arguments))
    assert done.returncode == exit_code, done.stderr
    if exit_code:
        assert done.stderr.splitlines()[-1] == "fastdean: terminated"
    assert [path.name for path in tmp_path.iterdir()] == ([] if exit_code else ["out"])


def test_report_draws_again(run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    (folder / "report.html").unlink()
    assert call("report", folder).exit_code == 0
    assert (folder / "report.html").read_text() == (run_folder / "report.html").read_text()
    (folder / "results.json").write_text("[1]")
    refused(call("report", folder), "results.json' must hold an object, got [1]")
    refused(
        call("report", tmp_path / "no"), "got no such file; pass the results.json of a finished"
    )
    refused(call("report", run_folder, "--out", tmp_path / "no" / "r.html"), "existing folder")


def test_info_says_once_why_an_implementation_does_not_run():
    rows = re.findall(r"^(?:[a-z_]+| ) .*not triton.*$", call("info").stdout, re.MULTILINE)
    assert rows and all(row.count("not triton") == 1 for row in rows)
    from fastdean.info import _dispatch_lines

    others = [("triton", "slow here"), ("reference", "another one is preferred")]
    row = {"op": "a", "chosen": "native", "reason": "not triton: slow here", "others": others}
    assert list(_dispatch_lines([row])) == [
        ("a", "native", "not triton: slow here"),
        ("", "not reference", "another one is preferred"),
    ]


def test_info_prints_tables_or_json():
    text, document = call("info"), call("info", "--json")
    assert "fastdean" in text.stdout and text.exit_code == 0
    assert json.loads(document.stdout)["fastdean"] == fastdean.__version__


COMMANDS = ("demo", "run", "score", "couple", "apply", "patch", "report", "info")


def plain(text):
    """Help without its frames, on one line."""
    return " ".join(text.replace("│", " ").split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_an_example(command):
    result = call(command, "--help")
    assert result.exit_code == 0
    assert f"Example: fastdean {command}" in plain(result.stdout)


@pytest.mark.parametrize(
    ("command", "job"),
    [("run", Job), ("score", ScoreJob), ("collapse", CollapseJob), ("debias", DebiasJob)],
)
def test_every_field_of_a_job_is_an_option_with_its_help(command, job):
    text = plain(call(command, "--help", env={"COLUMNS": "999"}).stdout)
    for name, hint in get_type_hints(job, include_extras=True).items():
        (said,) = hint.__metadata__
        flag = said.flag or f"--{name.replace('_', '-')}"
        assert re.search(rf" {flag} +\S+ +{re.escape(said.text)} ", text), name


@pytest.mark.parametrize("options", [[], ["--quiet"]])
def test_quiet_silences_the_bars_that_libraries_draw(place, tmp_path, monkeypatch, options):
    """Reading GGUF and writing shards draw bars that no option of transformers reaches."""
    monkeypatch.delenv("TQDM_DISABLE", raising=False)

    def load(*args, **kwargs):
        for bar in (tqdm.tqdm, tqdm.auto.tqdm):
            for _ in bar([1], desc="foreign", disable=False):
                pass
        raise ValueError("model must be another")

    monkeypatch.setattr(coupling_scoring, "load_or_stream", load)
    asked = ["--model", place["model"], "--data", place["privacy"], "--out", tmp_path / "out"]
    result = call("score", *asked, *options)
    assert result.exit_code == 2
    # In a log, as here, they would stand between our lines.
    assert "foreign: 100%" not in result.stderr
    monkeypatch.setattr(bars, "_can_redraw", lambda: True)
    result = call("score", *asked, *options)
    assert ("foreign: 100%" in result.stderr) is (options == [])
    # And only while the command runs.
    assert not tqdm.tqdm([1], disable=False, file=io.StringIO()).disable


@pytest.mark.parametrize("command", ["apply", "couple", "patch"])
def test_what_loads_or_copies_a_model_can_be_quiet(command):
    assert "--quiet" in plain(call(command, "--help").stdout)


def test_states_that_cannot_lie_where_they_should_name_the_flag(place, tmp_path):
    options = ["--order", "layers", "--states", "/proc/x", "--out", tmp_path / "out"]
    result = call("score", "--model", place["model"], "--data", place["privacy"], *options)
    assert result.exit_code == 2
    assert "fastdean: --states must be a folder that can be made" in result.stderr


def test_help_tells_the_exit_codes():
    text = plain(call("--help").stdout)
    for said in (
        "0 done",
        "1 a fault of FastDEAN",
        "2 the request cannot",
        "130 interrupted",
        "143 terminated",
    ):
        assert said in text
    for command in COMMANDS:
        assert command in text


ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(fastdean.__file__).parent.parent),
    "OMP_NUM_THREADS": "1",
}


def start(*args, **environment):
    """`python -m fastdean` as a process of its own, with progress bars as a user sees them."""
    inherited = {k: v for k, v in ENVIRONMENT.items() if k not in ("TQDM_DISABLE",)}
    return subprocess.Popen(
        [sys.executable, "-m", "fastdean", *map(str, args)],
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout, stderr


def test_as_a_process_it_writes_json_to_stdout_and_nothing_foreign_to_stderr(place, tmp_path):
    command = ["score", "--model", place["model"], "--data", place["privacy"], "--json"]
    code, stdout, stderr = finish(start(*command, "--out", tmp_path / "a", "--examples", 99))
    assert code == 0
    assert json.loads(stdout)["out"] == str(tmp_path / "a")
    # No terminal, no bars.
    assert "\r" not in stderr
    assert stderr.splitlines() == [
        "fastdean: step 1 of 3, read data",
        f"fastdean: {place['privacy']} has 10 rows, fewer than the 99 asked for: all are taken",
        "fastdean: step 2 of 3, load model",
        "fastdean: step 3 of 3, score",
        "Scores(6 matrices, 12,288 weights, n=10 examples, top 0.001 of each matrix)",
        f"written to {tmp_path / 'a'}",
    ]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def ranks(args, **environment):
    """The command as two ranks of one job; what each gave."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    shared |= environment
    processes = [
        forked.start(
            forked.run_command, *map(str, args(rank)), environment={**shared, "RANK": str(rank)}
        )
        for rank in range(2)
    ]
    try:
        return [process.finish() for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_two_ranks_resume_and_give_the_mask_of_one_and_only_the_first_speaks(
    place, run_folder, tmp_path
):
    out = shutil.copytree(run_folder, tmp_path / "run")
    state = json.loads((out / "fastdean_run.json").read_text()) | {"finished": False}
    (out / "fastdean_run.json").write_text(json.dumps(state))
    shutil.rmtree(out / "scores" / "privacy")
    shutil.rmtree(out / "mask")
    # How long they wait for each other is no part of what was asked for.
    waiting = ("--rank-timeout", 100)
    command = ["run", *sources(place), "--out", out, *OPTIONS, *waiting, "--json"]
    first, second = ranks(lambda rank: command)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    results = json.loads(first[1])
    assert second[1:] == ("", "")
    assert "%|" not in first[2] and results["findings"][0] in first[2]
    assert results["command"].startswith("torchrun --nproc-per-node 2 --module fastdean ")
    assert [row["step"] for row in results["cost"] if row["seconds"] is None] == [
        "score fairness, by an earlier call",
        "score general, by an earlier call",
    ]
    # The ranks' sums are added in another order: the same sets here, values to rounding.
    assert NeuronMask.from_pretrained(out / "mask") == NeuronMask.from_pretrained(
        run_folder / "mask"
    )


@pytest.mark.parametrize(
    ("ranks_in_all", "ranks_here", "launcher"),
    [
        ("1", "1", ""),
        ("8", "8", "torchrun --nproc-per-node 8 --module "),
        ("8", "4", "torchrun --nnodes 2 --nproc-per-node 4 --module "),
    ],
)
def test_the_recorded_command_starts_as_many_ranks(monkeypatch, ranks_in_all, ranks_here, launcher):
    monkeypatch.setenv("WORLD_SIZE", ranks_in_all)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks_here)
    monkeypatch.setattr(sys, "argv", ["/somewhere/fastdean", "demo", "--out", "a b"])
    assert running.command_line() == f"{launcher}fastdean demo --out 'a b'"


@pytest.mark.parametrize(
    ("gpus", "rank", "backend", "taken"),
    [
        (0, "1", "gloo", []),
        (2, "1", "cpu:gloo,cuda:nccl", [1]),
        # More ranks than GPUs, as of a job on the CPU.
        (1, "1", "cpu:gloo,cuda:nccl", []),
    ],
)
def test_ranks_can_talk_from_every_device_there_is(monkeypatch, gpus, rank, backend, taken):
    started, set_device = [], []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", set_device.append)
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(None, 1, 2)]))
    monkeypatch.setattr(fresh_store, "fresh_store", lambda *_: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda b, **_: started.append(b))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: started.append("end"))
    with running.process_group():
        assert started == [backend] and set_device == taken
    assert started == [backend, "end"]


def test_bad_input_of_one_rank_ends_both(place, tmp_path):
    def command(rank):
        source = place["privacy"] if rank else tmp_path / "nowhere.csv"
        return ["run", *sources(place, privacy=source), "--out", tmp_path / "run", *OPTIONS]

    first, second = ranks(command)
    assert (first[0], second[0]) == (2, 2)
    assert "--privacy must be an existing file" in first[2]
    assert second[2].startswith("fastdean (rank 1): ") and "got 1 of 2 that failed" in second[2]
    assert not (tmp_path / "run").exists()


def soon_given_up(_, *arguments):
    lost_ranks._SOON = 0.3
    forked.run_command(*arguments)


def stopped_in(step, command, *arguments):
    def stop(*_, **__):
        os.kill(os.getpid(), signal.SIGSTOP)

    setattr(coupling_scoring if command == "score" else coupling_steps, step, stop)
    forked.run_command(command, *arguments)


@pytest.mark.parametrize(
    ("command", "step"), [("score", "take_rows"), ("score", "score"), ("run", "score_sets")]
)
def test_a_rank_that_hangs_is_named_in_time(command, step, place, tmp_path):
    data = ("--data", place["privacy"]) if command == "score" else (*sources(place), *OPTIONS[:2])
    if command == "score":
        data = ("--model", place["model"], *data)
    words = [command, *data, "--out", tmp_path / "out", "--rank-timeout", 1.5, "--quiet"]
    both = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    started = [
        forked.start(act, step, *map(str, words), environment={**both, "RANK": str(rank)})
        for rank, act in enumerate((soon_given_up, stopped_in))
    ]
    try:
        code, _, told = started[0].finish()
    finally:
        for process in started:
            process.kill()
        started[1].finish()
    assert code == 2, told
    assert told.startswith("fastdean: every rank must stay to the end of the job, got no answer")
    assert "from rank 1 of 2 within" in told and len(told.splitlines()) == 1


@pytest.mark.parametrize("command", ["score", "run"])
def test_a_time_limit_that_is_none_is_refused_by_flag(command, place, tmp_path):
    data = ("--model", place["model"], "--data", place["privacy"])
    data = sources(place) if command == "run" else data
    result = call(command, *data, "--out", tmp_path / "out", "--rank-timeout", 0)
    assert result.exit_code == 2
    told = "fastdean: --rank-timeout must be a number of seconds above 0, got 0.0; "
    assert result.stderr.startswith(told)


def test_one_row_files_of_unsafe_pairs_measure_without_intervals(place, tmp_path):
    """The smallest run there is: nothing to resample."""
    small = {
        name: write_jsonl(tmp_path / f"{name}.jsonl", rows(1, 0, unsafe=name != "general"))
        for name in ("fairness", "privacy", "general")
    }
    options = ("--ratio", "0.05", "--examples", "1", "--eval-examples", "1", "--quiet")
    result = call(
        "run", *sources(place, **small), "--rule", "first", "--out", tmp_path / "run", *options
    )
    assert result.exit_code == 0 and "nan" not in result.stderr.lower()


@pytest.mark.parametrize("name", ["run", "score", "collapse", "debias", "couple", "apply"])
def test_no_command_runs_a_models_code_unless_told_to(
    name, place, run_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    marker = tmp_path / "ran"
    model = save_model_with_code(tmp_path / "own", marker)
    scores = run_folder / "scores"
    options = {
        "run": [*sources({k: v for k, v in place.items() if k != "model"}), *OPTIONS],
        "score": ["--data", place["privacy"], "--examples", 5, "--quiet"],
        "collapse": ["--text", place["privacy"], "--quiet"],
        "debias": ["--method", "causal", "--quiet"],
        "couple": ["--first", scores / "fairness", "--second", scores / "privacy"],
        "apply": ["--mask", run_folder / "mask"],
    }[name]
    arguments = [name, "--model", model, *options, "--out", tmp_path / "out"]
    result = CliRunner().invoke(cli.app, [str(arg) for arg in arguments], input="y\n" * 9)
    refused(result, "model must come without Python code of its own")
    assert "--trust-remote-code" in result.stderr
    assert not marker.exists() and not (tmp_path / "out").exists()


def test_a_models_code_is_run_where_the_command_says_so(place, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    marker = tmp_path / "ran"
    result = call(
        "score", "--model", save_model_with_code(tmp_path / "own", marker),
        "--data", place["privacy"], "--examples", 5, "--out", tmp_path / "out", "--quiet",
        "--trust-remote-code", "--json",
    )  # fmt: skip
    assert marker.exists()
    assert json.loads(result.stdout)["model"]["trust_remote_code"] is True


@pytest.mark.parametrize("name", ["run", "score"])
def test_a_preview_shows_an_example_of_each_source_and_does_nothing_else(
    name, place, tmp_path, monkeypatch
):
    def load_model(*args, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("fastdean.jobs.session.load_model", load_model)
    chats = [{"text": f"w{n} \x1b[31m w2"} for n in range(5)]
    odd = write_jsonl(tmp_path / "odd.jsonl", chats)
    options = {
        "run": [*sources(place, general=odd), *OPTIONS],
        "score": ["--model", place["model"], "--data", odd, "--examples", 5],
    }[name]
    monkeypatch.chdir(tmp_path)
    result = call(name, *options, "--preview", "--json")
    assert result.exit_code == 0, result.stderr
    shown = json.loads(result.stdout)
    asked = ["fairness", "privacy", "general"] if name == "run" else ["data"]
    assert list(shown["examples"]) == asked
    assert "\x1b" not in result.stderr and "rendered as text" in result.stderr
    assert ("Note: The data sets did not become tokens alike" in result.stderr) == (name == "run")
    assert os.listdir(tmp_path) == ["odd.jsonl"]


@pytest.mark.parametrize("arguments", [["run", "--help"], ["info"], ["run", "--mödel", "├─┤"]])
def test_a_terminal_without_unicode_is_written_to(arguments):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "90"}
    result = subprocess.run(
        [sys.executable, "-m", "fastdean", *arguments], capture_output=True, env=environment
    )
    said = result.stdout + result.stderr
    assert said.isascii() and b"Error" not in said.replace(b"- Error -", b""), said
    assert result.returncode == (2 if "├─┤" in arguments else 0), said


def test_lines_and_letters_fall_back_to_plain_ones():
    from fastdean.cli import terminal

    terminal.codecs.register_error("fastdean", terminal._replaced)
    assert "╭─é×\ud800…│".encode("ascii", "fastdean") == b"+-ex\\ud800...|"


def _run_command_in_ascii(*arguments):
    sys.stdout.reconfigure(encoding="ascii")
    forked.run_command(*arguments)


def test_json_is_exact_where_stdout_knows_no_unicode(place, tmp_path):
    folder = tmp_path / "dönn"
    result = forked.run(
        _run_command_in_ascii, "score", "--model", str(place["model"]), "--data",
        str(place["privacy"]), "--examples", "2", "--out", str(folder), "--quiet", "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["out"] == str(folder)
