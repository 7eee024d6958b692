"""What all benchmarks share: records that can be found again, tests first, honest tables."""

from __future__ import annotations

import argparse
import re
from types import SimpleNamespace

import pytest
import torch

from benchmarks.__main__ import BENCHMARKS, TABLES, main
from benchmarks.harness import environment, gate, memory, session, store, tables
from benchmarks.harness.session import Sample, take_turns
from benchmarks.harness.store import Record
from experiments.debias import run as study

ROOT, CPU = store.ROOT, torch.device("cpu")

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


def remember(out, here, *tests):
    gate.record_passed(tests, out, here)
    return next(out.glob("*/gate.jsonl"))


@pytest.mark.parametrize("cut_off", [b'{"op": "thr', b'{"op": "\xc3\n', b"3"])
def test_a_line_that_was_cut_off_is_named_and_costs_no_other(tmp_path, here, capsys, cut_off):
    path = remember(tmp_path, here, "a")
    path.write_bytes(path.read_bytes() + cut_off)
    remember(tmp_path, here, "b")
    remember(tmp_path, here, "c")
    assert [row["tests"] for row in store.read(tmp_path, "gate")] == [["a"], ["b"], ["c"]]
    assert f"warning: {path}, line 2, is no record" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changed, cuda, gate, expected",
    [
        ({}, None, "passed", True),
        ({"threads": 77}, None, "passed", False),
        ({"threads": 77}, "13.0", "passed", True),
        ({"device": "another"}, "13.0", "passed", False),
        ({"gate": "skipped"}, None, "passed", False),
        ({"gate": "skipped"}, None, "skipped", True),
    ],
)
def test_which_records_a_resumed_run_need_not_make_again(here, changed, cuda, gate, expected):
    here["cuda"] = cuda
    made = {**here, **changed}
    row = Record("op", "case", "who", gate=made.pop("gate", "passed"), environment=made)
    assert store.stands_for(row, here, gate) is expected


def test_only_the_package_of_this_checkout_is_measured(tmp_path, monkeypatch, capsys):
    found = ROOT / ".venv/lib/site-packages/fastdean"
    monkeypatch.setattr(environment.fastdean, "__file__", str(found / "__init__.py"))
    assert main(toy(tmp_path, "--no-gate")) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: fastdean must be the package of this checkout, ")
    assert f", got {found}; set PYTHONPATH" in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize("run", ["streamed", "orders", "growth", "patch"])
@pytest.mark.parametrize("option", ["--folder", "--out"])
def test_a_folder_that_cannot_be_made_is_refused_in_one_line(tmp_path, tested, capsys, run, option):
    file = tmp_path / "file"
    file.write_text("")
    given = {"--folder": str(tmp_path), "--out": str(tmp_path / "results")}
    given[option] = str(file / "in" / "it")
    assert main([run, "--device", "cpu", *(word for pair in given.items() for word in pair)]) == 2
    name = option.strip("-")
    assert capsys.readouterr().err == (
        f"error: {name} must be a folder or a place for one, got '{file}/in/it' ({file} is no "
        f"folder); name another with {option}\n"
    )
    assert not tested and list(tmp_path.iterdir()) == [file]


def test_a_page_that_is_not_there_is_refused_in_one_line(tmp_path, capsys):
    assert main(["table", "--op", "score", "--into", str(tmp_path / "page.md")]) == 2
    assert capsys.readouterr().err == (
        "error: into must be a page with the table's two marker lines, got "
        f"'{tmp_path}/page.md', which is no file; name one with --into\n"
    )


def test_the_recorded_command_holds_no_absolute_path():
    argv = ["-m", "benchmarks", "--model", "/home/me/some", "--rows=/home/a=b/rows.csv", "c=/d/e.f"]
    expected = "python -m benchmarks --model some --rows=rows.csv c=e.f"
    assert environment.command_line(argv) == expected


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
    for benchmark in (*BENCHMARKS.values(), study):
        for on_gpu in (False, True):
            tests = benchmark.tests(options, on_gpu)
            assert tests and all((ROOT / test.split("::")[0]).is_file() for test in tests)
    assert set(gate.test_files("score_kernels")) < set(BENCHMARKS["score"].tests(options, True))


def test_tests_that_passed_are_not_run_again_by_a_resumed_run(tmp_path, tested):
    for arguments in ((), ("--op", "selection"), ()):
        assert main(toy(tmp_path, "--resume", *arguments)) == 0
    assert len(tested) == 1
    assert main(toy(tmp_path)) == 0 and len(tested) == 2


def test_tests_are_never_run_where_they_have_to_have_passed(tmp_path, here, tested, capsys):
    command = toy(tmp_path, "--op", "mask", "--resume", "--tested")
    assert main(command) == 1
    assert "--tested needs tests that have passed with this --out" in capsys.readouterr().err
    for test in BENCHMARKS["kernels"].tests(argparse.Namespace(op=["mask"]), False):
        remember(tmp_path, here, test)  # by one run or by several
    assert main(command) == 0 and not tested


def test_names_stand_for_what_passed_and_nothing_else():
    ran = {
        "a.py::t[1]": "passed", "a.py::t[2]": "skipped", "b.py::t[1]": "passed",
        "b.py::t[2]": "failed", "b.py::u": "passed", "c.py": "failed", "c.py::t": "passed",
        "d.py::t": "started",
    }  # fmt: skip
    names = gate.covered(ran)
    assert names == ["a.py", "b.py::t[1]", "b.py::u", "c.py::t"]
    assert all(gate.is_covered(test, names) for test in ("a.py", "a.py::t[9]", "b.py::t[1]"))
    left = ("b.py::t[2]", "b.py::t", "b.py", "c.py", "d.py::t")
    assert not any(gate.is_covered(test, names) for test in left)


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


def test_contenders_take_turns_and_warm_up_is_not_counted():
    order, seconds = [], iter([50.0, 70.0, 1.0, 3.0, 2.0, 4.0])
    turns = {name: lambda name=name: order.append(name) or Sample(next(seconds)) for name in "ab"}
    found = {name: samples for name, samples, _ in take_turns(turns, 2, warm_up=1)}
    assert order == ["a", "b"] * 3 and found["a"] == [Sample(1.0), Sample(2.0)]
    seconds = session.seconds_of(found["b"])
    assert seconds == {"median_s": 3.5, "p20_s": 3.2, "p80_s": 3.8, "rounds_s": [3.0, 4.0]}


def test_peak_memory_sees_what_a_run_held_and_not_what_it_left():
    size = 64 << 20
    peaks = []
    for call in (lambda: torch.ones(size // 4).sum(), lambda: None):
        held = memory.Held(CPU)
        call()
        peaks.append(held.added_bytes())
    if not memory._CLEAR.exists():
        assert peaks == [None, None]
        return
    assert 0.9 * size < peaks[0] < 1.5 * size and peaks[1] < size / 4


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


@pytest.mark.parametrize("op", list(TABLES))
def test_without_records_the_table_names_a_command_that_makes_them(tmp_path, capsys, op):
    assert main(["table", "--op", op, "--results", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"must hold measurements of {op}, got no record in {op}.jsonl" in error
    [command] = re.findall(r"run `python -m benchmarks (.*)`\n$", error)
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "--help"])


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
    start, end = "above\n<!-- benchmark: score -->\n| dtype ", "\n<!-- benchmark end -->\nbelow\n"
    assert page.read_text().startswith(start) and page.read_text().endswith(end)


@pytest.mark.parametrize("op", ["score", "sweep"])
def test_recorded_results_make_a_picture(tmp_path, op):
    picture = tmp_path / f"{op}.png"
    assert main(["plot", "--op", op, "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
