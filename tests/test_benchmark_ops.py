"""The benchmarks of single operations: who is timed computes the right thing, and what is written
down can be found again."""

from __future__ import annotations

import itertools
import json
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from machine import DEVICE

from fastdean import kernels as fastdean_kernels

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks" / "gpu"))

import gate
import lengths
import measure
import plot
import prerequisites
import records
import run
import table
import timing
from operations import catalogue, collapse, importance, measuring, rates, running, unit_importance
from operations.case import Contender
from operations.record import OpRecord
from operations.results_table import operations_table

ROOT = records.ROOT


@pytest.fixture(autouse=True)
def package_of_this_checkout(monkeypatch):
    """The tests may run on an installed package; the benchmarks refuse one."""
    here = ROOT / "fastdean" / "__init__.py"
    monkeypatch.setattr(records.fastdean, "__file__", str(here))


def toys():
    return [case for cases in catalogue.OPERATIONS.values() for case in cases(True)]


TOYS = toys()
PAIRS = [(case, each) for case in TOYS for each in case.contenders if not each.compiled]


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
    case = next(module.cases(True))
    # "eager" traces as every backend does and spares the test the compiler.
    contender = Contender(
        "torch.compile", module.compiled_expression(backend="eager"), compiled=True
    )
    assert measuring.check(case, contender, generator()) <= contender.tolerance
    torch._dynamo.reset()


def toy(op):
    return next(catalogue.OPERATIONS[op](True))


def off_by(relative):
    def compute(inputs):
        result = importance.mm_loop(inputs)
        return result.mul_(1 + relative)

    return compute


def test_a_contender_that_is_wrong_or_leaves_memory_unwritten_is_not_timed():
    case = toy("importance")
    for wrong, text in (
        (off_by(1e-3), "wrong must compute importance to 5e-05, got an error of 0.001"),
        (lambda inputs: inputs.acc, "wrong must compute importance"),
        (lambda inputs: torch.empty_like(inputs.acc), "got an error of nan"),
    ):
        with pytest.raises(RuntimeError, match=text):
            measuring.check(case, Contender("wrong", wrong), generator())


def test_a_selection_is_wrong_when_one_index_is():
    case = toy("selection")
    right = next(each for each in case.contenders if each.name == "reference")

    def one_off(inputs):
        index = right.run(inputs).clone()
        index[-1] = (index[-1] + 1) % inputs.sums.numel()
        return index

    for run_it in (one_off, lambda inputs: right.run(inputs)[1:]):
        with pytest.raises(RuntimeError, match="wrong must compute selection to 0, got an error"):
            measuring.check(case, Contender("wrong", run_it, tolerance=0.0), generator())


def test_poisoning_reaches_integers_and_ends_with_the_block():
    with measuring.poisoned_allocations():
        assert torch.empty(3).isnan().all()
        assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_cases_are_those_that_are_to_be_measured():
    real = {op: list(cases(False)) for op, cases in catalogue.OPERATIONS.items()}
    on_gpu = [c for c in real["importance"] if c.device_type == "cuda"]
    names_of = ("rows", "columns", "examples")
    found = {tuple(c.settings[name] for name in names_of) for c in on_gpu}
    shapes = ((18944, 3584), (3584, 18944), (3584, 3584), (512, 3584))
    assert found == {(*shape, examples) for shape in shapes for examples in (8, 32, 64)}
    lengths_of_cases = {round(c.settings["tokens_per_example"]) for c in on_gpu}
    assert lengths_of_cases >= {32, 64, 128, 256, 512} and lengths_of_cases & {75, 76}
    on_cpu = [c for c in real["importance"] if c.device_type == "cpu"]
    assert len(on_gpu) + len(on_cpu) == len(real["importance"])
    shapes = ((1536, 576), (576, 1536), (8192, 2048), (2048, 8192))
    found = {(c.dtype, c.settings["rows"], c.settings["columns"]) for c in on_cpu}
    assert found == {(dtype, *shape) for dtype in ("fp32", "bf16") for shape in shapes}
    lengths_of_cases = {round(c.settings["tokens_per_example"]) for c in on_cpu}
    assert lengths_of_cases >= {16, 64, 128, 256, 512}
    assert {c.settings["k"] for c in real["selection"]} == {33, 67, 678, 6789, 67895, 678952}
    [unit] = real["unit_importance"]
    assert (unit.settings["tokens"], unit.settings["units"]) == (16384, 18944)
    assert all(c.settings["experts"] == 64 for c in real["expert_importance"])
    assert [c.settings["matrices"] for c in real["mask"]] == [84, 12]
    names_of = ("tokens", "features", "classes")
    sizes = [tuple(c.settings[name] for name in names_of) for c in real["collapse"]]
    assert set(sizes) == set(itertools.product((2048, 16384), (768, 4096), (287, 8192)))
    assert len(sizes) == 3 * 8 + 1
    [zipf] = [c for c in real["collapse"] if c.settings["labels"] == "zipf"]
    assert (*(zipf.settings[name] for name in names_of), zipf.settings["labelled"]) == (
        2048, 768, 287, 410,
    )  # fmt: skip
    assert zipf.name.endswith(", Zipf") and {c.settings["labels"] for c in real["collapse"]} == {
        "zipf",
        "uniform",
    }
    names = [(c.op, c.name, c.dtype) for cases in real.values() for c in cases]
    assert len(set(names)) == len(names)


def test_the_work_of_a_case_by_hand():
    case = importance.case(18944, 3584, 32, 256)
    tokens, matrix = 32 * 256, 18944 * 3584
    assert case.operations == 2 * tokens * matrix
    # bf16 inputs read once, the fp32 accumulator read and written.
    assert case.bytes == 2 * tokens * (18944 + 3584) + 8 * matrix
    [unit] = unit_importance.cases(False)
    assert unit.bytes == 2 * 2 * 16384 * 18944 + 8 * 18944


@pytest.mark.parametrize("case", TOYS, ids=lambda case: case.name)
def test_the_stated_size_of_the_inputs_is_theirs(case):
    inputs = vars(case.inputs(generator()))
    # What says which rows belong together is small, and not counted.
    tensors = [v for k, v in inputs.items() if k not in ("segments", "owner", "experts")]
    # Lists are one tensor per matrix, of which the weights are all that is large.
    tensors += inputs.get("weights", [])
    tensors = [value for value in tensors if isinstance(value, torch.Tensor)]
    assert case.input_bytes == sum(t.numel() * t.element_size() for t in tensors)


def test_labels_by_zipfs_law_fall_with_the_rank_of_their_class():
    drawn = {}
    for labels in ("uniform", "zipf"):
        made = collapse.case(20_000, 1, 50, 0.5, labels).inputs(generator()).labels
        assert int((made == -1).sum()) == 10_000
        drawn[labels] = made[made >= 0].bincount(minlength=50).double()
    harmonic = sum(1 / rank for rank in range(1, 51))
    for rank in (1, 2, 5):
        share = float(drawn["zipf"][rank - 1]) / 10_000
        assert share == pytest.approx(1 / (rank * harmonic), rel=0.15)
    assert drawn["uniform"] == pytest.approx(200, rel=0.4)


def test_lengths_are_distributed_like_beavertails():
    for count in (8, 32, 128):
        tokens = [length.tokens for length in lengths.beavertails(count)]
        assert len(tokens) == count and sum(tokens) / count == pytest.approx(76, abs=1.5)
    many = lengths.beavertails(600)
    assert many == lengths.beavertails(600)
    assert sum(length.prompt for length in many) / 600 == pytest.approx(14.7, abs=0.5)
    assert 0.01 < sum(length.tokens >= 128 for length in many) / 600 < 0.03


def test_lengths_that_fill_a_number_of_rows():
    filled = lengths.filling(16384)
    segments = lengths.segments(filled)
    assert segments[0, 0] == 0 and segments[-1, 1] == 16384
    assert torch.equal(segments[1:, 0], segments[:-1, 1])
    assert (segments[:, 1] > segments[:, 0]).all()


def test_examples_of_given_lengths():
    chosen = [lengths.Length(3, 4), lengths.Length(1, 2)]
    one, other = lengths.examples(chosen, 50)
    assert (len(one), one.num_targets(0)) == (7, 4) and (len(other), other.num_targets(0)) == (3, 2)
    assert torch.equal(one.labels[3:], one.input_ids[3:])
    assert lengths.fixed(2, 10) == [lengths.Length(2, 8)] * 2


def test_calls_take_turns_and_each_round_counts_once():
    order = []
    calls = [lambda name=name: order.append(name) for name in "abc"]
    found = timing.time_calls(calls, torch.device("cpu"), seconds=0.0)
    assert found.rounds == timing.MIN_ROUNDS and found.timed_by == "host clock"
    assert "".join(order) == "abc" * (len(order) // 3)
    assert found.fastest <= found.seconds.p20 <= found.seconds.median <= found.seconds.p80


def test_a_round_is_divided_by_its_calls():
    ticks = iter(range(100))

    def clock(launch, rounds):
        return [10.0 * (1 + next(ticks) % 2) for _ in range(rounds)]

    found = timing._timed(lambda: None, 5, 0.0, clock, "events")
    assert (found.fastest, found.seconds.p80, found.timed_by) == (2.0, 4.0, "events")


@pytest.mark.parametrize(
    "capturable, graph, expected",
    [(True, True, "graph replays"), (True, False, "events"), (False, True, "events")],
)
def test_on_a_gpu_the_record_says_what_was_replayed(monkeypatch, capturable, graph, expected):
    class Graph:
        def replay(self):
            launched.append("graph")

    def events(launch, rounds):
        for _ in range(rounds):
            launch()
        return [1.0] * rounds

    launched = []
    monkeypatch.setattr(timing, "on_device", lambda device: nullcontext())
    monkeypatch.setattr(timing, "synchronize", lambda device: None)
    monkeypatch.setattr(timing, "_captured", lambda once, device: Graph() if graph else None)
    monkeypatch.setattr(timing, "_device_events", events)
    found = timing.time_calls(
        [lambda: launched.append("call")], torch.device("cuda"), seconds=0.0, capturable=capturable
    )
    assert found.timed_by == expected
    assert launched[-found.rounds :] == ["graph" if expected == "graph replays" else "call"] * 5


@pytest.mark.parametrize("graph", [True, False])
def test_everything_is_timed_on_the_device_that_was_asked_for(monkeypatch, graph):
    current, used = [], []

    @contextmanager
    def on_device(device):
        current.append(device)
        yield
        current.pop()

    def note(result):
        used.append(current[-1])
        return result

    class Graph:
        def replay(self):
            note(None)

    monkeypatch.setattr(timing, "on_device", on_device)
    monkeypatch.setattr(timing, "synchronize", lambda device: None)
    monkeypatch.setattr(timing, "_captured", lambda *a: note(Graph() if graph else None))
    monkeypatch.setattr(timing, "_device_events", lambda launch, n: note([launch() or 1.0] * n))
    device = torch.device("cuda:1")
    timing.time_calls([lambda: note(None)], device, seconds=0.0)
    assert set(used) == {device} and not current


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def fake_graphs(monkeypatch):
    """torch.cuda as far as capturing goes; `open_pools`: what was neither ended nor released."""
    open_pools, outcome = [], SimpleNamespace(error=None)

    class Graph:
        def capture_begin(self, pool):
            open_pools.extend([("_cuda_endAllocateToPool", pool), ("_cuda_releasePool", pool)])

        def capture_end(self):
            if outcome.error:
                raise outcome.error

    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        close = lambda index, pool, name=name: open_pools.remove((name, pool))  # noqa: E731
        monkeypatch.setattr(torch._C, name, close, raising=False)
    for name, value in (
        ("CUDAGraph", Graph),
        ("graph_pool_handle", lambda: (0, 7)),
        ("Stream", lambda device: Stream()),
        ("current_stream", lambda device: Stream()),
        ("stream", lambda stream: nullcontext()),
        ("synchronize", lambda device: None),
        ("get_sync_debug_mode", lambda: 0),
        ("set_sync_debug_mode", lambda mode: None),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    return open_pools, outcome


def test_a_capture_that_fails_leaves_no_pool_open(fake_graphs):
    open_pools, outcome = fake_graphs
    device = torch.device("cuda:0")
    assert timing._captured(lambda: None, device) is not None
    assert len(open_pools) == 2  # the graph's own, for as long as it lives
    open_pools.clear()
    outcome.error = RuntimeError("operation not permitted when stream is capturing")
    assert timing._captured(lambda: None, device) is None
    assert open_pools == []


def test_what_waits_for_the_device_is_not_tried_as_a_graph(fake_graphs):
    def waits():
        raise RuntimeError("called a synchronizing CUDA operation")

    def fails():
        raise RuntimeError("no such kernel")

    open_pools, _ = fake_graphs
    device = torch.device("cuda:0")
    assert timing._captured(waits, device) is None and open_pools == []
    with pytest.raises(RuntimeError, match="no such kernel"):
        timing._captured(fails, device)


@pytest.mark.parametrize("timed_by, expected", [("events", 0.25), ("graph replays", None)])
def test_where_a_time_holds_gaps_the_device_has_one_of_its_own(monkeypatch, timed_by, expected):
    ran = []

    def device_seconds(call, device):
        call()
        return 0.5

    found = timing.Timing(timing.Spread(1.0, 1.0, 1.0), 1.0, 5, timed_by)
    monkeypatch.setattr(measuring, "time_calls", lambda *a, **options: found)
    monkeypatch.setattr(measuring, "device_seconds", device_seconds)
    contender = Contender("ours", ran.append)
    measured = measuring.measured(contender, ["one", "two"], torch.device("cpu"), 0.0)
    assert (measured.timing, measured.device_s) == (found, expected)
    assert ran == (["one", "two"] if expected else [])


@pytest.mark.parametrize("longest, sets", [(3600.0, 4), (-1.0, 2)])
def test_a_call_that_empties_the_cache_itself_is_timed_on_two_sets(monkeypatch, longest, sets):
    monkeypatch.setattr(measuring, "_LONG_CALL_S", longest)
    contender = Contender("ours", lambda inputs: None)
    found = measuring.measured(contender, list("abcd"), torch.device("cpu"), 0.0)
    assert found.sets == sets


def test_sets_of_inputs_are_together_larger_than_the_cache():
    cpu = torch.device("cpu")
    assert measuring.number_of_sets(1 << 40, cpu) == 2
    size = measuring._CPU_CACHE_BYTES // 2
    assert measuring.number_of_sets(size, cpu) == 8


@pytest.fixture
def kernels(monkeypatch):
    """`run.py kernels` on toys, quickly, without the contenders that take long to start."""
    monkeypatch.setattr(measure, "_COPY_BYTES", {"cpu": 1 << 16, "cuda": 1 << 20})
    monkeypatch.setattr(measure, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(rates, "_MATRIX_SIZE", {"cpu": 16, "cuda": 256})
    monkeypatch.setattr(rates, "_SECONDS", 0.0)
    monkeypatch.setattr(running, "_SECONDS_EACH", {"cpu": 0.0, "cuda": 0.0})
    monkeypatch.setattr(measuring, "_MAX_SETS", 2)
    # A file that is saved between two calls must not keep the second from resuming the first.
    monkeypatch.setattr(records, "sources_checksum", lambda: "these sources")

    def kernels(out, *arguments):
        shared = ["--toy", "--no-gate", "--device", DEVICE.type, "--out", str(out)]
        return run.main(["kernels", *shared, *arguments])

    return kernels


def read_all(out):
    return [row for op in catalogue.OPERATIONS for row in records.read(out, op)]


PLAIN = ("--impl", "reference", "--impl", "plain product", "--impl", "torch.topk")


def test_kernels_appends_one_complete_record_per_contender(kernels, tmp_path):
    assert kernels(tmp_path, *PLAIN) == 0
    rows = read_all(tmp_path)
    names = {f.name for kind in (OpRecord, records.Environment) for f in fields(kind)}
    assert all(set(row) == names for row in rows)
    assert {row["op"] for row in rows} == set(catalogue.OPERATIONS)
    for row in rows:
        assert row["toy"] and row["gate"] == "skipped"
        assert row["p20_s"] <= row["median_s"] <= row["p80_s"]
        assert row["operations_per_s"] * row["median_s"] == pytest.approx(row["operations"])
        assert row["share_of_floor"] * row["median_s"] == pytest.approx(row["floor_s"])
        assert row["device_s"] is None or row["timed_by"] == "events"
        assert (row["error"] is None) == (row["impl"] == "plain product")
        if row["floor"].startswith("bytes"):
            assert row["floor_s"] == pytest.approx(row["bytes"] / row["copy_bandwidth"])


def test_what_is_recorded_is_skipped_until_something_changes(kernels, tmp_path, monkeypatch):
    def measured():
        assert kernels(tmp_path, "--op", "selection", "--resume", "--impl", "reference") == 0
        return len(read_all(tmp_path))

    assert [measured(), measured()] == [2, 2]
    assert kernels(tmp_path, "--op", "selection", "--resume", "--impl", "torch.topk") == 0
    assert len(read_all(tmp_path)) == 4
    monkeypatch.setattr(records, "sources_checksum", lambda: "other sources")
    assert [measured(), measured()] == [6, 6]


@pytest.mark.parametrize("changed", ["threads", "transformers"])
def test_what_was_recorded_under_other_conditions_is_measured_again(
    kernels, tmp_path, monkeypatch, changed
):
    def measured():
        assert kernels(tmp_path, "--op", "selection", "--resume", "--impl", "reference") == 0
        return len(read_all(tmp_path))

    here = replace(records.Environment.collect(DEVICE, []), cuda=None)
    monkeypatch.setattr(run.Environment, "collect", lambda device, argv: here)
    assert [measured(), measured()] == [2, 2]
    here = replace(here, **{changed: "another"})
    assert [measured(), measured()] == [4, 4]


def test_what_was_recorded_without_the_tests_is_measured_again_with_them(
    kernels, tmp_path, monkeypatch
):
    chosen = ("--op", "selection", "--impl", "reference", "--resume")
    assert kernels(tmp_path, *chosen) == 0
    monkeypatch.setattr(gate, "passes", lambda tests, on_gpu: True)
    gated = ["kernels", "--toy", "--device", DEVICE.type, "--out", str(tmp_path), *chosen]
    for _ in range(2):
        assert run.main(gated) == 0
        assert [row["gate"] for row in read_all(tmp_path)] == ["skipped"] * 2 + ["passed"] * 2
    # Not the other way round: tests that passed are no reason to measure again without them.
    assert kernels(tmp_path, *chosen) == 0
    assert len(read_all(tmp_path)) == 4


def test_a_name_that_nothing_has_is_refused_before_any_test_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gate, "passes", lambda *a, **options: pytest.fail("ran the tests"))
    command = ["kernels", "--device", "cpu", "--toy", "--out", str(tmp_path)]
    assert run.main([*command, "--op", "selection", "--impl", "reference", "--impl", "tritn"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --impl must be one of ")
    assert line.endswith(", 'reference', 'torch.topk', got 'tritn' for selection")


def test_a_named_contender_that_can_run_nowhere_is_an_error(kernels, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(fastdean_kernels, "refusal", lambda device, dtype: "no kernels today")
    assert kernels(tmp_path, "--op", "importance", "--impl", "triton") == 2
    error = capsys.readouterr().err
    assert "error: --impl 'triton' cannot be measured: " in error and "no kernels today" in error
    assert read_all(tmp_path) == []


def test_interpreted_kernels_are_not_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gate, "passes", lambda *a, **options: pytest.fail("ran the tests"))
    assert run.main(["kernels", "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "error: TRITON_INTERPRET must be unset where kernels" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value, suffix", [("1", ", interpreted"), ("0", "")])
def test_a_toy_run_names_interpreted_kernels_as_such(monkeypatch, value, suffix):
    monkeypatch.setenv("TRITON_INTERPRET", value)
    names = {each.name for case in toys() for each in case.contenders}
    ours = {name for name in names if name.startswith("triton")}
    assert ours == {f"triton{suffix}", f"triton, expert by expert{suffix}"}
    assert {"reference", "torch.topk", "bmm, padded"} <= names


def test_a_run_out_of_time_says_what_is_left_and_writes_nothing(kernels, tmp_path, capsys):
    assert kernels(tmp_path, "--op", "importance", "--seconds", "0") == 0
    assert "the time is used up, 4 of 4 cases left" in capsys.readouterr().err
    assert read_all(tmp_path) == []


def test_one_wrong_contender_fails_the_run_and_the_others_are_measured(
    kernels, tmp_path, monkeypatch, capsys
):
    case = toy("importance")
    wrong = Contender("wrong", off_by(1e-2))
    broken = replace(case, contenders=(wrong, *case.contenders[2:4]))
    monkeypatch.setitem(running.OPERATIONS, "importance", lambda toy: iter([broken]))
    assert kernels(tmp_path, "--op", "importance") == 1
    assert "wrong must compute importance to 5e-05" in capsys.readouterr().err
    measured = [row["impl"] for row in read_all(tmp_path)]
    assert measured == ["plain product", "reference", "mm per example"]


def test_a_contender_that_cannot_run_is_named_with_its_reason(
    kernels, tmp_path, monkeypatch, capsys
):
    case = toy("importance")
    unable = Contender("unable", importance.mm_loop, refusal=lambda device: "needs a better day")
    monkeypatch.setitem(
        running.OPERATIONS, "importance", lambda toy: iter([replace(case, contenders=(unable,))])
    )
    assert kernels(tmp_path, "--op", "importance") == 0
    assert "not measured: needs a better day" in capsys.readouterr().err
    assert [row["impl"] for row in read_all(tmp_path)] == ["plain product"]


def test_every_operation_is_seen_before_any_is_finished():
    groups = [[f"{op}{i}" for i in range(n)] for op, n in (("a", 3), ("b", 1), ("c", 2))]
    assert list(running._in_turns(groups)) == ["a0", "b0", "c0", "a1", "c1", "a2"]


def test_ours_come_first_on_every_case_and_what_torch_compiles_last(kernels, tmp_path, monkeypatch):
    slow = Contender("compiled", importance.mm_loop, compiled=True)
    found = [
        replace(case, contenders=(slow, *reversed(case.contenders[2:4])))
        for case in importance.cases(True)
    ]
    monkeypatch.setitem(running.OPERATIONS, "importance", lambda toy: iter(found[:2]))
    assert kernels(tmp_path, "--op", "importance") == 0
    assert [row["impl"] for row in read_all(tmp_path)] == [
        *("plain product", "reference", "plain product", "reference"),
        *("mm per example", "mm per example", "compiled", "compiled"),
    ]
    for op, cases in catalogue.OPERATIONS.items():
        compiled = [case for case in cases(False) if any(c.compiled for c in case.contenders)]
        assert len(compiled) <= 3, op


def test_a_contender_may_end_in_any_exception(kernels, tmp_path, monkeypatch, capsys):
    class CompilationError(Exception):
        pass

    def run_it(inputs):
        raise CompilationError("no such register")

    case = toy("importance")
    broken = replace(case, contenders=(Contender("broken", run_it), case.contenders[2]))
    monkeypatch.setitem(running.OPERATIONS, "importance", lambda toy: iter([broken]))
    assert kernels(tmp_path, "--op", "importance") == 1
    assert "not measured: no such register" in capsys.readouterr().err
    assert [row["impl"] for row in read_all(tmp_path)] == ["plain product", "reference"]


def test_the_time_to_measure_starts_after_the_tests(kernels, tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(gate, "passes", lambda tests, on_gpu: order.append("tests") or True)
    monkeypatch.setattr(run, "Budget", lambda seconds: order.append(f"{seconds} s"))
    monkeypatch.setitem(run._RUNS, "kernels", lambda *arguments: order.append("measured"))
    command = ["kernels", "--device", "cpu", "--toy", "--out", str(tmp_path), "--seconds", "7"]
    run.main(command)
    assert order == ["tests", "7.0 s", "measured"]


def test_a_rehearsal_is_called_one_in_every_record(kernels, tmp_path, capsys):
    assert kernels(tmp_path, "--op", "selection", "--impl", "reference", "--rehearsal") == 0
    assert {row["device"] for row in read_all(tmp_path)} == {"cpu, rehearsal"}
    assert [path.name for path in tmp_path.iterdir()] == ["cpu-rehearsal"]
    for wrong in (["--device", "cpu"], ["--device", "cuda", "--out", str(tmp_path)]):
        with pytest.raises(SystemExit):
            run.main(["score", "--rehearsal", *wrong])
        assert "--rehearsal needs --device cpu and --out" in capsys.readouterr().err


def test_tests_are_never_run_again_where_they_have_to_have_passed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gate, "passes", lambda *a, **options: pytest.fail("ran the tests"))
    command = ["kernels", "--device", "cpu", "--toy", "--out", str(tmp_path), "--op", "mask"]
    command += ["--resume", "--tested", "--seconds", "0"]
    assert run.main(command) == 1
    assert "--tested needs tests that have passed with this --out" in capsys.readouterr().err
    here = records.Environment.collect(torch.device("cpu"), [])
    # By one run or by several.
    for test in catalogue.GATES["mask"]:
        gate.remember([test], tmp_path, here)
    assert run.main(command) == 0


def test_what_something_is_aimed_at_for_is_measured_first():
    on_gpu = [c for c in importance.cases(False) if c.device_type == "cuda"]
    aimed = [
        c.settings["lengths"] == "beavertails" or c.settings["tokens_per_example"] >= 256
        for c in on_gpu
    ]
    assert aimed == [True] * 36 + [False] * 36
    first = next(collapse.cases(False)).settings
    assert (first["tokens"], first["features"], first["classes"]) == (16384, 4096, 287)


def test_toy_numbers_stay_out_of_the_results(capsys):
    with pytest.raises(SystemExit):
        run.main(["kernels", "--toy", "--no-gate"])
    assert "--toy needs --out: its numbers say nothing" in capsys.readouterr().err


def test_the_tests_of_the_chosen_operations_run_first_and_once(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(gate, "passes", lambda tests, on_gpu: bool(seen.append(tests)))
    command = ["kernels", "--device", "cpu", "--toy", "--out", str(tmp_path), "--op"]
    assert run.main([*command, "unit_importance", "--op", "importance"]) == 1
    assert seen == [("tests/test_importance_op.py",)]
    assert "nothing was measured" in capsys.readouterr().err
    assert read_all(tmp_path) == []


def test_tests_that_passed_are_not_run_again_by_a_resumed_run(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(gate, "passes", lambda tests, on_gpu: seen.append(tests) or True)
    command = ["kernels", "--device", "cpu", "--toy", "--out", str(tmp_path), "--seconds", "0"]
    for arguments in (["--resume"], ["--resume"], ["--resume", "--op", "selection"], []):
        assert run.main([*command, *arguments]) == 0
    # Resumed twice with nothing to run; without --resume always.
    assert len(seen) == 2


def test_the_gates_name_files_and_operations_that_exist():
    assert set(catalogue.GATES) == set(catalogue.OPERATIONS)
    for tests in catalogue.GATES.values():
        assert tests and all((ROOT / path).is_file() for path in tests)


@pytest.fixture
def everything_here(monkeypatch):
    """A machine with all that the GPU's scripts need."""
    modules = {
        name: SimpleNamespace(__version__=f"{major}.{minor}.0+cu130")
        for name, (major, minor) in prerequisites.VERSIONS.items()
    }
    monkeypatch.setattr(prerequisites, "import_module", modules.__getitem__)
    monkeypatch.setattr(prerequisites, "_is_installed", lambda name: True)
    monkeypatch.setattr(prerequisites, "_is_program", lambda name: True)
    monkeypatch.setattr(prerequisites, "_no_compiler", lambda: "")
    monkeypatch.setattr(prerequisites, "_no_headers", lambda: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    return modules


def test_a_machine_with_everything_is_named_in_one_line(
    everything_here, monkeypatch, tmp_path, capsys
):
    facts = {"device": "Some GPU", "torch": "2.11.0+cu130"}
    monkeypatch.setattr(prerequisites, "facts", lambda rehearsal: facts)
    assert prerequisites.main([str(tmp_path / "facts.json")]) == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("device Some GPU, torch 2.11.0+cu130\n", "")
    assert json.loads((tmp_path / "facts.json").read_text()) == facts


def test_a_rehearsal_asks_for_no_gpu_and_names_none(everything_here, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert prerequisites.missing() == ["a CUDA device is needed, and torch sees none"]
    assert prerequisites.missing(rehearsal=True) == []
    found = prerequisites.facts(rehearsal=True)
    assert (found["device"], found["cuda"]) == ("cpu, rehearsal", "none")
    here = records.Environment.collect(torch.device("cpu"), [])
    same = {name: getattr(here, name) for name in records.SAME_CODE if name != "device"}
    assert same.items() <= found.items()


def test_everything_that_is_missing_is_named_in_a_line_of_its_own(
    everything_here, monkeypatch, capsys
):
    everything_here["torch"].__version__ = "2.9.1"
    monkeypatch.setattr(prerequisites, "_is_installed", lambda name: name == "pytest")
    monkeypatch.setattr(prerequisites, "_is_program", lambda name: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert prerequisites.main(["facts.json"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: torch >= 2.11 is needed, got 2.9.1",
        "error: the Python package hypothesis is needed",
        "error: the Python package accelerate is needed",
        "error: the Python package pybind11 is needed",
        "error: the program cmake is needed, on the PATH or beside Python",
        "error: a CUDA device is needed, and torch sees none",
    ]


def test_a_package_that_cannot_be_imported_is_named_with_the_reason(everything_here, monkeypatch):
    def import_module(name):
        if name == "triton":
            raise ImportError("no such library")
        return everything_here[name]

    monkeypatch.setattr(prerequisites, "import_module", import_module)
    assert prerequisites.missing() == [
        "triton >= 3.6 is needed, and it cannot be imported: no such library"
    ]


def row_of(impl, median_s, case="2 x 3", date="2026-01-02T00:00:00+00:00", **changes):
    row = {
        "op": "importance", "case": case, "impl": impl, "dtype": "bf16", "timed_by": "events",
        "settings": {"rows": 2, "columns": 3, "examples": 4, "tokens_per_example": 8.0},
        "median_s": median_s, "p20_s": 0.9 * median_s, "p80_s": 1.1 * median_s,
        "operations_per_s": 1e9 / median_s, "bytes_per_s": 1e6 / median_s,
        "floor": "plain product", "floor_s": 0.001, "copy_bandwidth": 2e9, "matrix_rate": 3e12,
        "product": "out_dtype=fp32", "toy": False, "gate": "passed", "device": "Some GPU",
        "driver": "1.2", "cuda": "13.0", "threads": 2, "cpu_capability": "AVX2",
        "torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0", "fastdean": "0.1.0",
        "commit": "0123456789abcdef", "dirty": False, "date": date,
        "command": "python benchmarks/run.py kernels",
    }  # fmt: skip
    return row | changes


def test_the_table_has_a_column_for_each_contender_and_the_latest_of_each():
    rows = [
        row_of("triton", 0.5, date="2026-01-01T00:00:00+00:00"),
        row_of("mm per example", 0.006),
        row_of("plain product", 0.001),
        row_of("triton", 0.002, date="2026-01-03T00:00:00+00:00"),
        row_of("mm per example", 0.001, case="4 x 5"),
    ]
    lines = operations_table(rows).splitlines()
    assert (
        lines[0] == "| case | floor | triton | mm per example | triton / floor | rate of triton |"
    )
    assert lines[2] == (
        "| 2 x 3, bf16 | 1.000 ms | 2.000 ms | 6.000 ms (3.0x) | 2.00x | 500.0 GFLOP/s |"
    )
    assert lines[3] == "| 4 x 5, bf16 | 1.000 ms |  | 1.000 ms |  |  |"
    text = "\n".join(lines)
    assert "Floor: plain product. Copies 2 GB/s, a large bf16 product 3.0 TFLOP/s" in text
    assert "driver 1.2, CUDA 13.0; torch 2.11.0, triton 3.6.0" in text


@pytest.mark.parametrize("main, option", [(table.main, "--into"), (plot.main, "--out")])
def test_toy_runs_alone_make_no_table_and_no_picture(tmp_path, capsys, main, option):
    folder = tmp_path / "some-gpu"
    folder.mkdir()
    toy_row = json.dumps(row_of("triton, interpreted", 0.123, toy=True, case="toy")) + "\n"
    (folder / "importance.jsonl").write_text(toy_row)
    page = tmp_path / "page"
    text = "<!-- benchmark: importance -->\nnot measured yet\n<!-- benchmark end -->\n"
    page.write_text(text)
    where = ["--op", "importance", "--results", str(tmp_path)]
    assert main([*where, option, str(page)]) == 2
    printed = capsys.readouterr()
    assert "must hold measurements of importance, got only records of toy runs" in printed.err
    assert printed.out == "" and page.read_text() == text
    # Beside others they are left out.
    (folder / "importance.jsonl").write_text(toy_row + json.dumps(row_of("triton", 0.002)) + "\n")
    assert main([*where, option, str(page)]) == 0
    assert b"interpreted" not in page.read_bytes() and page.read_bytes() != text.encode()


def test_the_table_tells_the_time_of_the_device_from_that_with_gaps():
    rows = [
        row_of("triton", 0.002, device_s=0.0005),
        row_of("torch.topk", 0.006, device_s=0.005),
        row_of("reference", 0.004, device_s=None),
    ]
    text = operations_table(rows)
    assert (
        "| 2.000 ms (device 0.500 ms) | 4.000 ms (2.0x) | 6.000 ms (3.0x, device 5.000 ms) |"
    ) in text
    assert "Device: what it is busy for, by torch's profiler, without gaps" in text
    assert "Device:" not in operations_table([row_of("triton", 0.002)])


def test_without_git_a_table_names_the_checksum_of_the_sources():
    row = row_of("triton", 0.002, commit=None, dirty=None, sources="abc123")
    assert "fastdean 0.1.0 at sources abc123, 2026-01-02" in operations_table([row])


def test_an_operation_goes_into_a_file_and_a_picture(tmp_path, capsys):
    folder = tmp_path / "results" / "some-gpu"
    folder.mkdir(parents=True)
    rows = [row_of("triton", 0.002), row_of("plain product", 0.001)]
    (folder / "importance.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = tmp_path / "page.md"
    page.write_text("<!-- benchmark: importance -->\n<!-- benchmark end -->\n")
    where = ["--op", "importance", "--results", str(tmp_path / "results")]
    assert table.main([*where, "--into", str(page)]) == 0
    assert "| 2 x 3, bf16 | 1.000 ms | 2.000 ms | 2.00x |" in page.read_text()
    picture = tmp_path / "importance.png"
    assert plot.main([*where, "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert plot.main(["--op", "sweep", *where[2:]]) == 2
    assert "no record in sweep.jsonl of any device" in capsys.readouterr().err
