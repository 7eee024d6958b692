"""The benchmarks of single operations: who is timed computes the right thing."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from machine import DEVICE

from benchmarks.__main__ import main
from benchmarks.gpu.aims import AIMS
from benchmarks.harness import environment, gate, lengths, store
from benchmarks.harness.cases import Contender
from benchmarks.harness.store import Record
from benchmarks.ops import importance, measuring, run

TOYS = [case for cases in run.OPERATIONS.values() for case in cases(True)]
PAIRS = [(case, each) for case in TOYS for each in case.contenders if not each.compiled]

pytestmark = pytest.mark.usefixtures("quick_benchmarks")


def generator(seed=3):
    return torch.Generator(DEVICE).manual_seed(seed)


@pytest.mark.parametrize("case, contender", PAIRS, ids=lambda each: each.name)
def test_every_contender_computes_the_operation(case, contender, extension_built):
    if contender.name.startswith("native") and not extension_built:
        pytest.skip("an install without the extension is under test")
    assert contender.refusal(DEVICE) == ""
    assert measuring.check(case, contender, generator()) <= contender.tolerance


def test_the_compiled_expressions_compute_the_operation(monkeypatch):
    # "eager" traces as every backend does and spares the test the compiler.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    found = [importance.case(48, 32, 3, None, compiles=True), toy("unit_importance")]
    pairs = [
        (case, contender)
        for case in (*found, toy("collapse"))
        for contender in case.contenders
        if contender.compiled
    ]
    assert len(pairs) == 4
    for case, contender in pairs:
        assert measuring.check(case, contender, generator()) <= contender.tolerance
        torch._dynamo.reset()


def toy(op):
    return next(run.OPERATIONS[op](True))


def off_by(relative):
    return lambda inputs: importance.mm_loop(inputs).mul_(1 + relative)


def test_a_contender_that_is_wrong_is_not_timed():
    for wrong, text in (
        (off_by(1e-3), "wrong must compute importance to 5e-05, got an error of 0.001"),
        (lambda inputs: inputs.acc, "wrong must compute importance"),
        (lambda inputs: inputs.acc * float("nan"), "got an error of nan"),
    ):
        with pytest.raises(RuntimeError, match=text):
            measuring.check(toy("importance"), Contender("wrong", wrong), generator())
    case = toy("selection")
    right = next(each for each in case.contenders if each.name == "reference")

    def one_off(inputs):
        index = right.run(inputs).clone()
        index[-1] = (index[-1] + 1) % inputs.sums.numel()
        return index

    for wrong in (one_off, lambda inputs: right.run(inputs)[1:]):
        with pytest.raises(RuntimeError, match="wrong must compute selection to 0, got an error"):
            measuring.check(case, Contender("wrong", wrong, tolerance=0.0), generator())


def test_every_aim_has_its_cases_and_they_come_first():
    real = {op: list(cases(False)) for op, cases in run.OPERATIONS.items()}
    here = {op: [case for case in cases if case.device_type != "cpu"] for op, cases in real.items()}
    for aim in (aim for aim in AIMS if aim.op in here):
        chosen = [aim.chosen(Record("", "", "", case.setup)) for case in here[aim.op]]
        assert sum(chosen) == aim.cases, aim.text
    first = [case.setup for case in here["importance"][:36]]
    assert all(e["lengths"] == "beavertails" or e["tokens_per_example"] >= 256 for e in first)
    names = [(case.op, case.name, case.dtype) for cases in real.values() for case in cases]
    assert len(set(names)) == len(names)
    # --impl knows the names of the toys.
    contenders = {
        each.name for cases in real.values() for case in cases for each in case.contenders
    }
    assert contenders == {each.name for case in TOYS for each in case.contenders}


def test_interpreted_kernels_have_a_name_of_their_own(monkeypatch):
    for value, name in (("0", "triton"), ("1", "triton, interpreted")):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert toy("importance").contenders[0].name == name


def test_the_work_of_a_case_by_hand():
    case = importance.case(18944, 3584, 32, 256)
    tokens, matrix = 32 * 256, 18944 * 3584
    assert case.operations == 2 * tokens * matrix
    # bf16 inputs read once, the fp32 accumulator read and written.
    assert case.bytes == 2 * tokens * (18944 + 3584) + 8 * matrix
    [unit] = run.OPERATIONS["unit_importance"](False)
    assert unit.bytes == 2 * 2 * 16384 * 18944 + 8 * 18944


def test_lengths_are_distributed_like_beavertails():
    for count in (8, 32, 128):
        tokens = [length.tokens for length in lengths.beavertails(count)]
        assert len(tokens) == count and sum(tokens) / count == pytest.approx(76, abs=1.5)
    many = lengths.beavertails(600)
    assert many == lengths.beavertails(600)
    assert sum(length.prompt for length in many) / 600 == pytest.approx(14.7, abs=0.5)
    assert 0.01 < sum(length.tokens >= 128 for length in many) / 600 < 0.03
    segments = lengths.segments(lengths.filling(16384))
    assert segments[0, 0] == 0 and segments[-1, 1] == 16384
    assert torch.equal(segments[1:, 0], segments[:-1, 1]) and (segments.diff() > 0).all()
    [one, _] = lengths.examples([lengths.Length(3, 4), lengths.Length(1, 2)], 50)
    assert (len(one), one.num_targets(0)) == (7, 4)
    assert lengths.chosen(2, 10) == [lengths.Length(2, 8)] * 2


def test_the_inputs_are_together_larger_than_the_cache(monkeypatch):
    [case] = [case for case in TOYS if case.op == "unit_importance"]
    size = 2 * 2 * 200 * 48 + 4 * 48 + 8 * 200 + 2 * 8 * 3
    for cache, sets in ((size // 100, 2), (size, 4), (100 * size, 16)):
        monkeypatch.setattr(measuring, "_CPU_CACHE_BYTES", cache)
        assert len(measuring.input_sets(case, torch.Generator())) == sets


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    """`kernels` on toys, quickly: its status, and the records that there are then."""
    monkeypatch.setattr(run, "_SECONDS_EACH", {"cpu": 0.0, "cuda": 0.0})
    monkeypatch.setattr(measuring, "_MAX_SETS", 2)

    def kernels(*arguments, gated=False):
        shared = ["--toy", "--device", DEVICE.type, "--out", str(tmp_path), *arguments]
        status = main(["kernels", *shared, *([] if gated else ["--no-gate"])])
        return status, [row for op in run.OPERATIONS for row in store.read(tmp_path, op)]

    return kernels


def contenders(rows):
    return [row.contender for row in rows]


PLAIN = ("--impl", "reference", "--impl", "plain product", "--impl", "torch.topk")


def test_kernels_appends_one_complete_record_per_contender(kernels):
    status, rows = kernels(*PLAIN)
    assert status == 0 and {row.op for row in rows} == set(run.OPERATIONS)
    for row in rows:
        assert row.toy and row.gate == "skipped"
        assert row["p20_s"] <= row["median_s"] <= row["p80_s"]
        assert row["operations_per_s"] * row["median_s"] == pytest.approx(row["operations"])
        assert row["share_of_floor"] * row["median_s"] == pytest.approx(row["floor_s"])
        assert row["device_s"] is None or row["timed_by"] == "events"
        assert (row["error"] is None) == (row.contender == "plain product")
        if row["floor"].startswith("bytes"):
            assert row["floor_s"] == pytest.approx(row["bytes"] / row["copy_bandwidth"])


SELECTION = ("--op", "selection", "--resume", "--impl")


def test_what_is_recorded_is_skipped_until_something_changes(kernels, monkeypatch):
    def measured(impl="reference", **options):
        status, rows = kernels(*SELECTION, impl, **options)
        assert status == 0
        return len(rows)

    assert [measured(), measured(), measured("torch.topk")] == [2, 2, 4]
    monkeypatch.setattr(environment, "sources_checksum", lambda: "other sources")
    assert [measured(), measured()] == [6, 6]
    # With the tests it is measured again; tests that passed are no reason to without them.
    monkeypatch.setattr(gate, "passes", lambda tests, on_gpu: True)
    assert [measured(gated=True), measured(gated=True), measured()] == [8, 8, 8]


def test_what_cannot_be_measured_is_refused_before_any_test_runs(kernels, monkeypatch, capsys):
    monkeypatch.setattr(gate, "passes", lambda *a, **options: pytest.fail("ran the tests"))
    with pytest.raises(SystemExit):
        kernels("--impl", "tritn", gated=True)
    assert "argument --impl: invalid choice: 'tritn'" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["kernels", "--device", "cpu"]) == 2
    assert "error: TRITON_INTERPRET must be unset where kernels" in capsys.readouterr().err


def test_a_run_out_of_time_says_what_is_left_and_writes_nothing(kernels, capsys):
    assert kernels("--op", "importance", "--seconds", "0") == (0, [])
    assert "the time is used up, 8 of 8 cases left: call again" in capsys.readouterr().err


def test_one_that_fails_or_cannot_run_is_named_and_the_others_are_measured(
    kernels, monkeypatch, capsys
):
    case = toy("importance")

    def raising(inputs):
        raise LookupError("no such register")

    broken = (
        Contender("wrong", off_by(1e-2)),
        Contender("raising", raising),
        Contender("unable", importance.mm_loop, refusal=lambda device: "needs a better day"),
        *case.contenders[2:4],
    )
    monkeypatch.setitem(
        run.OPERATIONS, "importance", lambda toy: iter([replace(case, contenders=broken)])
    )
    status, rows = kernels("--op", "importance")
    assert status == 1 and contenders(rows) == ["plain product", "reference", "mm per example"]
    error = capsys.readouterr().err
    for reason in ("wrong must compute importance to 5e-05", "no such register", "needs a better"):
        assert reason in error


def test_ours_come_first_on_every_case_and_what_torch_compiles_last(kernels, monkeypatch):
    slow = Contender("compiled", importance.mm_loop, compiled=True)
    found = [
        replace(case, contenders=(slow, *reversed(case.contenders[2:4])))
        for case in itertools.islice(importance.cases(True), 2)
    ]
    monkeypatch.setitem(run.OPERATIONS, "importance", lambda toy: iter(found))
    _, rows = kernels("--op", "importance")
    assert contenders(rows) == [
        *("plain product", "reference", "plain product", "reference"),
        *("mm per example", "mm per example", "compiled", "compiled"),
    ]
