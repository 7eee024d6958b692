"""`fastdean collapse`: the metrics it prints, what it keeps, resumes and refuses."""

from __future__ import annotations

import json

import pytest
import tiny_models
import tiny_words
from page_numbers import untraced
from typer.testing import CliRunner

import fastdean
from fastdean import cli
from fastdean.data.examples import encode
from fastdean.data.sources import load_rows, sample_rows
from fastdean.jobs import session
from fastdean.jobs.bias import asked as bias_asked
from fastdean.jobs.collapse import measuring as job_module
from fastdean.models.loading import load_model
from fastdean.report import verdict_line


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tiny_words.write_place(tmp_path_factory.mktemp("place"))


def call(place, out, *options):
    arguments = ["collapse", "--model", place["model"], "--text", place["text"], "--out", out]
    arguments += ["--words", place["words"], "--quiet", "--json", *options]
    result = CliRunner().invoke(cli.app, [str(each) for each in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(result, text):
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("fastdean: ")]
    assert text in line


def test_the_metrics_are_those_of_the_function(place, tmp_path):
    result = call(place, tmp_path / "out", "--seed", 3)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    model, tokenizer = load_model(str(place["model"]), device="cpu", progress=False)
    numbered, _ = sample_rows(list(enumerate(load_rows(str(place["text"])), 1)), None, 3)
    examples = encode([row for _, row in numbered], tokenizer)
    classes = fastdean.CollapseClasses.from_words(tokenizer, place["words"])
    expected = fastdean.collapse_metrics(
        model, examples[:8], classes, held_out=examples[8:], progress=False
    )
    for name, metric in expected.values.items():
        value = found["collapse"]["metrics"][name]["values"]["measured"]
        assert value == (None if metric.value is None else pytest.approx(metric.value, rel=1e-6))
    # Each word's alignment, and its groups': the mean over all words is that of the groups.
    assert [w["alignment"]["measured"] for w in found["collapse"]["words"]] == pytest.approx(
        expected.alignments
    )
    groups = found["collapse"]["groups"]["measured"]
    total = sum(g["nc3_mean"] * g["words"] for g in groups.values())
    seen = sum(g["words"] for g in groups.values())
    assert total / seen == pytest.approx(expected.values["nc3_mean"].value)
    female = [n for n, group in enumerate(classes.groups) if group == "female"]
    nc1 = expected.among(female).values["nc1_k1"].value
    assert groups["female"]["nc1_k1"] == (None if nc1 is None else pytest.approx(nc1))
    assert found["collapse"]["classes"] == {
        "kept": 6,
        "left_out": 1,
        "groups": {"female": 3, "male": 3},
    }
    assert found == json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    lines = result.stderr.splitlines()
    place_of = {line.split()[0]: number for number, line in enumerate(lines) if line.strip()}
    # Every family of metrics has its heading above it.
    for family in ("NC1", "NC2", "GNC2", "NC3", "(U)NC3", "NC4"):
        first = lines[place_of[f"{family},"] + 1].split()[0]
        assert first.startswith(family.lower().replace("(u)", "u"))
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "Neural collapse" in page and "unc3_std" in page
    assert "unc3_std" in result.stderr and verdict_line(found) in result.stderr
    assert untraced(page, found) == [] and "The words with the worst alignment" in page


def test_a_job_goes_on_where_it_was_interrupted(place, tmp_path, monkeypatch):
    options = ("--bias", f"crows_pairs={place['crows']}")

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(bias_asked.MEASURES, "crows_pairs", (interrupted, False))
        assert call(place, tmp_path / "out", *options).exit_code == 130
    with monkeypatch.context() as patch:
        patch.setattr(job_module, "collapse_metrics", interrupted)
        result = call(place, tmp_path / "out", *options)
    assert result.exit_code == 0, result.stderr
    again = call(place, tmp_path / "other", *options)
    for key in ("collapse", "bias"):
        assert json.loads(again.stdout)[key] == json.loads(result.stdout)[key]
    refused(call(place, tmp_path / "out", *options), "this run, finished")
    assert call(place, tmp_path / "out", *options, "--overwrite").exit_code == 0


def stopped(place, out, monkeypatch, *options):
    """A job that has measured collapse and was interrupted in its bias measure."""

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(bias_asked.MEASURES, "crows_pairs", (interrupted, False))
        result = call(place, out, "--bias", f"crows_pairs={place['crows']}", *options)
    assert result.exit_code == 130
    return ("--bias", f"crows_pairs={place['crows']}", *options)


def _other_words(place):
    place["words"].write_text(json.dumps({"female": ["she", "her"], "male": ["he"]}), "utf-8")


def _other_model(place):
    tiny_models.llama(seed=5).save_pretrained(place["model"])


def _other_configuration(place):
    file = place["model"] / "config.json"
    found = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**found, "rms_norm_eps": 0.1}), "utf-8")


def _other_tokenizer(place):
    file = place["model"] / "tokenizer.json"
    found = json.loads(file.read_text("utf-8"))
    found["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(found), "utf-8")


def _other_pairs(place):
    text = place["crows"].read_text("utf-8")
    place["crows"].write_text(text.replace(",stereo,", ",antistereo,"), "utf-8")


def _other_text(place):
    rows = [{"text": text} for text in tiny_words.TEXTS[1:]]
    place["text"].write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")


@pytest.mark.parametrize(
    "change, named",
    [
        (_other_words, "words"),
        (_other_model, "model weights"),
        (_other_configuration, "model configuration"),
        (_other_tokenizer, "tokenizer"),
        (_other_pairs, "bias crows_pairs="),
        (_other_text, "text"),
    ],
)
def test_figures_of_other_input_are_not_used_again(tmp_path, monkeypatch, change, named):
    place = tiny_words.write_place(tmp_path / "place")
    options = stopped(place, tmp_path / "out", monkeypatch)
    change(place)
    result = call(place, tmp_path / "out", *options)
    refused(result, f"this run on other input, which differs in {named}")
    refused(result, "; choose another folder or pass --overwrite")
    result = call(place, tmp_path / "out", *options, "--overwrite")
    assert result.exit_code == 0, result.stderr
    fresh = call(place, tmp_path / "fresh", *options)
    for key in ("collapse", "bias"):
        assert json.loads(fresh.stdout)[key] == json.loads(result.stdout)[key]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[]",
        '{"format": 3, "step": "col',
        '{"format": 3, "step": "other", "figures": {}}',
        '{"format": 3, "step": "collapse", "figures": {}}',
        '{"format": 3, "step": "collapse", "figures": {"metrics": [NaN]}}',
    ],
)
def test_a_damaged_step_is_named_and_not_used(place, tmp_path, monkeypatch, content):
    options = stopped(place, tmp_path / "out", monkeypatch)
    file = tmp_path / "out" / "steps" / "collapse.json"
    file.write_text(content, "utf-8")
    result = call(place, tmp_path / "out", *options)
    refused(result, f"{str(file)!r} must hold ")
    assert "; delete the file, and its figures are taken again" in result.stderr
    file.unlink()
    assert call(place, tmp_path / "out", *options).exit_code == 0


def test_figures_of_an_older_format_are_taken_anew(place, tmp_path, monkeypatch):
    """Their intervals followed other rules: a resumed run must not set them beside its own."""
    options = stopped(place, tmp_path / "out", monkeypatch)
    file = tmp_path / "out" / "steps" / "collapse.json"
    kept = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({"format": 2, "step": "collapse", "figures": {"old": 1}}), "utf-8")
    assert call(place, tmp_path / "out", *options).exit_code == 0
    again = json.loads(file.read_text("utf-8"))
    assert again == kept and kept["format"] == 3


def test_the_folder_of_the_model_is_only_read(place):
    refused(call(place, place["model"] / "inner"), "out must be a folder outside of model")
    assert not (place["model"] / "inner").exists()


def test_the_start_token_of_the_bias_measures_can_be_chosen(place, tmp_path):
    asked = ("--bias", f"crows_pairs={place['crows']}", "--start-token")
    found = {}
    for number, start in enumerate(("[EOS]", "2", "none")):
        result = call(place, tmp_path / str(number), *asked, start)
        assert result.exit_code == 0, result.stderr
        found[start] = json.loads(result.stdout)
    taken = [each["manifest"]["start_token"] for each in found.values()]
    assert taken == ["[EOS]", "[EOS]", "none"]
    assert found["[EOS]"]["bias"] == found["2"]["bias"] != found["none"]["bias"]
    refused(
        call(place, tmp_path / "out", "--start-token", "eos"),
        "--start-token must be 'auto' without a measure of bbq, bec_pro, crows_pairs, ",
    )
    told = "fastdean: --start-token must be auto, bos, eos, none, or a token of the vocabulary"
    refused(call(place, tmp_path / "out", *asked, "<nope>"), told)
    assert not (tmp_path / "out").exists()


def test_a_bias_file_that_is_not_there_is_told_before_the_collapse_is_measured(place, tmp_path):
    result = call(place, tmp_path / "out", "--bias", "seat=nowhere.json")
    told = "fastdean: --bias 'seat=nowhere.json' must name an existing file, got 'nowhere.json'"
    refused(result, told)
    assert not (tmp_path / "out").exists()


def test_a_bias_file_of_something_else_is_named(place, tmp_path):
    """Several files may be asked for."""
    wrong = f"bec_pro={place['crows']}"
    result = call(
        place, tmp_path / "out", "--bias", f"crows_pairs={place['crows']}", "--bias", wrong
    )
    refused(result, f"fastdean: --bias '{wrong}': row 1 must have the columns sentence, person")


@pytest.mark.parametrize("measure", sorted(bias_asked.MEASURES))
@pytest.mark.parametrize("job", ["collapse", "debias"])
def test_a_bias_file_of_something_else_is_told_before_a_model_is_loaded(
    place, tmp_path, monkeypatch, job, measure
):
    """A large one takes minutes to load, and its measure comes last."""

    def load(*args, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(session, "load_model", load)
    (tmp_path / "wrong.csv").write_text("a,b\n1,2\n", "utf-8")
    wrong = f"{measure}={tmp_path / 'wrong.csv'}"
    arguments = ["--model", place["model"], "--words", place["words"], "--bias", wrong]
    texts = {"collapse": ["--text"], "debias": ["--method", "causal", "--data"]}[job]
    arguments = [job, *arguments, *texts, place["text"], "--out", tmp_path / "out", "--quiet"]
    result = CliRunner().invoke(cli.app, [str(each) for each in arguments])
    refused(result, f"fastdean: --bias '{wrong}': row 1 must have the columns ")
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(place, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(call(place, tmp_path / "out"), "collapse must run in one process, got 2; start it")
    assert not (tmp_path / "out").exists()


def test_a_group_that_stands_twice_in_a_file_is_refused(place, tmp_path):
    words = tmp_path / "words.json"
    words.write_text('{"g": ["she", "he"], "g": ["man", "woman"]}', "utf-8")
    refused(
        call({**place, "words": words}, tmp_path / "out"), "the name 'g' stands in one object twice"
    )


def test_a_control_measures_other_words(place, tmp_path):
    found = json.loads(call(place, tmp_path / "out", "--control", "random").stdout)
    assert found["collapse"]["classes"]["kept"] == 6
    own = {word.strip() for word in found["manifest"]["classes"]["words"]}
    assert not own & {"she", "her", "woman", "he", "his", "man"}


@pytest.mark.parametrize(
    "options, text",
    [
        (("--control", "some"), "control must be one of random, frequency, got 'some'"),
        (("--bias", "nothing"), "bias must be one of crows_pairs, "),
        (("--bias", "seat"), "bias 'seat' must come with its file"),
        (("--bias", "bec_pro", "--bias", "bec_pro"), "bias must name each measure once"),
        (("--shift", "back"), "shift must be one of next, same, published"),
        (("--features", "tail"), "features must be one of base, head"),
        (("--words", "colours"), "colours"),
        (("--multi-piece", "first"), "--multi-piece must be 'skip' or 'mean'"),
        (("--template", "own"), "fastdean: --template must be one of raw, chat, published, got"),
        (("--examples", "0"), "fastdean: --examples must be at least 1, got 0"),
        (("--seed", "-1", "--control", "random"), "seed must be at least 0, got -1"),
    ],
)
def test_bad_options_are_refused_and_leave_nothing(place, tmp_path, options, text):
    refused(call(place, tmp_path / "out", *options), text)
    assert not (tmp_path / "out").exists()
