"""The benchmark of the collapse regulariser: what takes turns is the same work but for it."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import gate
import records
import regularizer_run
import regularizer_subject
import run
import table
from regularizer_run import METRICS, STEP


@pytest.fixture(autouse=True)
def package_of_this_checkout(monkeypatch):
    """The tests may run on an installed package; the benchmarks refuse one."""
    here = records.ROOT / "fastdean" / "__init__.py"
    monkeypatch.setattr(records.fastdean, "__file__", str(here))
    monkeypatch.setattr(records, "sources_checksum", lambda: "these sources")


@pytest.fixture
def benchmark(tmp_path):
    """run.py regularizer on tiny models, without the tests that run before a measurement."""

    def measure(*arguments):
        sizes = ["--tokens", "32", "--length", "8", "--repeats", "2"]
        metrics = ["--metrics-tokens", "100", "--metrics-repeats", "1"]
        places = ["--device", "cpu", "--out", str(tmp_path / "results")]
        flags = ["--toy", "--no-gate", *places, *sizes, *metrics]
        return run.main(["regularizer", *flags, *arguments])

    return measure


def subject(architecture):
    return regularizer_subject._random_subject(architecture, torch.device("cpu"), toy=True)


def test_steps_and_metrics_of_both_architectures_are_recorded(benchmark, tmp_path, capsys):
    assert benchmark() == 0
    rows = list(records.read(tmp_path / "results", "regularizer"))
    kinds = (records.RegularizerRecord, records.Environment)
    assert all(set(row) == {f.name for kind in kinds for f in fields(kind)} for row in rows)
    steps = ["without", "std, detached", "std, live"]
    assert [(row["architecture"], row["measured"], row["impl"]) for row in rows] == [
        (architecture, what, impl)
        for architecture in ("causal", "masked")
        for what, impls in ((STEP, steps), (METRICS, ["forward passes", METRICS]))
        for impl in impls
    ]
    for first, *others in records.grouped(rows, ("architecture", "measured")):
        assert first["ratio_median"] == first["ratio_p20"] == first["ratio_p80"] == 1
        for row in (first, *others):
            assert row["floor_s"] == first["median_s"] and row["repeats"] == len(row["seconds"])
            # Every tenth token and what random ones add.
            assert 0 < row["labelled"] < row["tokens"] / 2
            assert (row["classes"], row["features"], row["toy"]) == (8, 32, True)
    assert {row["tokens"] for row in rows if row["measured"] == STEP} == {32}
    assert all(row["tokens"] >= 100 for row in rows if row["measured"] == METRICS)
    assert capsys.readouterr().out.count("| without a regulariser |") == 2


def test_ratios_are_those_of_a_round_and_warm_up_is_not_counted(monkeypatch):
    waiting = {"a": [50.0, 60.0, 1.0, 2.0, 4.0], "b": [70.0, 80.0, 3.0, 4.0, 4.0]}
    order = []

    def turn(name):
        order.append(name)
        return waiting[name].pop(0)

    contenders = {name: lambda name=name: turn(name) for name in waiting}
    turns = regularizer_run._take_turns(contenders, 3)
    assert order == ["a", "b"] * 5
    assert turns == {"a": [1.0, 2.0, 4.0], "b": [3.0, 4.0, 4.0]}
    # 3, 2 and 1.
    assert regularizer_run.Spread.of_ratios(turns["b"], turns["a"]).p80 == pytest.approx(2.6)


@pytest.mark.parametrize("architecture", regularizer_subject.ARCHITECTURES)
def test_a_step_with_the_regulariser_trains_with_its_term_and_leaves_no_hook(architecture):
    case = subject(architecture)
    batch = case.batch(32, 8)
    steps = regularizer_run._Steps(case, batch)
    case.model.train()
    hooks = sum(len(module._forward_hooks) for module in case.model.modules())
    for name in (None, *regularizer_run._REGULARIZERS):
        before = case.model.get_output_embeddings().weight.detach().clone()
        assert steps.seconds(name) > 0
        assert not torch.equal(case.model.get_output_embeddings().weight, before)
        assert sum(len(module._forward_hooks) for module in case.model.modules()) == hooks
    labelled = case.labelled(batch["input_ids"], batch["labels"])
    assert steps._statistics["std, detached"]["counts"].sum() == labelled
    steps.seconds("std, detached")
    assert steps._statistics["std, detached"]["counts"].sum() == 2 * labelled


def test_a_term_that_is_not_finite_is_not_timed(benchmark, monkeypatch, tmp_path, capsys):
    value = property(lambda self: float("nan"))
    monkeypatch.setattr(regularizer_run.CollapseRegularizer, "value", value)
    assert benchmark("--architecture", "masked") == 2
    assert "the regulariser std, detached must give a finite term" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_the_batch_of_a_masked_model_hides_tokens_and_counts_what_they_hide():
    case = subject("masked")
    batch = case.batch(64, 16)
    hidden = batch["labels"] != -100
    assert hidden.any() and batch["input_ids"].shape == (4, 16)
    whole = torch.where(hidden, batch["labels"], batch["input_ids"])
    assert torch.equal(whole.flatten(), case.stream[:64])
    of_a_class = torch.isin(whole, torch.tensor([ids for (ids,) in case.classes.pieces]))
    assert case.labelled(batch["input_ids"], batch["labels"]) == int(of_a_class.sum())


def test_both_sides_of_the_metrics_run_the_same_passes():
    case = subject("causal")
    seen = []
    handle = case.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].clone()), with_kwargs=True
    )
    options = run._parse(["regularizer", "--metrics-tokens", "100", "--metrics-repeats", "1"])
    found = regularizer_run._metrics(case, options)
    handle.remove()
    batches = int(found.case.split(" in ")[1].split()[0])
    assert batches >= 1
    passes, metrics = seen[-2 * batches : -batches], seen[-batches:]
    assert all(torch.equal(a, b) for a, b in zip(passes, metrics, strict=True))


def test_too_few_tokens_are_refused(benchmark, tmp_path, capsys):
    assert benchmark("--length", "64") == 2
    assert "error: tokens must be at least length, 64, to make a seq" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_a_run_is_resumed_only_where_nothing_changed(benchmark, tmp_path, monkeypatch):
    def measured(*arguments):
        assert benchmark("--architecture", "masked", "--resume", *arguments) == 0
        return len(list(records.read(tmp_path / "results", "regularizer")))

    assert [measured(), measured(), measured("--seconds", "60")] == [5, 5, 10]
    monkeypatch.setattr(records, "sources_checksum", lambda: "other sources")
    assert measured() == 15


def test_a_run_without_time_measures_nothing(benchmark, tmp_path, capsys):
    assert benchmark("--seconds", "0") == 0
    assert "the time is used up: call again" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_the_tests_of_the_regulariser_run_first(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(gate, "passes", lambda tests, on_gpu: bool(seen.extend(tests)))
    command = ["regularizer", "--toy", "--device", "cpu", "--out", str(tmp_path)]
    assert run.main(command) == 1
    assert "tests/test_collapse_regularizer.py" in seen
    assert all((records.ROOT / test).is_file() for test in seen)
    assert "nothing was measured" in capsys.readouterr().err


def result(impl, seconds, ratio, date="2026-01-02T00:00:00+00:00", **changes):
    median, p20, p80 = seconds
    row = {
        "op": "regularizer", "case": "tiny, steps of 4 x 64 tokens", "architecture": "causal",
        "measured": STEP, "impl": impl, "model": "tiny", "tokens": 256, "labelled": 30,
        "classes": 90, "features": 64, "repeats": 3, "median_s": median, "p20_s": p20,
        "p80_s": p80, "ratio_median": ratio[0], "ratio_p20": ratio[1], "ratio_p80": ratio[2],
        "floor_s": 1.0, "toy": False, "gate": "passed", "device": "Some CPU", "driver": None,
        "cuda": None, "threads": 2, "cpu_capability": "AVX2", "torch": "2.13.0",
        "transformers": "5.23.0", "fastdean": "0.1.0", "commit": "0123456789abcdef",
        "dirty": False, "date": date, "command": "python benchmarks/run.py regularizer",
    }  # fmt: skip
    return {**row, **changes}


def test_the_table_says_what_is_within_the_noise(tmp_path, capsys):
    rows = [
        result("without", (9, 9, 9), (1, 1, 1), "2026-01-01T00:00:00+00:00"),
        result("without", (2, 1.5, 2.5), (1, 1, 1)),
        result("std, detached", (2.02, 1.6, 2.5), (1.01, 0.99, 1.04)),
        result("std, live", (2.2, 1.7, 2.6), (1.1, 1.05, 1.2)),
    ]
    folder = tmp_path / "some-cpu"
    folder.mkdir()
    (folder / "regularizer.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert table.main(["--op", "regularizer", "--results", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:6] == [
        "| training step | seconds (p20 to p80) | times the first, round by round (p20 to p80) |",
        "|---|---|---|",
        "| without a regulariser | 2.000 (1.500 to 2.500) | 1.000x |",
        "| with it: std, detached | 2.020 (1.600 to 2.500) | 1.010x (0.990 to 1.040), no "
        "difference beyond noise |",
        "| with it: std, live | 2.200 (1.700 to 2.600) | 1.100x (1.050 to 1.200) |",
        "",
    ]
    assert lines[6].startswith(
        "tiny, steps of 4 x 64 tokens: 256 tokens, 30 of them of one of 90 classes, 64 features; "
        "3 rounds. Some CPU, 2 threads, AVX2;"
    )


def test_the_table_has_its_place_in_the_document():
    text = (records.ROOT / "docs" / "performance.md").read_text("utf-8")
    assert "| a table |" in table.replace_between_markers(text, "regularizer", "| a table |")
