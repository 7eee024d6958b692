"""Scores of lm-eval: what is made of its samples by hand, and lm-eval itself where installed."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec

import pytest
import tiny_folders
import tiny_masks
import torch
from tiny_bias import causal_oracle
from tiny_models import llama
from typer.testing import CliRunner

from fastdean import cli
from fastdean.evaluation import ability, change_between
from fastdean.evaluation.ability import require_same_items, results_of, task_manager, task_scores
from fastdean.masks import NeuronMask

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")


def _samples(values, metric="acc", kept_by="none", part="a"):
    return [
        {"doc_id": n, "doc_hash": f"{part}{n}", "filter": kept_by, "metrics": [metric], metric: v}
        for n, v in enumerate(values)
    ]


def test_a_share_of_items_has_mcnemars_exact_test_between_two_models():
    before = results_of({"a": _samples([1.0] * 9 + [0.0] * 3)}, "a")
    after = results_of({"a": _samples([0.0] * 8 + [1.0] * 4)}, "a")
    require_same_items(*({each.name: each.items for each in side} for side in (before, after)))
    (old,), (new,) = before, after
    assert (old.name, old.value, old.unit, old.n) == ("a, acc", 75.0, "%", 12)
    moved = change_between(old.interval, new.interval)
    assert moved.mean == pytest.approx(100 * (4 - 9) / 12)
    # Eight lost, three won: twice the lower tail of Binomial(11, 1/2).
    assert moved.test == "exact McNemar"
    assert moved.p_value == pytest.approx(2 * sum(math.comb(11, k) for k in range(4)) / 2**11)


def test_other_numbers_have_a_mean_and_filters_stand_apart():
    rows = [*_samples([0.2, 0.4], "f"), *_samples([1.0, 0.0], "match", "strict")]
    found = results_of({"a": rows}, "a")
    assert [(each.name, each.value, each.unit) for each in found] == [
        ("a, f", pytest.approx(0.3), ""),
        ("a, match (strict)", 50.0, "%"),
    ]


def test_what_is_no_number_of_an_item_is_left_to_lm_eval():
    found = results_of({"a": _samples([(-3.0, 2), (-1.0, 1)], "word_perplexity")}, "a")
    assert found == []


def test_a_group_is_the_mean_over_the_items_of_all_its_tasks():
    samples = {
        "a": _samples([1.0, 1.0, 1.0], part="a"),
        "b": _samples([0.0], part="b"),
        "c": _samples([0.0], part="c"),
    }
    (found,) = results_of(samples, "top")
    assert found.name == "top, acc"
    assert found.value == pytest.approx(60.0) and found.n == 5
    assert {k: v.mean for k, v in found.by_category.items()} == {"a": 100.0, "b": 0.0, "c": 0.0}


@pytest.mark.parametrize("other", [_samples([1.0, 1.0], part="z"), _samples([1.0])])
def test_other_items_are_not_compared(other):
    before, after = (results_of({"a": rows}, "a") for rows in (_samples([1.0, 0.0]), other))
    with pytest.raises(ValueError, match="after must be of the same items as before, got others f"):
        require_same_items(*({each.name: each.items for each in side} for side in (before, after)))


def test_without_lm_eval_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(ability, "find_spec", lambda name: None)
    told = "lm-eval must be installed for tasks of general ability, got no package; run `pip insta"
    with pytest.raises(RuntimeError, match=told):
        task_scores(None, None, ["hellaswag"])
    asked = (
        ["eval", "--model", str(tmp_path), "--tasks", "hellaswag"],
        ["lm-eval", "--model", "fastdean", "--help"],
    )
    for arguments in asked:
        result = CliRunner().invoke(cli.app, arguments)
        assert result.exit_code == 2 and result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"fastdean: {told}")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a mask of it, and a task of our own in a folder."""
    folder = tmp_path_factory.mktemp("place")
    tiny_folders.save_model(folder / "model")
    mask = _mask()
    mask.save_pretrained(folder / "mask")
    words = tiny_folders.WORDS
    rows = [
        {"question": f"{words[n]} {words[n + 3]}", "choices": words[n : n + 3], "label": n % 3}
        for n in range(24)
    ]
    tasks = folder / "tasks"
    tasks.mkdir()
    tiny_folders.write_jsonl(folder / "rows.jsonl", rows)
    task = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "rows.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    # JSON is YAML.
    (tasks / "tiny_choice.yaml").write_text(json.dumps(task), encoding="utf-8")
    return {"model": folder / "model", "mask": folder / "mask", "tasks": tasks, "rows": rows}


def _mask() -> NeuronMask:
    """Half of an MLP: an edit that changes answers."""
    name = "model.layers.0.mlp.down_proj.weight"
    size = llama().get_parameter(name).numel()
    return tiny_masks.mask_of(llama(), {name: list(range(0, size, 2))})


def _best(model, tokenizer, row) -> int:
    before = tokenizer(row["question"])["input_ids"]
    found = [
        causal_oracle(model, [*before, *ids], range(len(before), len(before) + len(ids)))
        for ids in tokenizer(row["choices"])["input_ids"]
    ]
    return found.index(max(found))


@needs_lm_eval
def test_eval_toggles_the_mask_on_one_model_and_compares_items(place, tmp_path):
    arguments = ["eval", "--model", place["model"], "--mask", place["mask"], "--quiet", "--json"]
    arguments += ["--tasks", "tiny_choice", "--task-folder", place["tasks"]]
    arguments += ["--out", tmp_path / "out"]
    result = CliRunner().invoke(cli.app, [str(each) for each in arguments])
    assert result.exit_code == 0, result.stderr
    row = json.loads(result.stdout)["measures"]["tiny_choice, acc"]
    model, tokenizer = llama().eval(), tiny_folders.tokenizer()
    right = [_best(model, tokenizer, each) == each["label"] for each in place["rows"]]
    with _mask().applied(model):
        masked = [_best(model, tokenizer, each) == each["label"] for each in place["rows"]]
    assert right != masked
    assert row["before"]["value"] == pytest.approx(100 * sum(right) / 24)
    assert row["after"]["value"] == pytest.approx(100 * sum(masked) / 24)
    items = json.loads((tmp_path / "out" / "items.json").read_text("utf-8"))["tiny_choice, acc"]
    assert [value == 100.0 for value in items["before"]] == right
    assert [value == 100.0 for value in items["after"]] == masked
    assert "  tiny_choice, acc: " in result.stderr and "exact McNemar" in result.stdout


@needs_lm_eval
@pytest.mark.slow  # reads all of lm-eval's task files
def test_an_unknown_task_is_named_with_what_is_near(place):
    told = "got 'tiny_choic'; near it: 'tiny_choice'.*lists them"
    with pytest.raises(ValueError, match=f"tasks must be names of lm-eval's tasks, {told}"):
        task_manager(["tiny_choic"], place["tasks"])
    with pytest.raises(ValueError, match="task_folder must be a folder of task files, got 'none'"):
        task_manager(["tiny_choice"], "none")


@needs_lm_eval
def test_the_registered_model_answers_as_the_edited_one(place):
    """Each of the three calls of lm-eval's interface, by itself."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    import fastdean.jobs.evaluation.lm_eval_model  # noqa: F401

    lm = get_model("fastdean")(str(place["model"]), mask=str(place["mask"]), device="cpu")
    model, tokenizer = llama().eval(), tiny_folders.tokenizer()

    def ask(kind, *arguments):
        return Instance(kind, {}, arguments, 0)

    words = tiny_folders.WORDS
    context, answer = tokenizer(f"{words[1]} {words[5]}")["input_ids"], tokenizer(words[2])
    ids = [*context, *answer["input_ids"]]
    with _mask().applied(model):
        asked = [ask("loglikelihood", f"{words[1]} {words[5]}", f" {words[2]}")]
        ((found, _),) = lm.loglikelihood(asked)
        assert found == pytest.approx(causal_oracle(model, ids, [2]), abs=1e-4)
        text = " ".join(words[3:9])
        start = [lm.prefix_token_id, *tokenizer(text)["input_ids"]]
        (found,) = lm.loglikelihood_rolling([ask("loglikelihood_rolling", text)])
        assert found == pytest.approx(causal_oracle(model, start), abs=1e-4)
        options = {"until": [], "max_gen_toks": 4, "do_sample": False}
        (found,) = lm.generate_until([ask("generate_until", f"{words[1]} {words[5]}", options)])
        greedy = list(context)
        for _ in range(4):
            logits = model(input_ids=torch.tensor([greedy])).logits[0, -1]
            greedy.append(int(logits.argmax()))
        assert found.split() == tokenizer.decode(greedy[2:], skip_special_tokens=True).split()
    assert lm.get_model_info()["fastdean_masked_weights"] == len(_mask())


@needs_lm_eval
@pytest.mark.slow  # lm-eval reads all of its task files
def test_lm_evals_own_command_knows_the_model(place, tmp_path):
    model = f"pretrained={place['model']},mask={place['mask']}"
    arguments = ["lm-eval", "--model", "fastdean", "--model_args", model, "--limit", "4"]
    arguments += ["--device", "cpu"]
    arguments += ["--tasks", "tiny_choice", "--include_path", str(place["tasks"])]
    result = CliRunner().invoke(cli.app, [*arguments, "--output_path", str(tmp_path)])
    assert result.exit_code == 0, result.stderr
    assert "tiny_choice" in result.stdout
    (file,) = tmp_path.rglob("results_*.json")
    assert json.loads(file.read_text("utf-8"))["config"]["fastdean_masked_weights"] == len(_mask())
