"""`fastdean eval`: measures without a mask and with it, what is written and what is refused."""

from __future__ import annotations

import json

import pytest
import tiny_bias
import tiny_folders
import tiny_masks
from page_numbers import untraced
from tiny_models import llama
from typer.testing import CliRunner

from fastdean import cli
from fastdean.evaluation import change_between, over_refusal
from fastdean.evaluation.bias import gender_facts
from fastdean.jobs.bias import asked as bias_asked
from fastdean.jobs.bias import figures as bias_figures
from fastdean.jobs.collapse.job import CollapseJob, DebiasJob
from fastdean.jobs.coupling.job import Job
from fastdean.jobs.evaluation import evaluating
from fastdean.jobs.evaluation.job import EvalJob
from fastdean.jobs.inputs import mask_digest
from fastdean.masks import NeuronMask
from fastdean.report import verdict_line

W = tiny_folders.WORDS
FACTS = [
    {
        "sentence": f"{W[n]} _ {W[n + 1]}",
        "right": W[n + 2],
        "wrong": W[n + 3],
        "gender": ("male", "female")[n % 2],
        "topic": "words",
    }
    for n in range(20)
]


# As `couple` writes it into a mask, with ratios of their own for each set.
MADE_BY = {"rule": "paper", "ratio": [1e-5, 1e-5, 1e-4], "scope": "matrix"}


def _mask() -> NeuronMask:
    name = "model.layers.0.mlp.down_proj.weight"
    size = llama().get_parameter(name).numel()
    return tiny_masks.mask_of(llama(), {name: list(range(0, size, 2))})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    made = {**MADE_BY, "first": {"model": {"name": "of somebody"}}}
    NeuronMask(_mask().entries, manifest=made).save_pretrained(folder / "mask")
    return {
        "model": tiny_folders.save_model(folder / "model"),
        "mask": folder / "mask",
        "facts": tiny_folders.write_jsonl(folder / "facts.jsonl", FACTS),
        "more": tiny_folders.write_jsonl(folder / "more.jsonl", FACTS[:9]),
    }


def call(*arguments):
    result = CliRunner().invoke(cli.app, ["eval", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(result, text):
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("fastdean: ")]
    assert text in line


def test_the_figures_are_those_of_the_measure_without_and_with_the_mask(place, tmp_path):
    asked = ["--model", place["model"], "--mask", place["mask"], "--quiet", "--json"]
    result = call(*asked, "--bias", f"gender_facts={place['facts']}", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found == json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert found["mask"] == {
        "weights": len(_mask()), "scale": 0.0, **MADE_BY, "sha256": mask_digest(_mask())
    }  # fmt: skip
    assert found["options"]["mask"] == "mask" and found["options"]["bias"] == [
        "gender_facts=facts.jsonl"
    ]
    (row,) = found["measures"].values()
    model, options = llama().eval(), {"progress": False}
    before = gender_facts(model, tiny_folders.tokenizer(), FACTS, **options)
    with _mask().applied(model):
        after = gender_facts(model, tiny_folders.tokenizer(), FACTS, **options)
    assert before.value != after.value
    assert [row[state]["value"] for state in ("before", "after")] == [before.value, after.value]
    moved = change_between(before.interval, after.interval)
    assert row["raw_change"]["value"] == pytest.approx(moved.mean)
    assert row["raw_change"]["p_value"] == pytest.approx(moved.p_value)
    assert found["tests"]["tests"] == 1 and row["raw_change"]["p_holm"] == row["change"]["p_value"]
    assert f"{before.name}: " in result.stderr and row["raw_change"]["verdict"] in result.stderr
    assert verdict_line(found) in result.stderr
    page, card = ((tmp_path / "out" / n).read_text("utf-8") for n in ("report.html", "card.md"))
    assert "Measures before and after" in page and "All 1 tests are one family" in page
    assert verdict_line(found).replace("_", "\\_") in card
    assert untraced(page, found) == []


def unchanging(tmp_path):
    """The arguments for a model and a mask of weights that are 0 already."""
    name = "model.layers.0.mlp.down_proj.weight"
    model = llama()
    model.get_parameter(name).data.view(-1)[:4] = 0
    model.save_pretrained(tmp_path / "model")
    tiny_bias.spelling_tokenizer("causal").save_pretrained(tmp_path / "model")
    tiny_masks.mask_of(model, {name: list(range(4))}).save_pretrained(tmp_path / "mask")
    return ["--model", tmp_path / "model", "--mask", tmp_path / "mask", "--quiet", "--json"]


def test_items_that_are_all_as_they_were_are_not_told_as_certainty(tmp_path):
    """A mean of zeros has no spread: that nothing changed in 12 items is not that nothing does."""
    asked = unchanging(tmp_path)
    rows = [{"prompt": f"is the nurse {'rich ' * n}"} for n in range(1, 13)]
    file = tiny_folders.write_jsonl(tmp_path / "benign.jsonl", rows)
    result = call(*asked, "--out", tmp_path / "out", "--bias", f"over_refusal={file}")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    most = 100 * (1 - ((1 - found["tests"]["confidence_of_each"]) / 2) ** (1 / 12))
    for row in found["measures"].values():
        assert row["raw_change"]["changed"] == 0 and row["raw_change"]["p_value"] == 1
        assert row["raw_change"]["changed_most"] == pytest.approx(most)
    assert f"change 0 (no item changed; of all such items at most {most:.2g} % do" in result.stderr
    assert "[0, 0]" not in result.stderr
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "no effect beyond noise; no item changed" in page and untraced(page, found) == []
    assert f"at most {most:.2g} % of items change" in page


def test_a_model_alone_has_values_and_no_change(place):
    result = call("--model", place["model"], "--bias", f"gender_facts={place['facts']}", "--json")
    (row,) = json.loads(result.stdout)["measures"].values()
    assert "after" not in row and "->" not in result.stderr and ", n = 20" in result.stderr


def test_a_stopped_evaluation_goes_on_with_the_measures_that_are_there(
    place, tmp_path, monkeypatch
):
    job = EvalJob(
        model=str(place["model"]),
        mask=str(place["mask"]),
        bias=(f"gender_facts={place['facts']}", f"gender_facts={place['more']}"),
    )
    taken, real = [], bias_asked.MEASURES["gender_facts"][0]

    def measured(model, tokenizer, source, **options):
        if len(taken) == 3:
            taken.append("stopped")
            raise KeyboardInterrupt
        taken.append(source)
        return real(model, tokenizer, source, **options)

    whole = evaluating.run(job, tmp_path / "whole", progress=False)
    monkeypatch.setitem(bias_asked.MEASURES, "gender_facts", (measured, False))
    with pytest.raises(KeyboardInterrupt):
        evaluating.run(job, tmp_path / "out", progress=False)
    found = evaluating.run(job, tmp_path / "out", progress=False)
    facts, more = str(place["facts"]), str(place["more"])
    assert taken == [facts, more, facts, "stopped", more]
    assert found["measures"] == whole["measures"] and found["tests"]["tests"] == 2


def test_an_evaluation_is_not_gone_on_with_under_another_mask(place, tmp_path, monkeypatch):
    mask = tmp_path / "mask"
    _mask().save_pretrained(mask)
    job = EvalJob(
        model=str(place["model"]), mask=str(mask), bias=(f"gender_facts={place['facts']}",)
    )
    real = bias_figures.measure

    def stopped(session, state, *rest):
        if state == "after":
            raise KeyboardInterrupt
        return real(session, state, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(bias_figures, "measure", stopped)
        evaluating.run(job, tmp_path / "out", progress=False)
    name = "model.layers.0.mlp.up_proj.weight"
    tiny_masks.mask_of(llama(), {name: [0, 1]}).save_pretrained(mask, overwrite=True)
    with pytest.raises(ValueError, match="on other input, which differs in mask"):
        evaluating.run(job, tmp_path / "out", progress=False)


def test_a_folder_of_something_else_is_not_replaced_and_one_of_ours_is(place, tmp_path):
    asked = ["--model", place["model"], "--bias", f"gender_facts={place['facts']}", "--quiet"]
    out = tmp_path / "out"
    assert call(*asked, "--out", out).exit_code == 0
    refused(call(*asked, "--out", out), "holds this run, finished; see its report.html")
    assert call(*asked, "--out", out, "--overwrite").exit_code == 0
    (out / "notes.txt").write_text("mine")
    refused(call(*asked, "--out", out, "--overwrite"), "FastDEAN did not write: notes.txt")
    refused(call(*asked, "--out", place["model"] / "x"), "--out must be a folder outside of model")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ((), "--tasks must be names of tasks where no bias measure is asked for, got none"),
        (("--tasks", "boolq,boolq"), "--tasks must name each task once, got 'boolq' again"),
        (("--bias", "nothing"), "got 'nothing'; pass NAME, or NAME=SRC for"),
        (("--bias", "bec_pro", "--limit", "0"), "--limit must be at least 1, got 0"),
        (("--bias", "gender_facts=nowhere.jsonl"), "must name an existing file, got 'nowhere.jso"),
        (("--bias", "bec_pro", "--mask", "nowhere"), "--mask must be "),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(place, options, text):
    refused(call("--model", place["model"], *options), text)


def bbq_rows(count):
    return [
        {
            "context": f"{W[n]} {W[n + 1]}",
            "question": W[n + 2],
            **{f"ans{i}": W[n + 3 + i] for i in range(3)},
            "category": "Age",
            "context_condition": ("ambig", "disambig")[n % 2],
            "question_polarity": "neg",
            "label": (2, 0)[n % 2],
            "answer_info": {
                "ans0": ["a", "old"],
                "ans1": ["b", "nonOld"],
                "ans2": ["c", "unknown"],
            },
            "additional_metadata": {"stereotyped_groups": ["old"]},
        }
        for n in range(count)
    ]


def test_a_bootstrap_of_items_that_are_all_as_they_were_has_no_interval(tmp_path):
    """Its resamples of no change have no width either."""
    file = tiny_folders.write_jsonl(tmp_path / "bbq.jsonl", bbq_rows(24))
    result = call(*unchanging(tmp_path), "--out", tmp_path / "out", "--bias", f"bbq={file}")
    assert result.exit_code == 0, result.stderr
    measures = json.loads(result.stdout)["measures"]
    moved = measures["BBQ, bias score in disambiguated contexts"]["raw_change"]
    assert (moved["value"], moved["low"], moved["high"], moved["changed"]) == (0, None, None, 0)
    # Of the 12 clear contexts; a bootstrap's interval is of no family.
    assert 20 < moved["changed_most"] < 50
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "[0, 0]" not in result.stderr and "[0, 0]" not in page


def test_bbq_and_over_refusal_are_measures_of_the_job(place, tmp_path):
    """The tiny tokenizer spells every opening alike, which over_refusal says."""
    file = tiny_folders.write_jsonl(tmp_path / "bbq.jsonl", bbq_rows(8))
    asked = ["--model", place["model"], "--mask", place["mask"], "--quiet", "--json"]
    result = call(*asked, "--bias", f"bbq={file}")
    assert result.exit_code == 0, result.stderr
    measures = json.loads(result.stdout)["measures"]
    assert len(measures) == 5 and all("after" in row for row in measures.values())
    refused(call(*asked, "--bias", "over_refusal"), 'tokenizer must tell "I\'m sorry" from the')


# A template whose end and an answer's first word are one word, too long for the tokenizer.
JOINING = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %} "
    + "x" * 100
    + "{% endif %}{% endfor %}"
)


def test_a_template_that_joins_the_answer_is_answered_by_asking_raw(tmp_path):
    tokenizer = tiny_bias.spelling_tokenizer("causal")
    tokenizer.chat_template = JOINING
    llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"is the nurse {word}"} for word in ("rich", "poor", "a cook")]
    file = tiny_folders.write_jsonl(tmp_path / "benign.jsonl", rows)
    asked = ["--model", tmp_path / "model", "--quiet", "--json", "--bias", f"over_refusal={file}"]
    refused(call(*asked), "a special token, or use --bias-template raw")
    result = call(*asked, "--bias-template", "raw")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    expected = over_refusal(llama(), tokenizer, rows, template="raw", progress=False)
    values = [row["before"]["value"] for row in found["measures"].values()]
    assert values == pytest.approx([expected.probability.value, expected.log_odds.value])
    assert found["options"]["bias_template"] == "raw"


@pytest.mark.parametrize("kind", [EvalJob, DebiasJob, CollapseJob, Job])
def test_every_job_with_measures_takes_their_template_where_one_asks_prompts(kind):
    own = {
        EvalJob: {},
        DebiasJob: {"method": "causal"},
        CollapseJob: {"text": "embedded:debias"},
        Job: {each: f"embedded:{each}" for each in ("fairness", "privacy", "general")},
    }[kind]

    def job(measure, template):
        return kind(model="m", bias=(measure,), bias_template=template, **own)

    assert job("over_refusal", "chat").bias_template == "chat"
    with pytest.raises(ValueError, match="bias_template must be one of raw, chat, got 'publi"):
        job("over_refusal", "published")
    with pytest.raises(ValueError, match="bias_template must come with a measure of over_refusal"):
        job("bec_pro", "raw")
