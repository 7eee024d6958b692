"""The first paper's table: each figure against its files, once done not done again, no claims."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import forked
import numpy as np
import pytest
import tiny_models
import torch
from huggingface_hub import constants
from tiny_folders import WORDS, save_model, write_jsonl, write_sources

from experiments.reproduce_spin import __main__ as command
from experiments.reproduce_spin import paper, table
from experiments.reproduce_spin.table import Measure
from fastdean.evaluation import holm
from fastdean.files.hub import cached_commit
from fastdean.models import loading

SEEDS = 2


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """The arguments of a study on a tiny model that is its own judge: it says a word of a number.

    Even ones mean safe.
    """
    folder = tmp_path_factory.mktemp("spin")
    sources = write_sources(folder)
    for n, name in enumerate(("salad_fairness", "salad_privacy", "benign", "text")):
        column = "text" if name == "text" else "prompt"
        content = [{column: " ".join(WORDS[n + i : n + i + 4])} for i in range(10)]
        sources[name] = write_jsonl(folder / f"{name}.jsonl", content)
    values = {str(digit): ("safe", "unsafe")[digit % 2] for digit in range(10)}
    template = {"name": "own", "version": 1, "kind": "causal", "model": "none/such"}
    template |= {"prompt": "{prompt} {answer}", "max_new_tokens": 1}
    template |= {"verdict": {"pattern": r"\Aw\d*(\d)\b", "values": values}}
    (folder / "own.json").write_text(json.dumps(template))
    model = str(save_model(folder / "model"))
    return [
        *("--model", model, "--device", "cpu", "--quiet", "--window", "4"),
        *(f"--source={name}={file}" for name, file in sources.items()),
        *("--judge", f"{folder / 'own.json'}={model}", "--judge", "phrases"),
        *("--seeds", str(SEEDS), "--examples", "4", "--ratio", "0.02", "--max-new-tokens", "3"),
        # The paper's tasks are read from the hub.
        "--tasks",
    ]


@pytest.fixture(scope="module")
def done(asked, tmp_path_factory):
    out = tmp_path_factory.mktemp("done") / "out"
    assert command.main([*asked, "--out", str(out)]) == 0
    return out


def lines(file):
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def test_every_figure_is_that_of_the_verdicts_and_the_tests_are_one_family(done):
    found = json.loads((done / "results.json").read_text("utf-8"))
    safe = {
        (each["variant"], each["id"]): each["verdict"] == "safe"
        for each in lines(done / "verdicts" / "own" / "verdicts.jsonl")
    }
    # Questions stand in the order fairness, privacy, benign, ten of each.
    name, ids = "privacy, awareness (own)", range(11, 21)
    before = np.array([safe["original", i] for i in ids], dtype=float)
    after = [np.array([safe[f"fairness-{s}", i] for i in ids], dtype=float) for s in range(SEEDS)]
    assert 0 < before.mean() < 1
    assert found["origin"][name] == pytest.approx(before.mean())
    edit = found["edits"]["fairness"]
    assert edit["values"][name] == pytest.approx([each.mean() for each in after])
    assert set(found["edits"]) == set(paper.EDITS) and min(edit["weights"]) > 0
    chosen = {(e["edit"], e["against"], e["measure"]): e for e in found["changes"]}
    change = chosen["fairness", "original", name]
    assert change["mean"] == pytest.approx(np.mean(after) - before.mean())
    # Against as many random weights, as well as against the model that came.
    assert len(found["changes"]) == (len(paper.EDITS) + 1) * len(found["origin"])
    assert found["tests"]["tests"] == len(found["changes"])
    adjusted = holm([each["p_value"] for each in found["changes"]])
    assert [each["p_holm"] for each in found["changes"]] == pytest.approx(adjusted)
    text = (done / "table.md").read_text("utf-8")
    assert "| coupled: coupled, as the paper defines it |" in text and "higher" not in text
    assert "fairness, awareness (own)" in (done / "report.html").read_text("utf-8")
    assert str(done) not in text


def test_the_table_explains_its_columns_and_the_page_has_the_price(done):
    text, page = ((done / name).read_text("utf-8") for name in ("table.md", "report.html"))
    found = json.loads((done / "results.json").read_text("utf-8"))
    for edit, about in paper.EDITS.items():
        assert f"| {edit}: {about.about} |" in text
    tokens = json.loads((done / "price" / "original-perplexity.json").read_text())[0]["tokens"]
    assert f"in {len(tokens)} windows of at most {max(tokens)} predicted tokens" in text
    for said in ("Awareness is safe /", "safe by answering is the share", "Detects: the smallest"):
        assert said in text
    # Phrases read no verdict, of which none could be missed.
    assert "own: 0 of 390 verdicts not read." in text and "phrases: 0 of" not in text
    assert "Perplexity ratio" in page and "Price: " in page.replace("</strong>", "")
    # No share changes by more than all of it.
    shares = [each for each in found["changes"] if each["no_effect"] == 0.0]
    assert all(-1.0 <= each["low"] <= each["high"] <= 1.0 for each in shares)
    assert all(each["detects"] is None or each["detects"] <= 1.0 for each in shares)
    assert all(each["mean"] == pytest.approx(each["after"] - each["before"]) for each in shares)


@pytest.mark.parametrize(
    ("change", "written"),
    [
        ({"detects": 0.123456, "no_effect": 0.0}, "0.123"),
        ({"detects": None, "no_effect": 0.0}, "-"),
        ({"detects": 1.0001234, "no_effect": 1.0}, "x 1.0001"),
    ],
)
def test_what_is_detected_is_told_from_no_change_and_is_possible(change, written):
    assert table._detected(change) == written
    assert table._ends(1.0004, 1.0099, 1.0) == "1.0004 to 1.0099"


def test_what_is_done_is_not_done_again_and_the_estimate_comes_first(
    asked, done, monkeypatch, capsys
):
    before = (done / "table.md").read_text("utf-8")

    def load(*arguments, **options):
        raise AssertionError("nothing is left to load a model for")

    monkeypatch.setattr(loading, "load_model", load)
    monkeypatch.setattr("experiments.reproduce_spin.steps.load_model", load)
    assert command.main([*asked, "--out", str(done)]) == 0
    printed = capsys.readouterr().out
    assert (done / "table.md").read_text("utf-8").splitlines()[:-1] == before.splitlines()[:-1]
    assert printed.index("Memory to score: ") < printed.index("# model: the first paper's table")
    for said in ("= 24 forward and backward", "30 questions x 13 models", "= 390, of at most 3"):
        assert said in printed
    assert "Calls of judges: 390 x 1 = 390." in printed and "Time: not known" in printed
    assert command.main([*asked, "--out", str(done), "--seeds", "3"]) == 2
    assert "which began with seeds 2 (now 3)" in capsys.readouterr().err


def test_sources_that_are_not_there_are_named_together_before_anything_is_loaded(
    asked, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(command, "estimate", lambda *a, **k: pytest.fail("it went on"))
    missing = ["--source=privacy=no.csv", "--source=salad_fairness=no.csv"]
    arguments = ["--out", str(tmp_path / "x"), *missing]
    assert command.main([*asked, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "got 2 that are not: privacy, salad_fairness (source must be an existing file" in line
    assert line.count("'no.csv'") == 1 and line.endswith("pass each as --source NAME=FILE")
    assert not (tmp_path / "x").exists()
    assert command.main([*asked, "--judge", "phrases"]) == 2
    assert "judge must name each judge once" in capsys.readouterr().err


def test_a_judge_without_a_model_is_named_before_anything_is_loaded(
    asked, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(command.steps, "do", lambda *a, **k: pytest.fail("it went on"))
    own = next(each.partition("=")[0] for each in asked if each.partition("=")[0].endswith(".json"))
    others = [f"{own}=none/such" if each.startswith(own) else each for each in asked]
    for more in ([], ["--estimate"]):
        assert command.main([*others, "--out", str(tmp_path / "x"), *more]) == 2
        assert "error: --judge 'own': model must be" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_folder_of_other_files_is_left_alone_and_a_study_that_failed_at_once_is_not_in_the_way(
    asked, tmp_path, monkeypatch, capsys
):
    (tmp_path / "notes.txt").write_text("mine")
    assert command.main([*asked, "--out", str(tmp_path)]) == 2
    assert "which holds other files; pass another --out" in capsys.readouterr().err
    out = ["--out", str(tmp_path / "out")]
    assert command.main([*asked, *out, "--ratio", "2"]) == 2
    assert "ratio must be above 0 and at most 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(command.steps, "run_job", lambda *a, **k: _raise(ValueError("too small")))
    assert command.main([*asked, *out, "--ratio", "1e-9"]) == 2
    assert command.main([*asked, *out]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: too small"


def with_long_rows(asked, folder):
    """The arguments with one fairness row and one privacy question beyond the 128 positions."""
    found, long = list(asked), " ".join(WORDS[:1] * 150)
    for name, key in (("fairness", "response"), ("salad_privacy", "prompt")):
        place = next(i for i, each in enumerate(asked) if each.startswith(f"--source={name}="))
        rows = lines(Path(asked[place].partition(f"{name}=")[2]))
        rows[2][key] = long
        found[place] = f"--source={name}={write_jsonl(folder / f'{name}.jsonl', rows)}"
    return [*found, "--examples", "10"]


def test_what_no_step_could_take_is_named_before_the_first_with_advice_that_can_be_followed(
    asked, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(command.steps, "run_job", lambda *a, **k: pytest.fail("it went on"))
    long, out = with_long_rows(asked, tmp_path), ["--out", str(tmp_path / "out")]
    cut = "cut it with --max-length; or pass --skip-bad-rows to leave such rows out"
    masked = save_model(tmp_path / "masked", tiny_models.bert)
    known = {each.option_strings[-1] for each in command._parser()._actions}
    for arguments, said in [
        (long, cut),
        ([*long, "--max-length", "100"], "row 3 must leave room for 3 new tokens in the model's"),
        ([*asked, "--ratio", "1e-9"], "of the largest matrix; the smallest that would is"),
        (["--model", str(masked), *asked[2:]], "--model must be a causal language model"),
        ([*asked, "--ratio", "2"], "ratio must be above 0 and at most 1, got 2"),
    ]:
        for more in ([], ["--estimate"]):
            assert command.main([*arguments, *out, *more]) == 2
            (error,) = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error")]
            assert said in error
            assert {word.rstrip(";,") for word in error.split() if word[:2] == "--"} <= known
            assert "min_k" not in error and "skip_bad_rows" not in error
    assert not (tmp_path / "out").exists()


def test_rows_and_questions_that_are_left_out_are_counted_and_stand_in_no_figure(
    asked, tmp_path, capsys
):
    few = ["--seeds", "1", "--tasks", "--skip-bad-rows", "--out", str(tmp_path / "out")]
    assert command.main([*with_long_rows(asked, tmp_path), *few]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert found["settings"]["questions"]["salad_privacy"] == 9
    warnings = " ".join(found["warnings"])
    assert "Seed 0, fairness: 1 row is left out: row 3 (" in warnings
    assert "salad_privacy: 1 of 10 questions are left out, too long to answer." in warnings
    counted = {each["measure"]: each["n"] for each in found["changes"]}
    assert counted["privacy, awareness (own)"] == 9 and counted["fairness, awareness (own)"] == 10


def test_the_commit_that_a_hub_id_stood_for_is_kept(asked, tmp_path, monkeypatch, capsys):
    home, commit = tmp_path / "cache" / "models--me--m", "0123456789abcdef" * 2 + "01234567"
    shutil.copytree(asked[1], home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert cached_commit("me/m") == commit
    assert cached_commit(asked[1]) is None and cached_commit("me/other") is None
    study = command._study(command._parser().parse_args(["--model", "me/m", *asked[2:]]))
    study = dataclasses.replace(study, out=tmp_path / "out")
    command.steps.open_study(study, command.steps.read_sources(study))
    assert command.steps.revision(study) == commit


def test_parts_are_counted_and_nothing_is_announced_that_measures_nothing(asked, tmp_path, capsys):
    loud = [each for each in asked if each != "--quiet"]
    few = ["--seeds", "1", "--tasks", "--out", str(tmp_path / "out")]
    assert command.main([*loud, *few]) == 0
    printed, steps = capsys.readouterr()
    parts = [line for line in printed.splitlines() if line.startswith("part ")]
    names = ("scored/0", "answers", "verdicts/own", "verdicts/phrases", "price")
    for number, (part, name) in enumerate(zip(parts, names, strict=True), start=1):
        assert part.startswith(f"part {number} of 5: ") and part.endswith(name)
    assert "7 of 7: perplexity, unspared-0" in printed
    assert "fastdean: step 7 of 7, couple" in steps and "measure" not in steps
    assert "fastdean: step 10 of 10, answers, unspared-0" in steps
    # The judge that a file and a model make keeps both names, and a source its own.
    made = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))["command"]
    assert "--judge own.json=model" in made and "--source=fairness=fairness.jsonl" in made


def test_many_verdicts_that_could_not_be_read_are_a_warning():
    def records(name, lost):
        kinds = ["unparsed"] * lost + ["safe"] * (30 - lost)
        return [{"judge": name, "variant": v, "verdict": k} for v in "ab" for k in kinds]

    found = {"own": [*records("own", 0)[:30], *records("own", 10)[30:]], "fine": records("f", 1)}
    phrases = [{"judge": "phrases", "variant": "a", "verdict": None}]
    (said,) = table._unread({**found, "phrases": phrases})
    assert said.startswith("own: 10 of 60 verdicts could not be read, most under b (10 of 30): ")


def test_an_interrupt_is_one_line(asked, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.steps, "run_job", lambda *a, **k: _raise(KeyboardInterrupt()))
    assert command.main([*asked, "--out", str(tmp_path / "out")]) == 130
    said = "interrupted; the same command goes on from here"
    assert capsys.readouterr().err.splitlines()[-1] == said


def _raise(error):
    raise error


def without_a_line(data):
    return data.partition(b"\n")[2]


def with_a_line_twice(data):
    return data + data.partition(b"\n")[0] + b"\n"


def with_fewer_values(data):
    return json.dumps(
        [{**each, "values": each["values"][1:]} for each in json.loads(data)]
    ).encode()


DAMAGED = {
    "verdicts/own/verdicts.jsonl": {
        without_a_line: "must hold a verdict of each of 390 answers, got 389; delete its folder",
        with_a_line_twice: "line 391' must hold a record of its own",
        lambda _: b"": "must hold a verdict of each of 390 answers, got 0; delete its folder",
    },
    "price/coupled-0-perplexity.json": {
        lambda _: b"[]": "must hold a list of at least 1, got []; delete it, and it is made again",
        lambda _: b"{}": "must hold a list of at least 1, got {}; delete it, and it is made again",
        with_fewer_values: "must hold figures of the items of 'original-perplexity.json', got oth",
    },
    "study.json": {lambda _: b"[]": "must hold an object, got []; choose another --out"},
    "answers/fastdean_run.json": {lambda _: b"{}": "must hold the field job, got no such field"},
}


@pytest.mark.parametrize(
    "file, damage", [(file, damage) for file, ways in DAMAGED.items() for damage in ways]
)
def test_what_an_earlier_call_left_is_refused_where_it_is_not_whole(
    asked, done, capsys, file, damage
):
    whole, table_before = (done / file).read_bytes(), (done / "table.md").read_bytes()
    (done / file).write_bytes(damage(whole))
    try:
        assert command.main([*asked, "--out", str(done)]) == 2
    finally:
        (done / file).write_bytes(whole)
    assert DAMAGED[file][damage] in capsys.readouterr().err
    assert (done / "table.md").read_bytes() == table_before


def test_another_judge_of_a_name_and_another_model_of_a_path_are_not_taken_for_the_first(
    asked, done, tmp_path, monkeypatch, capsys
):
    place = next(each for each in asked if each.endswith(f"own.json={asked[1]}"))
    other = tmp_path / "own.json"
    template = json.loads(Path(place.partition("=")[0]).read_text())
    other.write_text(json.dumps({**template, "prompt": "{answer} {prompt}"}))
    for judge in (f"{other}={asked[1]}", f"{place}/missing"):
        arguments = [judge if each == place else each for each in asked]
        assert command.main([*arguments, "--out", str(done)]) == 2
        assert "judge 'own' must be the one that gave the verdicts" in capsys.readouterr().err
    same = [f"{place}/." if each == place else each for each in asked]
    assert command.main([*same, "--out", str(done)]) == 0
    monkeypatch.setattr(command.steps, "model_files_digest", lambda model: "another")
    assert command.main([*asked, "--out", str(done)]) == 2
    assert "which began with files of the model" in capsys.readouterr().err


def test_a_name_is_no_path_and_a_judge_that_fails_leaves_the_others_to_judge(
    asked, tmp_path, capsys
):
    def judge(name, model):
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        template = {
            "name": name,
            "version": 1,
            "kind": "causal",
            "model": "x",
            "prompt": "{answer}",
        }
        template |= {"max_new_tokens": 1, "verdict": {"pattern": "(w)", "values": {"w": "safe"}}}
        file.write_text(json.dumps(template))
        return "--judge", f"{file}={model}"

    out, model = tmp_path / "a;$(touch owned) 'ü" / "out", asked[1]
    # Its tokenizer is read before anything else, its weights when it is to judge.
    broken = tmp_path / "none"
    shutil.copytree(model, broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    mine = [each for each in asked if each != "--judge" and not each.endswith(("phrases", model))]
    names = ("../../owned", str(tmp_path / "owned"), "..", ".", "a/b")
    arguments = [*judge("gone", broken), *(w for n in names for w in judge(n, model))]
    few = ["--model", model, "--seeds", "1", "--questions", "1", "--tasks", "--out", str(out)]
    mine = [each for each in mine if each != "--model"]
    assert command.main([*mine, *arguments, *few]) == 2
    said = capsys.readouterr().err
    assert "judges must all judge, got 1 that did not: gone (" in said
    assert len(list((out / "verdicts").iterdir())) == len(names) and any((out / "price").iterdir())
    assert command.main([*mine, *arguments[2:], *few]) == 0
    assert (out / "table.md").exists()
    assert not any((place / "owned").exists() for place in (tmp_path, out, out.parent))
    assert command.main([*mine, *arguments, *few[:-1], str(tmp_path / "a::b")]) == 2
    assert "out must be a folder without '::' in its path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("by_seed", "reading"),
    [
        ((1.0, 1.0, 1.0), "higher"),
        # One seed agrees with none.
        ((1.0,), "no verdict from one seed"),
        # All items agree, the seeds do not.
        ((2.0, 0.1, 0.0), "no effect beyond noise between seeds"),
        ((0.0, 0.0, 0.0), "no effect beyond noise"),
    ],
)
def test_an_effect_takes_items_and_seeds_that_agree(by_seed, reading):
    noise = np.random.default_rng(0).normal(scale=0.1, size=200)
    before = np.zeros(200)
    values = {"original": before} | {
        f"coupled-{seed}": before + move + noise * (1 + seed / 10)
        for seed, move in enumerate(by_seed)
    }
    measures = [Measure(name, values, None) for name in ("a", "b")]
    # A model that an edit broke has no perplexity: it is told, and counts as a test.
    lost = values | {f"coupled-{len(by_seed) - 1}": np.full(200, np.nan)}
    measures.append(Measure("text", lost, None, np.ones(200)))
    changes, family, broken = table._changes(measures, {"coupled": range(len(by_seed))})
    assert broken == ["text is no number, and not compared, of: coupled."]
    assert (family["tests"], len(changes)) == (3, 2)
    for change in changes:
        assert change["reading"] == reading
        assert reading != "higher" or change["p_holm"] <= 0.05


def _killed_at(arguments, nth):
    """The study in a process that dies when it puts its nth file in place."""
    replace, left = os.replace, nth

    def replacing(*places, **options):
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*places, **options)

    os.replace = replacing
    torch.set_num_threads(1)
    assert command.main(arguments) == 0


@pytest.mark.slow
def test_a_killed_study_goes_on_and_ends_as_one_that_was_left_alone(asked, done, tmp_path):
    arguments = [*asked, "--out", str(tmp_path / "out")]
    ends = [forked.run(_killed_at, arguments, nth).returncode for nth in (2, 7, 13, 19, 9, 9)]
    assert ends.count(-signal.SIGKILL) >= 4
    last = forked.run(_killed_at, arguments, 10_000)
    assert last.returncode == 0, last.stderr

    def figures(out):
        kept = json.loads((out / "results.json").read_text("utf-8"))
        return {
            name: kept[name] for name in ("origin", "edits", "changes", "unparsed", "agreement")
        }

    assert figures(tmp_path / "out") == figures(done)
