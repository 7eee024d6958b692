"""The price against the general ratio: its masks, its family of tests, and how it is resumed."""

from __future__ import annotations

import json
import re

import pytest
from page_numbers import untraced
from tiny_folders import WORDS, save_model, tokenizer, write_jsonl, write_sources
from tiny_models import llama

from fastdean import couple
from fastdean.coupling.results.scores import Scores
from fastdean.evaluation import change_between
from fastdean.evaluation.bias import gender_facts
from fastdean.evaluation.statistics.families import holm
from fastdean.jobs import run
from fastdean.jobs.coupling import general_grid
from fastdean.jobs.coupling.job import Job
from fastdean.masks import NeuronMask
from fastdean.models.layers.streaming import StreamedModel

OPTIONS = {"ratio": 0.05, "examples": 5, "eval_examples": 9, "general_grid": [0.2, 0.01]}
# What is measured besides, if it is asked for.
MORE = {"examples": 5, "eval_examples": 9, "ratio": 0.05, "answers": 2}
FACTS = [
    {
        "sentence": f"{WORDS[n]} _ {WORDS[n + 1]}",
        "right": WORDS[n + 2],
        "wrong": WORDS[n + 3],
        "gender": ("male", "female")[n % 2],
        "topic": "words",
    }
    for n in range(12)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    paths = write_sources(folder, 14)
    return {"model": str(save_model(folder / "model")), **{n: str(p) for n, p in paths.items()}}


@pytest.fixture(scope="module")
def measured(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("grid") / "run"
    return out, run(Job(**place, **OPTIONS), out, progress=False)


def test_the_masks_are_those_of_couple_and_the_chosen_one_is_among_them(measured):
    out, results = measured
    fair, priv, gen = (
        Scores.from_pretrained(out / "scores" / name) for name in ("fairness", "privacy", "general")
    )
    rows = results["general_grid"]["rows"]
    assert [row["general_ratio"] for row in rows] == [0.01, 0.05, 0.2]
    for row in rows:
        ratios = (0.05, 0.05, row["general_ratio"])
        assert row["weights"] == len(couple(fair, priv, general=gen, ratio=ratios))
    assert rows[0]["weights"] > rows[1]["weights"] > rows[2]["weights"]
    own = results["margins"]["fairness"]["masks"]["paper"]
    assert rows[1]["margins"]["fairness"]["mean"] == own["mean"]
    kl = [row["perplexity"]["general"]["kl"]["mean"] for row in rows]
    assert kl[0] > kl[2] > 0 and kl[1] == results["perplexity"]["masks"]["paper"]["kl"]["mean"]


def test_the_grid_and_the_masks_are_each_one_family(measured):
    """Three masks, and three points, on two margins and one perplexity each."""
    _, results = measured
    rows = results["general_grid"]["rows"]
    families = {
        "grid": [
            change
            for row in rows
            for change in (*row["margins"].values(), *row["perplexity"].values())
        ],
        "masks": [
            change
            for table in (*results["margins"].values(), results["perplexity"])
            for change in table["masks"].values()
        ],
    }
    for tests, changes in zip(
        (results["general_grid"]["tests"], results["tests"]), families.values(), strict=True
    ):
        assert tests["tests"] == len(changes) == 9
        assert tests["confidence_of_each"] == pytest.approx(1 - 0.05 / 9)
        adjusted = holm([change["p_value"] for change in changes])
        assert [change["p_holm"] for change in changes] == pytest.approx(adjusted)
        for change in changes:
            assert change["detects"] > 0
            if change["p_holm"] > 0.05:
                assert change["verdict"] not in ("higher", "lower")


def test_the_page_shows_the_grid_with_its_family_and_the_chosen_point(measured):
    page = (measured[0] / "report.html").read_text()
    section = page[page.index('id="general_grid"') :]
    # Once, and as text: not a paragraph written into another.
    assert section.count("The grid is a family of its own.") == 1 and "&lt;p" not in section
    assert "0.05 (chosen)" in section and "Perplexity ratio, general" in section
    assert re.search(r"Holm-adjusted p = [\d.]+", " ".join(measured[1]["findings"]))


def test_a_stopped_grid_goes_on_with_the_points_that_are_there(
    place, measured, tmp_path, monkeypatch
):
    taken, real = [], general_grid.figures_of

    def figures_of(*args, **options):
        if len(taken) == 1 and args[5] == "general ratio 0.2":
            taken.append("stopped")
            raise KeyboardInterrupt
        taken.append(args[5])
        return real(*args, **options)

    monkeypatch.setattr(general_grid, "figures_of", figures_of)
    with pytest.raises(KeyboardInterrupt):
        run(Job(**place, **OPTIONS), tmp_path / "run", progress=False)
    results = run(Job(**place, **OPTIONS), tmp_path / "run", progress=False)
    assert taken == ["general ratio 0.01", "stopped", "general ratio 0.2"]
    assert results["general_grid"] == measured[1]["general_grid"]
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ([], TypeError, "general_grid must be ratios, got []; pass a list"),
        ("1e-3", TypeError, "general_grid must be ratios, got '1e-3'; pass a list"),
        ([2.0], ValueError, "general_grid must hold ratios above 0 and at most 1, got 2.0"),
        (["x"], TypeError, "general_grid must be"),
    ],
)
def test_a_grid_that_is_none_is_refused(place, given, error, text):
    with pytest.raises(error, match=re.escape(text)):
        Job(**place, general_grid=given)


def test_a_model_that_is_not_loaded_whole_has_no_grid_and_says_so(place, tmp_path, monkeypatch):
    monkeypatch.setattr(StreamedModel, "fits_in_memory", lambda self: False)
    job = Job(**place, **OPTIONS, order="layers")
    results = run(job, tmp_path / "run", progress=False)
    assert "general_grid" not in results
    (said,) = [each for each in results["warnings"] if "grid of general ratios" in each]
    assert said.endswith("the model is not loaded whole.")
    assert said in (tmp_path / "run" / "report.html").read_text()


def test_without_a_spared_set_there_is_no_grid(place):
    sets = {"a": place["fairness"], "b": place["privacy"]}
    with pytest.raises(ValueError, match="general_grid must be left out where no set is spared"):
        Job(model=place["model"], sets=sets, couple="a,b", general_grid=[0.1])


@pytest.fixture(scope="module")
def more(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("more")
    facts = write_jsonl(folder / "facts.jsonl", FACTS)
    job = Job(**place, **MORE, bias=(f"gender_facts={facts}", "over_refusal"))
    return folder / "run", run(job, folder / "run", progress=False)


def test_measures_and_answers_are_taken_under_every_mask_in_one_family(place, more):
    """Three masks on two margins, a perplexity, a measure, and refusals."""
    out, results = more
    (price,) = results["price"].values()
    assert list(price["masks"]) == ["paper", "random", "released"]
    assert results["tests"]["tests"] == 3 * (2 + 1 + 1 + 1)
    model, tok = llama().eval(), tokenizer()
    before = gender_facts(model, tok, FACTS, progress=False)
    with NeuronMask.from_pretrained(out / "mask").applied(model):
        after = gender_facts(model, tok, FACTS, progress=False)
    moved = change_between(before.interval, after.interval)
    own = price["masks"]["paper"]
    assert (price["origin"]["value"], own["mean"]) == (before.value, pytest.approx(moved.mean))
    answers = results["answers"]
    assert answers["of"] == 4 and list(answers["variants"]) == [
        "original", "paper", "random", "released"
    ]  # fmt: skip
    tested = [
        *(each for table in results["margins"].values() for each in table["masks"].values()),
        *results["perplexity"]["masks"].values(),
        *price["masks"].values(),
        *(found["change"] for name, found in answers["variants"].items() if name != "original"),
    ]
    adjusted = holm([each["p_value"] for each in tested])
    assert [each["p_holm"] for each in tested] == pytest.approx(adjusted)
    # The tiny tokenizer spells every opening alike: said once, and the rest is measured.
    assert sum("over_refusal" in each for each in results["warnings"]) == 1
    card = (out / "card.md").read_text("utf-8")
    for heading in ("Refusals, share of answers", "Perplexity ratio", "Margin of fairness"):
        assert heading in card


def test_every_number_of_a_run_s_page_is_in_its_results(measured, more):
    for out, results in (measured, more):
        page = (out / "report.html").read_text("utf-8")
        assert json.loads((out / "results.json").read_text("utf-8")) == results
        assert untraced(page, results) == []
        assert 'href="./results.json"' in page
    # One that is made up is found.
    (value,) = re.findall(r">([+−][\d.]+) <span", page)[:1]
    wrong = page.replace(f">{value} <span", ">+0.98765432 <span", 1)
    assert [each.split()[0] for each in untraced(wrong, results)] == ["0.98765432"]


def test_answers_are_of_prompts_that_are_measured(place):
    with pytest.raises(ValueError, match="answers must be at most eval_examples, 3, got 4"):
        Job(**place, eval_examples=3, answers=4)
    with pytest.raises(ValueError, match="bias must be one of"):
        Job(**place, bias=("nothing",))
