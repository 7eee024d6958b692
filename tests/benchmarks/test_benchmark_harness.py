"""What all benchmarks share: records that can be found again, tests first, honest tables."""

from __future__ import annotations

import argparse
import re
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.harness import clock, environment, gate, memory, profile, session, store, tables
from benchmarks.harness.clock import Spread
from benchmarks.harness.command import Benchmark
from benchmarks.harness.plots import Line, Panel, drawn
from benchmarks.harness.session import Problem, Sample, take_turns
from benchmarks.harness.store import Record
from experiments.debias.__main__ import STUDY

ROOT, CPU, GPU = store.ROOT, torch.device("cpu"), torch.device("cuda")
TABLES = {op: t for b in (BENCHMARKS | STUDY).values() for op, t in b.tables.items()}

pytestmark = pytest.mark.usefixtures("quick_benchmarks")


@pytest.fixture
def here():
    return environment.collect(CPU, ["-m", "benchmarks", "score"])


@pytest.fixture
def tested(monkeypatch):
    """The tests that ran before a measurement, which all pass."""
    seen = []
    monkeypatch.setattr(gate, "passes", lambda tests, on_gpu: seen.append((tests, on_gpu)) or True)
    return seen


def toy(out, *arguments):
    return ["kernels", "--toy", "--device", "cpu", "--out", str(out), "--seconds", "0", *arguments]


# Records.


def remember(out, here, *tests):
    return store.append(out, gate.seen_to_pass(tests, here))


@pytest.mark.parametrize(
    "cut_off", [b'{"op": "thr', b'{"op": "thr\n', b'{"op": "\xc3', b"\n", b"3"]
)
def test_a_line_that_was_cut_off_is_named_and_costs_no_other(tmp_path, here, capsys, cut_off):
    path = remember(tmp_path, here, "a")
    path.write_bytes(path.read_bytes() + cut_off)
    remember(tmp_path, here, "b")
    remember(tmp_path, here, "c")
    assert [row["tests"] for row in store.read(tmp_path, "gate")] == [["a"], ["b"], ["c"]]
    assert f"warning: {path}, line 2, is no record" in capsys.readouterr().err


def test_a_file_that_does_not_end_its_last_line_loses_nothing(tmp_path, here, capsys):
    path = remember(tmp_path, here, "a")
    path.write_bytes(path.read_bytes().strip())
    remember(tmp_path, here, "b")
    assert len(list(store.read(tmp_path, "gate"))) == 2 and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "changed, cuda, gate, expected",
    [
        ({}, None, "passed", True),
        ({"threads": 77}, None, "passed", False),
        ({"threads": 77}, "13.0", "passed", True),
        ({"device": "another"}, "13.0", "passed", False),
        ({"transformers": "another"}, None, "passed", False),
        ({"sources": "others"}, None, "passed", False),
        ({"gate": "skipped"}, None, "passed", False),
        ({"gate": "skipped"}, None, "skipped", True),
        ({}, None, "skipped", True),
    ],
)
def test_which_records_a_resumed_run_need_not_make_again(here, changed, cuda, gate, expected):
    here["cuda"] = cuda
    made = {**here, **changed}
    row = Record("op", "case", "who", gate=made.pop("gate", "passed"), environment=made)
    assert store.stands_for(row, here, gate) is expected


def test_the_checksum_follows_the_sources(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    source = tmp_path / "fastdean" / "a.py"
    source.parent.mkdir()
    source.write_text("one")
    first = environment.sources_checksum()
    source.write_text("two")
    assert environment.sources_checksum() != first


@pytest.mark.parametrize("folder", ["elsewhere", ".venv/lib/site-packages"])
def test_only_the_package_of_this_checkout_is_measured(tmp_path, monkeypatch, capsys, folder):
    found = ROOT / folder / "fastdean"
    monkeypatch.setattr(environment.fastdean, "__file__", str(found / "__init__.py"))
    assert main(toy(tmp_path, "--no-gate")) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: fastdean must be the package of this checkout, ")
    assert f", got {found}; set PYTHONPATH" in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["-m", "benchmarks", "score"], "-m benchmarks score"),
        (["--model", "/home/me/models/some"], "--model some"),
        (["--rows=/home/me/a=b/rows.csv"], "--rows=rows.csv"),
        (["/home/a=b/c"], "c"),
        (["--bias", "crows_pairs=/data/c.csv"], "--bias crows_pairs=c.csv"),
        ([str(store.RESULTS)], "benchmarks/results"),
    ],
)
def test_the_recorded_command_holds_no_absolute_path(argv, expected):
    assert environment.command_line(argv) == f"python {expected}"


def test_device_names_become_folder_names():
    assert store.slug("AMD EPYC 7B13 64-Core Processor") == "amd-epyc-7b13-64-core-processor"


# Tests first.


def test_nothing_is_measured_when_the_tests_fail(tmp_path, monkeypatch, capsys):
    commands = []
    failed = SimpleNamespace(returncode=1, stdout="")
    monkeypatch.setattr(gate.subprocess, "run", lambda c, **options: commands.append(c) or failed)
    assert main(toy(tmp_path, "--op", "unit_importance", "--op", "importance")) == 1
    [tests] = [command[1:] for command in commands if "pytest" in command]
    assert tests == ["-m", "pytest", *gate.test_files("importance_op"), "-q"]
    assert "nothing was measured" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_every_benchmark_has_tests_that_exist():
    options = argparse.Namespace(op=None)
    for benchmark in (BENCHMARKS | STUDY).values():
        for on_gpu in (False, True):
            tests = benchmark.tests(options, on_gpu)
            assert tests and all((ROOT / test.split("::")[0]).is_file() for test in tests)
    assert set(gate.test_files("score_kernels")) < set(BENCHMARKS["score"].tests(options, True))


def test_tests_that_passed_are_not_run_again_by_a_resumed_run(tmp_path, tested):
    for arguments in ((), ("--op", "selection"), ()):
        assert main(toy(tmp_path, "--resume", *arguments)) == 0
    assert len(tested) == 1
    assert main(toy(tmp_path)) == 0 and len(tested) == 2


@pytest.mark.parametrize("changed", ["sources", "device", "torch", "triton", "transformers"])
def test_tests_passed_with_something_else_do_not_count(tmp_path, here, changed):
    remember(tmp_path, here, "a", "b")
    assert gate.passed_before(("a",), tmp_path, here)
    assert not gate.passed_before(("a", "c"), tmp_path, here)
    assert not gate.passed_before(("a",), tmp_path, {**here, changed: "another"})


def test_tests_are_never_run_where_they_have_to_have_passed(tmp_path, here, tested, capsys):
    command = toy(tmp_path, "--op", "mask", "--resume", "--tested")
    assert main(command) == 1
    assert "--tested needs tests that have passed with this --out" in capsys.readouterr().err
    for test in BENCHMARKS["kernels"].tests(argparse.Namespace(op=["mask"]), False):
        remember(tmp_path, here, test)  # by one run or by several
    assert main(command) == 0 and not tested


def test_the_time_to_measure_starts_after_the_tests(tmp_path, monkeypatch, tested):
    def run(session):
        assert tested and not session.budget.spent
        return 7

    kernels = BENCHMARKS["kernels"]
    changed = Benchmark("", kernels.options, run, kernels.tests)
    monkeypatch.setitem(BENCHMARKS, "kernels", changed)
    assert main([*toy(tmp_path), "--seconds", "60"]) == 7


def test_names_stand_for_what_passed_and_nothing_else():
    ran = {
        "a.py::t[1]": "passed", "a.py::t[2]": "skipped", "b.py::t[1]": "passed",
        "b.py::t[2]": "failed", "b.py::u": "passed", "c.py": "failed", "c.py::t": "passed",
        "d.py::t": "started",
    }  # fmt: skip
    names = gate.covered(ran)
    assert names == ["a.py", "b.py::t[1]", "b.py::u", "c.py::t"]
    yes = ("a.py", "a.py::t[9]", "b.py::t[1]")
    no = ("b.py::t[2]", "b.py::t", "b.py", "c.py", "d.py::t")
    assert [gate.is_covered(test, names) for test in yes + no] == [True] * 3 + [False] * 5


# The command line.


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["score", "--rehearsal", "--device", "cpu"], "--rehearsal needs --device cpu and --out"),
        (["score", "--rehearsal", "--device", "cuda", "--out", "o"], "--rehearsal needs --device"),
        (["kernels", "--toy"], "--toy needs --out: its numbers say nothing"),
        (["patch", "--gigabytes=nan"], "argument --gigabytes: must be above 0, got nan"),
        (["score", "--tokens", "1"], "must be at least 2, a token and its target, got 1"),
        (["score", "--repeats", "0"], "must be a positive number, got 0"),
    ],
)
def test_options_that_make_no_measurement_are_refused(capsys, arguments, text):
    with pytest.raises(SystemExit):
        main(arguments)
    assert text in capsys.readouterr().err


def test_a_device_that_is_not_there_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["kernels", "--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "error: device must be one that torch sees, got cuda" in capsys.readouterr().err


# Turns.


def test_contenders_take_turns_and_warm_up_is_not_counted():
    order = []

    def turn(name, seconds):
        return lambda: order.append(name) or Sample(next(seconds))

    contenders = {"a": turn("a", iter([50.0, 1.0, 2.0])), "b": turn("b", iter([70.0, 3.0, 4.0]))}
    found = {name: samples for name, samples, _ in take_turns(contenders, 2, warm_up=1)}
    assert order == ["a", "b"] * 3
    assert found == {"a": [Sample(1.0), Sample(2.0)], "b": [Sample(3.0), Sample(4.0)]}
    seconds = session.seconds_of(found["b"])
    assert seconds == {"median_s": 3.5, "p20_s": 3.2, "p80_s": 3.8, "rounds_s": [3.0, 4.0]}


@pytest.mark.parametrize(
    "error, problem",
    [
        (torch.OutOfMemoryError("1 GB"), Problem("out of memory")),
        (KeyError("key"), Problem("KeyError: 'key'", failed=True)),
    ],
)
def test_one_that_fails_has_no_further_turn_and_the_others_do(error, problem):
    turns = []

    def failing():
        turns.append("failing")
        raise error

    contenders = {"failing": failing, "loop": lambda: turns.append("loop") or Sample(1.0)}
    failed, loop = take_turns(contenders, 3, forgiving=CPU)
    assert turns == ["failing", "loop", "loop", "loop"]
    assert failed == ("failing", [], problem) and loop == ("loop", [Sample(1.0)] * 3, None)
    with pytest.raises(type(error)):
        list(take_turns(contenders, 3))


def test_peak_memory_sees_what_a_run_held_and_not_what_it_left():
    size = 64 << 20
    sample = session.timed(lambda: torch.ones(size // 4).sum(), CPU)
    again = session.timed(lambda: None, CPU)
    if not memory._CLEAR.exists():
        assert sample.peak_bytes is None
        return
    assert 0.9 * size < sample.peak_bytes < 1.5 * size and again.peak_bytes < size / 4


def test_spread_of_seconds_and_of_rounds():
    assert Spread.of([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == Spread(3.5, 2.0, 5.0)
    assert Spread.of_ratios([2.0, 8.0, 4.0], [1.0, 2.0, 4.0]).median == 2.0


# The clock.


def test_calls_take_turns_and_each_round_counts_once():
    order = []
    calls = [lambda name=name: order.append(name) for name in "abc"]
    found = clock.time_calls(calls, CPU, seconds=0.0)
    assert found.rounds == clock.MIN_ROUNDS and found.timed_by == "host clock"
    assert "".join(order) == "abc" * (len(order) // 3)
    assert found.fastest <= found.seconds.p20 <= found.seconds.median <= found.seconds.p80


@pytest.mark.parametrize("capturable, graph", [(True, True), (True, False), (False, True)])
def test_on_a_gpu_the_record_says_what_was_replayed_and_where(monkeypatch, capturable, graph):
    current, used = [], []

    @contextmanager
    def on_device(device):
        current.append(device)
        yield
        current.pop()

    def events(launch, rounds):
        for _ in range(rounds):
            launch()
        return [10.0] * rounds

    replay = SimpleNamespace(replay=lambda: used.append((*current, "graph replays")))
    monkeypatch.setattr(clock, "on_device", on_device)
    monkeypatch.setattr(clock, "synchronize", lambda device: None)
    monkeypatch.setattr(clock, "_captured", lambda once, device: replay if graph else None)
    monkeypatch.setattr(clock, "_device_events", events)
    device = torch.device("cuda:1")
    calls = [lambda: used.append((*current, "events"))] * 5
    found = clock.time_calls(calls, device, seconds=0.0, capturable=capturable)
    assert found.timed_by == ("graph replays" if capturable and graph else "events")
    assert found.seconds.median == 2.0  # of a round of five calls
    assert used[-1] == (device, found.timed_by) and not current


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

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        close = lambda index, pool, name=name: open_pools.remove((name, pool))  # noqa: E731
        monkeypatch.setattr(torch._C, name, close, raising=False)
    for name, value in (
        ("CUDAGraph", Graph),
        ("graph_pool_handle", lambda: (0, 7)),
        ("Stream", lambda device: stream),
        ("current_stream", lambda device: stream),
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
    assert clock._captured(lambda: None, device) is not None
    assert len(open_pools) == 2  # the graph's own, for as long as it lives
    open_pools.clear()
    outcome.error = RuntimeError("operation not permitted when stream is capturing")
    assert clock._captured(lambda: None, device) is None and open_pools == []

    def raising(text):
        raise RuntimeError(text)

    # What waits for the device is not even tried.
    waits = lambda: raising("called a synchronizing CUDA operation")  # noqa: E731
    assert clock._captured(waits, device) is None and open_pools == []
    with pytest.raises(RuntimeError, match="no such kernel"):
        clock._captured(lambda: raising("no such kernel"), device)


# The profiler.


def event(name, seconds=0.0, on=torch.autograd.DeviceType.CPU, kernels=(), **changes):
    """As torch's profiler lists it; kernels: (name, seconds) of what it launched."""
    facts = {"is_user_annotation": False, "is_legacy": False, **changes}
    launched = [SimpleNamespace(name=name, duration=1e6 * s) for name, s in kernels]
    span = SimpleNamespace(elapsed_us=lambda: 1e6 * seconds)
    return SimpleNamespace(name=name, device_type=on, kernels=launched, time_range=span, **facts)


def test_what_ran_on_the_device_is_counted_once_and_by_its_name():
    cuda = torch.autograd.DeviceType.CUDA
    events = [
        event("aten::mm", kernels=[("gemm", 3.0)]),
        # Launched from a hook: listed under what happened to run, or under nothing at all.
        event("MmBackward0", kernels=[("_importance_kernel", 1.0)]),
        event("a range", kernels=[("a range", 5.0)], is_user_annotation=True),
        event("gemm", 3.0, on=cuda),
        event("_importance_kernel", 1.0, on=cuda),
        event("_importance_kernel", 1.5, on=cuda),
        event("a range", 6.0, on=cuda, is_user_annotation=True),
    ]
    launched = profile.launches(events)
    assert sum(launch.seconds for launch in launched) == pytest.approx(5.5)
    assert profile.Launch("", "_importance_kernel", 1.5) in launched


def test_where_the_profiler_sees_no_kernels_nothing_is_made_up(monkeypatch):
    events = [event("aten::mm", kernels=[("aten::mm", 3.0)], is_legacy=True)]
    monkeypatch.setattr(profile, "profiled", lambda call, device: (events, 4.0))
    assert profile.device_seconds(lambda: None, GPU) is None


# Tables and pictures.


def marked():
    """(document, op, what stands there) of every table with markers."""
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        pattern = r"<!-- benchmark: (\w+) -->\n(.*?)\n<!-- benchmark end -->"
        for op, text in re.findall(pattern, path.read_text("utf-8"), re.DOTALL):
            yield pytest.param(path, op, text, id=f"{path.name}-{op}")


@pytest.mark.parametrize("path, op, text", list(marked()))
def test_the_tables_of_the_documents_are_those_of_the_recorded_results(path, op, text):
    if any(store.read(store.RESULTS, op)):
        rows = store.shown(store.RESULTS, op, TABLES[op].command)
        assert text == tables.rendered(TABLES[op], rows)
    else:
        assert text.endswith("not measured yet.")
    assert "| a |" in tables.replace_between_markers(path.read_text("utf-8"), op, "| a |")


def test_every_table_has_its_place_in_the_documents():
    assert {each.values[1] for each in marked()} == set(TABLES)


@pytest.mark.parametrize("op", [op for b in BENCHMARKS.values() for op in b.tables])
def test_without_records_the_table_names_a_command_that_makes_them(tmp_path, capsys, op):
    assert main(["table", "--op", op, "--results", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"must hold measurements of {op}, got no record in {op}.jsonl" in error
    [command] = re.findall(r"run `python -m benchmarks (.*)`\n$", error)
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "--help"])


def row(**changes):
    here = {
        "device": "Some CPU", "driver": None, "cuda": None, "threads": 2, "cpu_capability": "AVX2",
        "torch": "2.13.0", "triton": None, "transformers": "5.23.0", "fastdean": "0.1.0",
        "commit": "0123456789abcdef", "dirty": False, "sources": "abc123",
        "date": "2026-01-02T00:00:00+00:00", "command": "python -m benchmarks score",
    } | changes  # fmt: skip
    return Record("score", "case", "loop", gate="passed", environment=here)


def test_below_a_table_stands_how_it_was_made():
    assert tables.provenance_line(row()) == (
        "Some CPU, 2 threads, AVX2; torch 2.13.0, transformers 5.23.0, fastdean 0.1.0 at "
        "0123456789, 2026-01-02: `python -m benchmarks score`"
    )
    gpu = {"driver": "1.2", "cuda": "13.0", "triton": "3.6.0"}
    assert ", driver 1.2, CUDA 13.0; torch 2.13.0, triton 3.6.0," in tables.provenance_line(
        row(**gpu)
    )
    assert "at sources abc123," in tables.provenance_line(row(commit=None, dirty=None))
    assert "at 0123456789 with changes," in tables.provenance_line(row(dirty=True))


def test_toys_alone_make_no_table_and_a_file_without_markers_is_left_alone(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("no markers\n")
    command = ["table", "--results", str(tmp_path), "--into", str(page)]
    score = next(store.read(store.RESULTS, "score"))
    store.append(tmp_path, Record(**{**vars(score), "toy": True}))
    assert main(command) == 2
    assert "measurements of score, got only records of toy runs" in capsys.readouterr().err
    store.append(tmp_path, score)
    assert main(command) == 2
    assert "<!-- benchmark end --> once, got them 0 times" in capsys.readouterr().err
    assert page.read_text() == "no markers\n"
    page.write_text("above\n<!-- benchmark: score -->\nstale\n<!-- benchmark end -->\nbelow\n")
    assert main(command) == 0
    assert re.match(
        r"above\n<!-- benchmark: score -->\n\| dtype (?s:.*)`\n<!-- benchmark end -->\nbelow\n$",
        page.read_text(),
    )


def test_a_picture_shows_lines_bars_and_the_floor():
    lines = [Line("ours", [1, 2], [3.0, 4.0], [2.0, 3.0], [4.0, 5.0])]
    floor = Line("floor", [1, 2], [1.0, 1.5])
    figure = drawn(
        [
            [
                Panel("a", "x", "s", lines, floor=floor, log="xy"),
                Panel("b", "", "s", bars={"loop": (20.0, 19.0, 22.0)}, floor=5.0),
            ],
            [Panel("c", "steps", "bias", lines, level=("neutral", 0.5))],
        ]
    )
    first, bars, second, empty = figure.axes
    assert [line.get_label() for line in first.lines] == ["ours", "floor"]
    assert (first.get_xscale(), first.get_yscale()) == ("log", "log")
    assert [bar.get_height() for bar in bars.patches] == [20.0]
    assert list(bars.lines[-1].get_ydata()) == [5.0, 5.0] and bars.get_ylim()[0] == 0
    assert "neutral" in {line.get_label() for line in second.lines} and not empty.axison


@pytest.mark.parametrize("op", ["score", "importance", "mask", "collapse"])
def test_recorded_results_make_a_picture(tmp_path, op):
    picture = tmp_path / f"{op}.png"
    assert main(["plot", "--op", op, "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
