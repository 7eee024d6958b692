"""`fastdean debias`: the model it saves, the report, resuming, and what it refuses."""

from __future__ import annotations

import json
import re

import pytest
import tiny_models
import tiny_words
import torch
from page_numbers import untraced
from safetensors.torch import load_file
from typer.testing import CliRunner

from fastdean import cli
from fastdean.evaluation import holm
from fastdean.jobs.bias import sentences as bias_sentences
from fastdean.jobs.collapse import training as job_module
from fastdean.models import identity

STEPS = ("--steps", "3", "--batch-size", "4", "--learning-rate", "1e-2")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tiny_words.write_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def masked_place(tmp_path_factory):
    return tiny_words.write_place(tmp_path_factory.mktemp("place"), tiny_models.bert)


def call(place, out, *options, method="causal"):
    arguments = ["debias", "--model", place["model"], "--method", method, "--out", out]
    arguments += ["--data", place["text"], "--words", place["words"], *STEPS]
    arguments += ["--bias", f"crows_pairs={place['crows']}", "--quiet", "--json", *options]
    result = CliRunner().invoke(cli.app, [str(each) for each in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    """A finished job with the regulariser: (its folder, its results)."""
    out = tmp_path_factory.mktemp("run") / "out"
    result = call(place, out, "--collapse-strength", "10")
    assert result.exit_code == 0, result.stderr
    return out, json.loads(result.stdout)


def test_the_model_is_an_ordinary_folder_with_a_card(place, run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, _ = run
    AutoModelForCausalLM.from_pretrained(out / "model")
    AutoTokenizer.from_pretrained(out / "model")
    before, after = weights(place["model"]), weights(out / "model")
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
    card = (out / "model" / "README.md").read_text("utf-8")
    assert "CrowS-Pairs" in card and "on 6 words of words.json, strength 10" in card


def test_the_weights_are_read_once_to_tell_the_model(place, tmp_path, monkeypatch):
    digested, weights_digest = [], identity.weights_digest
    monkeypatch.setattr(
        identity, "weights_digest", lambda model: digested.append(model) or weights_digest(model)
    )
    assert call(place, tmp_path / "out").exit_code == 0
    assert len(digested) == 1


def test_nothing_that_is_published_says_where_it_lay(place, run):
    out, found = run
    home = str(out.parent.parent)
    assert all(home in str(path) for path in place.values())
    told = [
        path for path in out.rglob("*") if path.is_file() and home.encode() in path.read_bytes()
    ]
    # What the job is resumed by stays where it is.
    assert [path.name for path in told] == ["fastdean_run.json"]
    assert found["options"]["bias"] == ["crows_pairs=" + place["crows"].name]
    assert found["model"]["name"] == "model" and "words.json" in found["findings"][0]


def test_the_report_says_what_came_of_it(run):
    out, found = run
    assert found == json.loads((out / "results.json").read_text("utf-8"))
    assert [entry["step"] for entry in found["training"]["history"]] == [1, 2, 3]
    assert all(entry["collapse"] is not None for entry in found["training"]["history"])
    metric = found["collapse"]["metrics"]["nc3_mean"]["values"]
    assert metric["before"] != metric["after"]
    (row,) = found["bias"].values()
    distance = [abs(row[state]["value"] - row["neutral"]) for state in ("before", "after")]
    assert row["change"]["value"] == pytest.approx(distance[1] - distance[0])
    assert row["raw_change"]["value"] == pytest.approx(
        row["after"]["value"] - row["before"]["value"]
    )
    verdict = row["change"]["verdict"]
    assert verdict in (out / "model" / "README.md").read_text("utf-8")
    assert verdict in ("no effect beyond noise", "closer to neutral", "farther from neutral")
    assert row["change"]["interval_method"] == "clopper-pearson of won and lost, change and side"
    assert row["raw_change"]["test"] == "exact McNemar" and row["raw_change"]["p_value"] <= 1
    assert row["raw_change"]["verdict"] in (out / "model" / "README.md").read_text("utf-8")
    assert any(verdict in sentence for sentence in found["findings"])
    assert any("(U)NC3" in sentence for sentence in found["findings"])
    # The change, that of its distance to neutral, and the ratio of perplexities: one family.
    tested = [row["raw_change"], row["change"], found["perplexity"]["masks"]["trained"]]
    assert found["tests"]["tests"] == 3
    assert [each["p_holm"] for each in tested] == pytest.approx(
        holm([each["p_value"] for each in tested])
    )
    card = (out / "model" / "README.md").read_text("utf-8")
    assert "| (U)NC3, std of the words' alignment |" in card and "p (Holm)" in card
    assert "| Perplexity of the measured text |" in card and "ratio " in card
    between = [point["step"] for point in found["training"]["evaluations"]]
    assert between == [0, 1, 3] and "eval" not in found["training"]["history"][0]
    ends = [found["training"]["evaluations"][place]["unc3_std"] for place in (0, -1)]
    assert ends == list(found["collapse"]["metrics"]["unc3_std"]["values"].values())
    # The bias measure's likelihoods, and what was asked for of them.
    assert found["manifest"]["start_token"] == "[BOS]"
    assert found["manifest"]["job"]["start_token"] == "auto"
    saved = json.loads((out / "model" / "fastdean_debias.json").read_text("utf-8"))
    assert saved["start_token"] == "[BOS]"
    assert "start token: '[BOS]'" in row["definition"]
    (fluency,) = (said for said in found["findings"] if said.startswith("Perplexity of the"))
    of = r"before, [\d,.]+ after, ratio \S+ \[\S+, \S+\], Holm-adjusted p = \S+"
    assert re.search(of + r": no verdict from n = 2\.", fluency)
    page = (out / "report.html").read_text("utf-8")
    assert "start token: " in page
    for heading in ("Neural collapse", "Bias measures", "Training"):
        assert f">{heading}</h2>" in page
    assert "The words with the worst alignment" in page and "(U)NC3 over training" in page
    assert untraced(page, found) == []


def test_a_job_goes_on_where_it_was_interrupted(place, run, tmp_path, monkeypatch):
    real = job_module._measure

    def interrupted(state, *args):
        if state == "after":
            raise KeyboardInterrupt
        return real(state, *args)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(job_module, "_measure", interrupted)
        assert call(place, out, "--collapse-strength", "10").exit_code == 130
    result = call(place, out, "--collapse-strength", "10")
    assert result.exit_code == 0, result.stderr
    finished = weights(run[0] / "model")
    assert all(torch.equal(value, finished[name]) for name, value in weights(out / "model").items())
    again = json.loads(result.stdout)
    for key in ("collapse", "bias", "training"):
        assert again[key] == run[1][key]


def test_strength_0_trains_as_if_there_were_no_regulariser(place, run, tmp_path, monkeypatch):
    assert call(place, tmp_path / "zero").exit_code == 0
    zero = weights(tmp_path / "zero" / "model")
    real = job_module.fine_tune

    def without(*args, regularizer, **options):
        regularizer.remove()
        return real(*args, regularizer=None, **options)

    monkeypatch.setattr(job_module, "fine_tune", without)
    assert call(place, tmp_path / "without").exit_code == 0
    plain = weights(tmp_path / "without" / "model")
    assert all(torch.equal(value, plain[name]) for name, value in zero.items())
    regularised = weights(run[0] / "model")
    assert any(not torch.equal(value, regularised[name]) for name, value in zero.items())


def test_a_masked_model_is_debiased_too(masked_place, tmp_path):
    result = call(masked_place, tmp_path / "out", "--collapse-strength", "100", method="bec")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["collapse"]["settings"]["shift"] == "same"
    assert "perplexity" not in " ".join(found["findings"]).lower()


@pytest.mark.parametrize(
    "options, method, text",
    [
        ((), "distil", "'bec' and 'causal' are the plainest"),
        ((), "bec", "bec"),
        (("--collapse-strength", "-1"), "causal", "strength must be"),
        (("--live-features",), "causal", "cumulative"),
        (
            ("--control", "random"),
            "causal",
            "--control must come with a --collapse-strength above 0",
        ),
        (("--save-every", "0"), "causal", "--save-every must be"),
        (("--steps", "0"), "causal", "steps must be"),
        (("--text", "nowhere.jsonl"), "causal", "nowhere.jsonl"),
        (("--seed", "-1"), "causal", "seed must be at least 0, got -1"),
        (("--form", "mine"), "adept", "form must be 'published' or 'paper', got 'mine'"),
        (("--form", "paper"), "causal", "form must be 'published' for method 'causal', got 'pap"),
    ],
)
def test_bad_options_are_refused_and_leave_nothing(place, tmp_path, options, method, text):
    result = call(place, tmp_path / "out", *options, method=method)
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("fastdean: ")]
    assert text in line
    assert not (tmp_path / "out").exists()


def told(result):
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("fastdean: ")]
    return line


def write_rows(path, *rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return path


CHAT = {"messages": [{"role": "user", "content": "she"}, {"role": "assistant", "content": "he"}]}


def test_measured_rows_that_cannot_be_read_are_refused(place, tmp_path):
    text = {"text": "she saw him ."}
    mixed = write_rows(tmp_path / "mixed.jsonl", text, text, CHAT, text, CHAT)
    line = told(call(place, tmp_path / "out", "--text", mixed))
    assert f"--text {str(mixed)!r}: row 3 must hold text" in line
    assert "got a chat (messages)" in line
    chats = write_rows(tmp_path / "chats.jsonl", CHAT)
    assert "row 1 must hold text, or prompt and response" in told(
        call(place, tmp_path / "out", "--text", chats)
    )
    assert not (tmp_path / "out").exists()


def test_rows_of_every_method_can_be_measured(place, tmp_path):
    rows = write_rows(
        tmp_path / "rows.jsonl",
        {"text": "she saw him ."},
        {"prompt": "he said", "response": "she reads"},
        {"premise": "a nurse works .", "hypothesis": "he works ."},
    )
    result = call(place, tmp_path / "out", "--text", rows)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["data"]["measuring"]["examples"] == 4


def test_one_row_cannot_be_split(place, tmp_path):
    one = write_rows(tmp_path / "one.jsonl", {"text": "she saw him ."})
    line = told(call({**place, "text": one}, tmp_path / "out"))
    assert f"data must hold at least 2 rows, got 1 in {str(one)!r}: a quarter" in line
    assert "--text" in line
    assert not (tmp_path / "out").exists()


def test_the_folder_of_the_model_is_only_read(place):
    assert "out must be a folder outside of model" in told(call(place, place["model"] / "inner"))
    assert not (place["model"] / "inner").exists()


def test_several_processes_are_refused(place, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = told(call(place, tmp_path / "out"))
    assert "debias must run in one process, got 2; start it without torchrun" in line
    assert not (tmp_path / "out").exists()


def test_the_regularised_words_belong_to_the_job(tmp_path, monkeypatch):
    """The figures before training are not those of the words that the file holds now."""
    place = tiny_words.write_place(tmp_path / "place")

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job_module, "_train", interrupted)
        assert call(place, tmp_path / "out").exit_code == 130
    place["words"].write_text(json.dumps({"female": ["she", "her"], "male": ["he"]}), "utf-8")
    tiny_models.llama(seed=5).save_pretrained(place["model"])
    line = told(call(place, tmp_path / "out"))
    assert "which differs in model weights, words; choose" in line


def test_words_that_are_not_in_the_text_are_warned_of(place, tmp_path):
    words = tmp_path / "few.json"
    words.write_text(json.dumps({"one": ["today"]}), encoding="utf-8")
    result = call(place, tmp_path / "out", "--collapse-strength", "10", "--words", words)
    assert result.exit_code == 0, result.stderr
    warnings = json.loads(result.stdout)["warnings"]
    assert any("term was 0 in every step" in warning for warning in warnings)
    assert "term was 0 in every step" in result.stderr


def test_the_checkpoints_are_gone_once_the_model_is_saved(run):
    out, _ = run
    assert not (out / "training").exists() and (out / "model").is_dir()


def test_what_has_no_neutral_value_is_told_as_well():
    """Facts and refusals are what a training may cost: whoever asked for them reads of them."""
    facts = {"value": 75.0, "low": 63.6, "high": 84.4, "verdict": "no neutral value"}
    table = {"Facts": {"before": facts, "neutral": None, "unit": "%"}}
    assert bias_sentences.sentences(table) == ["Facts: 75 % [63.6, 84.4]."]
    row = {"neutral": None, "before": {"value": 75.0}, "after": {"value": 51.4}}
    row["change"] = {"value": -23.6, "low": -36.2, "high": -9.4, "verdict": "fell"}
    row["change"]["p_holm"] = 0.012
    said = (
        "Facts: 75 before, 51.4 after, change -23.6 [-36.2, -9.4], Holm-adjusted p = 0.012: fell."
    )
    assert bias_sentences.change_sentences({"Facts": row}) == [said]


@pytest.mark.parametrize("verdict", ["lower", "closer to neutral"])
def test_no_sentence_claims_a_change_whose_adjusted_p_is_above_the_level(verdict):
    moved = {"value": -3.0, "low": -6.0, "high": -0.1, "verdict": verdict, "p_holm": 0.06}
    row = {"neutral": 50, "before": {"value": 60.0}, "after": {"value": 57.0}, "change": moved}
    (said,) = bias_sentences.change_sentences({"Pairs": row})
    assert said == (
        "Pairs: 60 before, 57 after (neutral 50), change of the distance to it -3 [-6, -0.1], "
        "Holm-adjusted p = 0.06: no effect beyond noise."
    )
