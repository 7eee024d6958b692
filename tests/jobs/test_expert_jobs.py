"""Jobs on a mixture of experts: how tokens fell on them, and what a ratio is a share of."""

from __future__ import annotations

import json

import pytest
from tiny_experts import CHOSEN, EXPERTS, experts_model
from tiny_folders import save_model, write_sources
from typer.testing import CliRunner

import fastdean
from fastdean import cli
from fastdean.jobs import run
from fastdean.jobs.coupling.job import Job
from fastdean.report import render_report

QUICK = {"ratio": 0.05, "examples": 5, "eval_examples": 0}
DOWN = "model.layers.1.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    model = save_model(folder / "model", lambda: experts_model("Qwen2Moe"))
    return {"model": str(model), **{n: str(path) for n, path in write_sources(folder).items()}}


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, run(Job(**place, **QUICK), out, progress=False)


def call(*args):
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


def test_results_and_page_say_how_tokens_fell_on_the_experts(finished):
    out, results = finished
    loads = results["expert_load"]
    assert list(loads) == ["fairness", "privacy", "general"]
    for name, rows in loads.items():
        assert [row["layer"] for row in rows] == [0, 1]
        assert all(row["tokens"] == CHOSEN * results["data"][name]["tokens"] for row in rows)
    page = (out / "report.html").read_text()
    assert "Load per expert" in page and "Tokens of privacy by expert" in page
    assert "shared expert" in page
    assert render_report(json.loads((out / "results.json").read_text())) == page


def test_commands_say_the_load_of_each_set_in_a_line(place, tmp_path):
    sources = [part for name, value in place.items() for part in (f"--{name}", value)]
    out = tmp_path / "run"
    told = call("run", *sources, "--out", out, "--ratio", 0.05, "--examples", 5,
                "--eval-examples", 0, "--quiet")  # fmt: skip
    assert told.exit_code == 0, told.stderr
    lines = [line for line in told.stderr.splitlines() if line.startswith("  Experts on ")]
    assert [line.split()[2] for line in lines] == ["fairness:", "privacy:", "general:"]
    assert all(f"2 layers of {EXPERTS} experts: each got " in line for line in lines)
    told = call("score", "--model", place["model"], "--data", place["privacy"], "--examples", 5,
                "--out", tmp_path / "scores", "--quiet")  # fmt: skip
    assert told.exit_code == 0, told.stderr
    lines = told.stderr.splitlines()
    assert sum(line.startswith(f"2 layers of {EXPERTS} experts: each got ") for line in lines) == 1


def test_the_scope_of_a_run_is_that_of_its_scores_and_its_mask(place, finished, tmp_path):
    job = Job(**place, **QUICK, expert_scope="tensor")
    results = run(job, tmp_path / "run", progress=False)
    scores = fastdean.Scores.from_pretrained(tmp_path / "run" / "scores" / "fairness")
    assert scores.expert_scope == "tensor" == results["manifest"]["mask"]["expert_scope"]
    rows = {row["name"]: row for row in results["coupling"]["rows"]}
    by_expert = {row["name"]: row for row in finished[1]["coupling"]["rows"]}
    assert rows[DOWN]["first"] == int(0.05 * rows[DOWN]["numel"]) > by_expert[DOWN]["first"]


def test_a_run_of_another_scope_does_not_go_on(place, finished):
    with pytest.raises(ValueError, match=r"differs in expert_scope='expert' \(now 'tensor'\)"):
        run(Job(**place, **QUICK, expert_scope="tensor"), finished[0], progress=False)
    with pytest.raises(ValueError, match="expert_scope must be one of expert, tensor, got 'layer'"):
        Job(**place, **QUICK, expert_scope="layer")


def test_a_scoring_of_another_scope_does_not_go_on(tmp_path, monkeypatch):
    from tiny_data import batches, make_examples

    from fastdean.coupling.resuming import resumable

    def score(scope):
        fastdean.score(
            experts_model("Mixtral"), batches(make_examples(), 3), order="layers", keep_top=0.02,
            expert_scope=scope, resume=tmp_path / "job", progress=False,
        )  # fmt: skip

    with monkeypatch.context() as patch:
        reached = resumable.Resumable.reached

        def stopping(self, step):
            reached(self, step)
            raise KeyboardInterrupt

        patch.setattr(resumable.Resumable, "reached", stopping)
        with pytest.raises(KeyboardInterrupt):
            score("expert")
    with pytest.raises(ValueError, match="with one that differs in expert_scope; choose another"):
        score("tensor")


def test_score_and_couple_take_the_scope(place, tmp_path):
    def score(name, scope, keep_top):
        told = call("score", "--model", place["model"], "--data", place[name], "--examples", 5,
                    "--expert-scope", scope, "--keep-top", keep_top, "--out", tmp_path / name,
                    "--overwrite", "--quiet", "--json")  # fmt: skip
        assert told.exit_code == 0, told.stderr
        assert json.loads(told.stdout)["expert_scope"] == scope

    def couple(*options):
        return call("couple", "--first", tmp_path / "fairness", "--second", tmp_path / "privacy",
                    "--ratio", 0.05, "--out", tmp_path / "mask", "--overwrite", "--json",
                    *options)  # fmt: skip

    def first(told):
        assert told.exit_code == 0, told.stderr
        return next(r["first"] for r in json.loads(told.stdout)["table"] if r["name"] == DOWN)

    for name in ("fairness", "privacy"):
        score(name, "expert", 1)
    assert first(couple()) == first(couple("--expert-scope", "expert"))
    assert first(couple("--expert-scope", "tensor")) > first(couple())
    for name in ("fairness", "privacy"):
        score(name, "tensor", 0.1)
    assert couple().exit_code == 0
    told = couple("--expert-scope", "expert")
    assert told.exit_code == 2
    assert "--expert-scope must be 'tensor', by which these scores were cut to" in told.stderr


@pytest.mark.parametrize(
    "scope, where",
    [("expert", "1,536 of the largest expert"), ("tensor", "7,680 of the largest matrix")],
)
def test_a_ratio_that_selects_nothing_says_of_what(place, tmp_path, scope, where):
    job = Job(**place, **QUICK | {"ratio": 1e-6}, expert_scope=scope)
    with pytest.raises(ValueError, match=f"selects none of the {where}; the smallest that"):
        run(job, tmp_path / "run", progress=False)
