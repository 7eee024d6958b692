"""The benchmark of the collapse regulariser: what takes turns is the same work but for it."""

from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks import regularizer
from benchmarks.__main__ import main
from benchmarks.harness import store
from benchmarks.regularizer import ARCHITECTURES, CONTENDERS, METRICS, STEP, load_subject

pytestmark = pytest.mark.usefixtures("quick_benchmarks")


@pytest.fixture
def benchmark(tmp_path):
    """`regularizer` on tiny models, without the tests that run before a measurement."""

    def measure(*arguments):
        sizes = ["--tokens", "32", "--length", "8", "--repeats", "2"]
        sizes += ["--metrics-tokens", "100", "--metrics-repeats", "1"]
        places = ["--device", "cpu", "--out", str(tmp_path / "results")]
        return main(["regularizer", "--toy", "--no-gate", *places, *sizes, *arguments])

    return measure


def subject(architecture):
    return load_subject(argparse.Namespace(device="cpu", toy=True), architecture)


def test_steps_and_metrics_of_both_architectures_are_recorded(benchmark, tmp_path, capsys):
    assert benchmark() == 0
    rows = list(store.read(tmp_path / "results", "regularizer"))
    assert [(row["architecture"], row["measured"], row.contender) for row in rows] == [
        (architecture, what, contender)
        for architecture in ("causal", "masked")
        for what, names in (
            (STEP, ("without", "std, detached", "std, live")),
            (METRICS, ("forward passes", METRICS)),
        )
        for contender in names
    ]
    for first, *others in store.grouped(rows, ("architecture", "measured")):
        assert first["ratio_median"] == first["ratio_p20"] == first["ratio_p80"] == 1
        for row in (first, *others):
            assert row["floor_s"] == first["median_s"] and row["repeats"] == len(row["rounds_s"])
            # Every tenth token and what random ones add.
            assert 0 < row["labelled"] < row["tokens"] / 2
            assert (row["classes"], row["features"], row.toy) == (8, 32, True)
    assert {row["tokens"] for row in rows if row["measured"] == STEP} == {32}
    assert all(row["tokens"] >= 100 for row in rows if row["measured"] == METRICS)
    assert capsys.readouterr().out.count("| without a regulariser |") == 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_with_the_regulariser_trains_with_its_term_and_leaves_no_hook(architecture):
    case = subject(architecture)
    batch = case.batch(32, 8)
    steps = regularizer.Steps(case, batch)
    hooks = sum(len(module._forward_hooks) for module in case.model.modules())
    for name in CONTENDERS[STEP]:
        before = case.model.get_output_embeddings().weight.detach().clone()
        assert steps.turn(name).seconds > 0
        assert not torch.equal(case.model.get_output_embeddings().weight, before)
        assert sum(len(module._forward_hooks) for module in case.model.modules()) == hooks
    labelled = case.labelled(batch["input_ids"], batch["labels"])
    assert steps.statistics["std, detached"]["counts"].sum() == labelled
    steps.turn("std, detached")
    assert steps.statistics["std, detached"]["counts"].sum() == 2 * labelled


def test_the_batch_of_a_masked_model_hides_tokens_and_counts_what_they_hide():
    case = subject("masked")
    batch = case.batch(64, 16)
    hidden = batch["labels"] != -100
    assert hidden.any() and batch["input_ids"].shape == (4, 16)
    whole = torch.where(hidden, batch["labels"], batch["input_ids"])
    stream = torch.cat([text.input_ids for text in case.texts])
    assert torch.equal(whole.flatten(), stream[:64])
    of_a_class = torch.isin(whole, torch.tensor([ids for (ids,) in case.classes.pieces]))
    assert case.labelled(batch["input_ids"], batch["labels"]) == int(of_a_class.sum())


def test_both_sides_of_the_metrics_run_the_same_passes():
    case = subject("causal")
    _, _, turns = regularizer.metrics(case, argparse.Namespace(metrics_tokens=100))
    seen = {name: [] for name in turns}
    for name, turn in turns.items():
        handle = case.model.register_forward_pre_hook(
            lambda module, args, kwargs, to=seen[name]: to.append(kwargs["input_ids"].clone()),
            with_kwargs=True,
        )
        turn()
        handle.remove()
    passes, metrics = seen.values()
    # Before its own passes `collapse_metrics` may try the model out.
    metrics = metrics[-len(passes) :]
    assert passes and all(torch.equal(a, b) for a, b in zip(passes, metrics, strict=True))
