"""The examples run as they stand, on a tiny model with a tokenizer of its own."""

from __future__ import annotations

import csv
import json
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import save_language_model

import fastdean
from fastdean.data.sources import load_rows

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPTS = {
    "collapse_in_a_loop",
    "collapse_in_a_trainer",
    "mask_a_checkpoint",
    "measure_your_own_rows",
    "score_and_couple",
}
NOTEBOOK = "compare_layers"
WORDS = {"one": ["the", "of"], "two": ["and", "is"]}


@pytest.fixture(autouse=True)
def tiny(tmp_path, monkeypatch):
    """The folder `tiny` of the current directory: a model and its tokenizer."""
    monkeypatch.chdir(tmp_path)
    save_language_model("tiny")


def main(name: str):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_every_example_is_listed_short_and_tested():
    scripts = {path.stem: path.read_text("utf-8") for path in EXAMPLES.glob("*.py")}
    assert scripts.keys() == SCRIPTS
    listed = (EXAMPLES / "README.md").read_text("utf-8")
    for name, text in scripts.items():
        assert len(text.splitlines()) <= 60, name
        assert f"]({name}.py)" in listed
    assert [path.stem for path in EXAMPLES.glob("*.ipynb")] == [NOTEBOOK]
    assert f"]({NOTEBOOK}.ipynb)" in listed


def test_a_mask_is_made_put_on_a_checkpoint_and_measured(capsys):
    mask = main("score_and_couple")("tiny", ratio=2e-2, examples=8)
    assert len(mask) > 0
    assert fastdean.NeuronMask.from_pretrained("mask") == mask
    assert "expected by chance" in capsys.readouterr().out

    result = main("mask_a_checkpoint")("tiny", "mask", "masked")
    before, after = (load_file(f"{folder}/model.safetensors") for folder in ("tiny", "masked"))
    changed = sum(int((after[name] != value).sum()) for name, value in before.items())
    assert changed == result.values_edited == len(mask)

    rows = load_rows("embedded:fairness")[-9:]
    with open("own.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["question", "good", "bad"])
        table.writerows([row["prompt"], row["response"], row["unsafe"]] for row in rows)
    source = "own.csv::prompt=question,response=good,unsafe=bad"
    change, ratio = main("measure_your_own_rows")(source, "mask", "tiny")
    assert change.n == ratio.n == 9
    assert change.low < change.high and ratio.low < ratio.high
    assert "perplexity of the answers" in capsys.readouterr().out


def test_the_regulariser_trains_in_a_loop():
    model, values = main("collapse_in_a_loop")("tiny", words=WORDS, steps=3, batch=8)
    # The first batch may hold less than two of the classes, whose spread is then 0.
    assert len(values) == 3 and values[-1] > 0
    trained = model.get_output_embeddings().weight
    assert not torch.equal(trained, load_file("tiny/model.safetensors")["lm_head.weight"])


def test_the_regulariser_trains_in_a_trainer():
    before, after = main("collapse_in_a_trainer")("tiny", words=WORDS, steps=2)
    assert before.values["unc3_std"].value != after.values["unc3_std"].value


def test_the_notebook_runs_from_top_to_bottom(monkeypatch):
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shown = []
    # Drawn, as `show` does in a notebook, then closed.
    monkeypatch.setattr(
        pyplot, "show", lambda: (pyplot.gcf().canvas.draw(), shown.append(1), pyplot.close("all"))
    )
    notebook = json.loads((EXAMPLES / f"{NOTEBOOK}.ipynb").read_text("utf-8"))
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    assert not any(c.get("outputs") for c in notebook["cells"])
    names = {}
    for number, cell in enumerate(cells):
        exec(compile(cell, f"{NOTEBOOK}, code cell {number}", "exec"), names)
        if number == 0:
            # What the first cell sets is all that another model needs.
            names |= {"MODEL": "tiny", "RATIO": 2e-2, "EXAMPLES": 8}
    assert len(shown) == 2
    assert names["changes"].keys() == {
        (edit, topic) for edit in ("coupled", "random") for topic in ("fairness", "privacy")
    }
    assert len(names["mask"]) == len(names["control"]) > 0
