"""The benchmarks of single operations: who is timed computes the right thing."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from machine import DEVICE

from benchmarks.__main__ import main
from benchmarks.harness import environment, gate, lengths, store, tables
from benchmarks.harness.cases import Contender
from benchmarks.harness.store import Record
from benchmarks.ops import collapse, importance, measuring, run, table, unit_importance
from fastdean import kernels as fastdean_kernels

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


@pytest.mark.parametrize("module", [importance, unit_importance, collapse])
def test_the_compiled_expressions_compute_the_operation(module):
    # "eager" traces as every backend does and spares the test the compiler.
    run_it = module.compiled_expression(backend="eager")
    contender = Contender("torch.compile", run_it, compiled=True)
    case = next(module.cases(True))
    assert measuring.check(case, contender, generator()) <= contender.tolerance
    torch._dynamo.reset()


def toy(op):
    return next(run.OPERATIONS[op](True))


def off_by(relative):
    return lambda inputs: importance.mm_loop(inputs).mul_(1 + relative)


def test_a_contender_that_is_wrong_or_leaves_memory_unwritten_is_not_timed():
    for wrong, text in (
        (off_by(1e-3), "wrong must compute importance to 5e-05, got an error of 0.001"),
        (lambda inputs: inputs.acc, "wrong must compute importance"),
        (lambda inputs: torch.empty_like(inputs.acc), "got an error of nan"),
    ):
        with pytest.raises(RuntimeError, match=text):
            measuring.check(toy("importance"), Contender("wrong", wrong), generator())
    assert not torch.are_deterministic_algorithms_enabled()
    case = toy("selection")
    right = next(each for each in case.contenders if each.name == "reference")

    def one_off(inputs):
        index = right.run(inputs).clone()
        index[-1] = (index[-1] + 1) % inputs.sums.numel()
        return index

    for wrong in (one_off, lambda inputs: right.run(inputs)[1:]):
        with pytest.raises(RuntimeError, match="wrong must compute selection to 0, got an error"):
            measuring.check(case, Contender("wrong", wrong, tolerance=0.0), generator())


def test_the_cases_are_those_that_are_to_be_measured():
    real = {op: list(cases(False)) for op, cases in run.OPERATIONS.items()}

    def sizes(op, *names, **chosen):
        return [
            tuple(case.setup[name] for name in names)
            for case in real[op]
            if all(getattr(case, key) == value for key, value in chosen.items())
        ]

    names = ("rows", "columns", "examples")
    shapes = ((18944, 3584), (3584, 18944), (3584, 3584), (512, 3584))
    on_gpu = sizes("importance", *names, device_type="cuda")
    assert set(on_gpu) == {(*shape, n) for shape in shapes for n in (8, 32, 64)}
    assert len(on_gpu) == 4 * 3 * 6
    cpu_shapes = ((1536, 576), (576, 1536), (8192, 2048), (2048, 8192))
    on_cpu = sizes("importance", "dtype", *names[:2], device_type="cpu")
    assert set(on_cpu) == {(dtype, *shape) for dtype in ("fp32", "bf16") for shape in cpu_shapes}
    assert len(on_cpu) == 2 * 4 * 6
    assert {k for (k,) in sizes("selection", "k")} == {33, 67, 678, 6789, 67895, 678952}
    assert sizes("unit_importance", "tokens", "units") == [(16384, 18944)]
    assert sizes("expert_importance", "experts", "examples") == [(64, 32), (64, 8)]
    assert sizes("mask", "matrices") == [(84,), (12,)]
    found = sizes("collapse", "tokens", "features", "classes", "labels")
    every = itertools.product((2048, 16384), (768, 4096), (287, 8192), ("uniform",))
    assert set(found) == {*every, (2048, 768, 287, "zipf")} and len(found) == 3 * 8 + 1
    # What something is aimed at for comes first, and every case has a name of its own.
    aimed = sizes("importance", "lengths", "tokens_per_example", device_type="cuda")
    is_aimed = [kind == "beavertails" or tokens >= 256 for kind, tokens in aimed]
    assert is_aimed == [True] * 36 + [False] * 36 and found[0] == (16384, 4096, 287, "uniform")
    every = [(case.op, case.name, case.dtype) for cases in real.values() for case in cases]
    assert len(set(every)) == len(every)
    compiled = {
        op: sum(any(c.compiled for c in case.contenders) for case in real[op]) for op in real
    }
    assert compiled["importance"] == compiled["collapse"] == 2 and max(compiled.values()) <= 3


def test_the_contenders_are_those_that_are_to_be_measured(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    names = {
        op: {each.name for case in cases(False) for each in (*case.contenders, case.floor) if each}
        for op, cases in run.OPERATIONS.items()
    }
    plain = {"plain product"}
    assert names == {
        "importance": plain
        | {"triton", "native", "reference", "mm per example", "bmm, padded", "torch.compile"},
        "selection": {"triton", "native", "reference", "torch.topk"},
        "unit_importance": {"triton", "reference", "torch", "torch.compile"},
        "expert_importance": plain
        | {"triton", "reference", "triton, expert by expert", "mm per segment"},
        "mask": {
            *("native", "native, zeros only", "reference", "index_fill_ loop", "boolean masks")
        },
        "collapse": {"native", "reference", "torch", "torch.compile", "one-hot"}
        | {f"{name}, in place" for name in ("native", "torch", "torch.compile")},
    }
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "triton, interpreted" in {each.name for each in toy("importance").contenders}


def test_the_work_of_a_case_by_hand():
    case = importance.case(18944, 3584, 32, 256)
    tokens, matrix = 32 * 256, 18944 * 3584
    assert case.operations == 2 * tokens * matrix
    # bf16 inputs read once, the fp32 accumulator read and written.
    assert case.bytes == 2 * tokens * (18944 + 3584) + 8 * matrix
    [unit] = unit_importance.cases(False)
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


def test_a_name_that_nothing_has_is_refused_before_any_test_runs(kernels, monkeypatch, capsys):
    monkeypatch.setattr(gate, "passes", lambda *a, **options: pytest.fail("ran the tests"))
    assert kernels("--op", "selection", "--impl", "tritn", gated=True) == (2, [])
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --impl must be one of ")
    assert line.endswith(", 'reference', 'torch.topk', got 'tritn' for selection")


def test_a_named_contender_that_can_run_nowhere_is_an_error(kernels, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(fastdean_kernels, "refusal", lambda device, dtype: "no kernels today")
    assert kernels("--op", "importance", "--impl", "triton") == (2, [])
    error = capsys.readouterr().err
    assert "error: --impl 'triton' cannot be measured: " in error and "no kernels today" in error


def test_interpreted_kernels_are_not_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["kernels", "--device", "cpu", "--out", str(tmp_path)]) == 2
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


def row_of(contender, median_s, case="2 x 3", day=2, **metrics):
    seconds = {"median_s": median_s, "p20_s": 0.9 * median_s, "p80_s": 1.1 * median_s}
    metrics = {
        "timed_by": "events", "operations_per_s": 1e9 / median_s, "bytes_per_s": 1e6 / median_s,
        "floor": "plain product", "floor_s": 0.001, "copy_bandwidth": 2e9, "matrix_rate": 3e12,
        "product": "out_dtype=fp32", "device_s": None, **metrics,
    }  # fmt: skip
    known = next(store.read(store.RESULTS, "importance")).environment
    here = known | {"device": "Some GPU", "date": f"2026-01-0{day}"}
    setup = {"dtype": "bf16"}
    return Record("importance", case, contender, setup, seconds, metrics, environment=here)


def test_the_table_has_a_column_for_each_contender_and_the_latest_of_each():
    rows = [
        row_of("triton", 0.5, day=1),
        row_of("mm per example", 0.006, device_s=0.005),
        row_of("plain product", 0.001),
        row_of("triton", 0.002, day=3),
        row_of("mm per example", 0.001, case="4 x 5"),
    ]
    text = tables.rendered(table.operation_table("importance"), rows)
    header, _, first, second, *_ = text.splitlines()
    assert header == "| case | floor | triton | mm per example | triton / floor | rate of triton |"
    assert first == (
        "| 2 x 3, bf16 | 1.000 ms | 2.000 ms | 6.000 ms (3.0x, device 5.000 ms) | 2.00x "
        "| 500.0 GFLOP/s |"
    )
    # What was not measured is left open.
    assert second == "| 4 x 5, bf16 | 1.000 ms | | 1.000 ms | | |"
    assert "p20 to p80 spans at most 20% of one. Floor: plain product. Copies 2 GB/s" in text
    assert "Device: what it is busy for, by torch's profiler, without gaps" in text
