"""`make gpu-first`: what its parts leave behind when they fail, hang, die, or are cut."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.__main__ import BENCHMARKS
from benchmarks.gpu import (
    aims,
    build_extension,
    carried,
    first,
    outcomes,
    plan,
    prerequisites,
    sanitized,
)
from benchmarks.gpu.outcomes import CUT, FAILED, PASSED, REFUSAL, SKIPPED
from benchmarks.gpu.plan import Part
from benchmarks.harness import command, environment, gate, store
from benchmarks.harness.gate import is_covered
from benchmarks.harness.store import Record
from benchmarks.ops.run import GATES

ROOT = store.ROOT

# One call of the program with parts of the test's own, that start in no time.
DRIVER = """
import json, sys
from benchmarks.gpu import first
from benchmarks.gpu.plan import Part

parts = [Part(**each) for each in json.loads({parts!r})]
{more}
sys.exit(first.main([{out!r}, "--work", {work!r}], parts=parts))
"""
MACHINE = """
import json, os, sys
json.dump({"device": os.environ.get("DEVICE", "Some GPU"), "torch": "2"}, open(sys.argv[1], "w"))
"""


def tool(name, code, limit=20, **fields):
    return {
        "name": name, "kind": plan.TOOL, "limit": limit, "least": 0, "arguments": ["-c", code],
        "needs": ["machine"], **fields,
    }  # fmt: skip


@pytest.fixture
def program(tmp_path):
    """Starts the program; `outcome_of` and `summary` read what it has written."""
    (tmp_path / "machine.py").write_text(MACHINE)
    # Where the names of the tests in this folder start.
    (tmp_path / "pytest.ini").write_text("[pytest]\n")

    def start(*parts, more="", **variables):
        machine = tool("machine", "", needs=[], arguments=[str(tmp_path / "machine.py")])
        code = DRIVER.format(
            parts=json.dumps([machine, *parts]),
            more=more,
            out=str(tmp_path / "out"),
            work=str(tmp_path / "work"),
        )
        return subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


@pytest.fixture
def call(program, tmp_path):
    """The program from start to end: its status, the outcomes by part, and the summary."""

    def call(*parts, **variables):
        process = program(*parts, **variables)
        said, _ = process.communicate(timeout=60)
        found = carried.load(tmp_path / "out" / carried.STATE)
        assert found, said
        return process.returncode, found, (tmp_path / "out" / carried.SUMMARY).read_text()

    return call


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come about"
        time.sleep(0.02)


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


GARBAGE = "import sys; sys.stdout.buffer.write(bytes(range(256)) * 9000); sys.exit(1)"


def test_a_part_that_fails_hangs_dies_or_prints_garbage_takes_only_itself_out(call, tmp_path):
    status, found, summary = call(
        tool("fails", "raise ValueError('no such | thing')"),
        tool("hangs", "print('so far'); import time; time.sleep(99)", limit=2),
        tool("dies", "import os; os.kill(os.getpid(), 9)"),
        tool("garbage", GARBAGE),
        tool("refuses", "print('refused: no device'); raise SystemExit(3)"),
        tool("rests on it", "", needs=["machine", "fails"]),
        tool("measures", "print('fine')", alone=True),
        tool("after", "print('fine')"),
    )
    assert status == 1
    assert {name: each.status for name, each in found.items()} == {
        "machine": PASSED,
        "fails": FAILED,
        "hangs": CUT,
        "dies": FAILED,
        "garbage": FAILED,
        "refuses": REFUSAL,
        "rests on it": SKIPPED,
        "measures": PASSED,
        "after": PASSED,
    }
    assert found["fails"].lines == ["ValueError: no such | thing"]
    assert (found["hangs"].reason, found["hangs"].lines) == ("its limit of 2 s", ["so far"])
    assert found["dies"].reason == "killed by signal 9"
    assert all(len(line) < 210 and line.isprintable() for line in found["garbage"].lines)
    assert found["refuses"].reason == "refused: no device"
    assert found["rests on it"].reason == "fails has not passed: failed"
    assert "| after | passed |" in summary and "## Cut\n\n- hangs: its limit of 2 s" in summary
    # Whatever was printed, a few flat files come back, none of them large.
    files = list((tmp_path / "out").iterdir())
    assert len(files) <= 8 and {path.name for path in files} <= set(carried.FILES)
    assert all(path.is_file() and path.stat().st_size < 16 << 20 for path in files)


@pytest.mark.parametrize("machine", ["", "open(sys.argv[1], 'w').write('{')", "sys.exit(2)"])
def test_on_a_machine_that_lacks_something_nothing_else_starts(call, tmp_path, machine):
    (tmp_path / "machine.py").write_text(f"import sys\n{machine}\n")
    status, found, _ = call(tool("good", ""))
    assert (status, found["machine"].status) == (2, FAILED)
    assert (found["good"].status, found["good"].reason) == (
        SKIPPED,
        "machine has not passed: failed",
    )


def test_what_passed_is_not_run_again_until_something_changes(call, tmp_path):
    def counted(name, code=""):
        return tool(name, f"print('ran', file=open({str(tmp_path / name)!r}, 'a')); {code}")

    def runs():
        parts = counted("good"), counted("bad", "raise SystemExit(1)")
        call(*parts, **variables)
        return [len((tmp_path / name).read_text().splitlines()) for name in ("good", "bad")]

    variables = {}
    assert [runs(), runs()] == [[1, 1], [1, 2]]
    variables = {"DEVICE": "another GPU"}
    assert [runs(), runs()] == [[2, 3], [2, 4]]
    variables["FRESH"] = "1"
    assert runs() == [3, 5]


def test_a_call_goes_on_from_what_an_earlier_one_has_left_in_its_output(call, tmp_path):
    part = tool("good", f"print('ran', file=open({str(tmp_path / 'good')!r}, 'a'))")
    call(part)
    (tmp_path / "work").rename(tmp_path / "of another machine")
    status, found, _ = call(part)
    assert (status, found["good"].status) == (0, PASSED)
    assert (tmp_path / "good").read_text() == "ran\n"


def test_a_killed_program_leaves_a_true_summary_and_no_process(program, call, tmp_path):
    pids = tmp_path / "pids"
    # The child leaves its group, as those of ninja do.
    code = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '99'], process_group=0)\n"
        f"print(os.getpid(), child.pid, file=open({str(pids)!r}, 'w'), flush=True)\n"
        "time.sleep(99)"
    )
    parts = tool("good", ""), tool("long", code, after=["good"])
    process = program(*parts)
    until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    until(lambda: "| good | passed |" in (tmp_path / "out" / carried.SUMMARY).read_text())
    started = [int(pid) for pid in pids.read_text().split()]
    assert all(map(alive, started))
    process.kill()
    process.communicate()
    until(lambda: not any(map(alive, started)))
    summary = (tmp_path / "out" / carried.SUMMARY).read_text()
    assert "| long | passed" not in summary and "| long | " in summary
    found = carried.load(tmp_path / "out" / carried.STATE)
    assert found["good"].status == PASSED and "long" not in found
    # Resumed: what was under way is run again.
    status, found, _ = call(tool("good", "raise SystemExit(1)"), tool("long", ""))
    assert (status, found["long"].status, found["good"].status) == (0, PASSED, PASSED)


def test_a_program_that_is_told_to_end_says_what_it_cut(program, tmp_path):
    started = tmp_path / "started"
    process = program(tool("long", f"open({str(started)!r}, 'w'); import time; time.sleep(99)"))
    until(started.exists)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 1
    outcome = carried.load(tmp_path / "out" / carried.STATE)["long"]
    assert (outcome.status, outcome.reason) == (CUT, "cut by SIGTERM")


def test_the_time_for_all_parts_is_kept(call):
    sleep = "import time; time.sleep(99)"
    start = time.monotonic()
    _, found, summary = call(
        tool("long", sleep, needs=[]),
        tool("measures", sleep, alone=True),
        tool("too late", ""),
        SECONDS_ALL="3",
    )
    assert time.monotonic() - start < 30
    assert (found["long"].status, found["long"].reason) == (
        CUT,
        "the end of the time for all parts",
    )
    assert {found[name].status for name in ("measures", "too late")} == {SKIPPED}
    assert "- measures: no time was left" in summary


def test_what_would_not_be_worth_starting_is_left_out(call):
    _, found, _ = call(tool("short", ""), tool("long", "", least=1000), SECONDS_ALL="30")
    assert found["short"].status == PASSED
    assert found["long"].status == SKIPPED
    assert re.fullmatch(r"\d+ s were left, and it takes at least 1000", found["long"].reason)


def test_a_failing_operation_takes_only_its_own_cases_out(call, tmp_path):
    for name, body in (("good", "assert True"), ("bad", "assert 1 == 2, 'off by one'")):
        (tmp_path / f"test_{name}.py").write_text(
            f"import pytest\n\ndef test_other(): pass\n\ndef test_{name}(): {body}\n"
        )
    good, bad = (str(tmp_path / f"test_{name}.py") for name in ("good", "bad"))
    names = {"good": "test_good.py", "bad": "test_bad.py"}
    tests = tool("tests", "", kind=plan.TESTS, tests=[good, bad], limit=60)
    _, found, summary = call(
        tests,
        tool("records-good", "", alone=True, after=["tests"], needs_tests=[names["good"]]),
        tool("records-bad", "", alone=True, after=["tests"], needs_tests=[names["bad"]]),
    )
    assert found["tests"].status == FAILED
    assert found["tests"].tests == {"passed": 3, "failed": 1}
    assert found["tests"].covered == ["test_good.py", "test_bad.py::test_other"]
    [line] = found["tests"].lines
    assert line.startswith("test_bad.py::test_bad: AssertionError: off by one")
    assert found["records-good"].status == PASSED
    assert found["records-bad"].status == SKIPPED
    assert found["records-bad"].reason == "tests have not passed: test_bad.py"
    assert "`test_bad.py::test_bad: AssertionError: off by one" in summary


FORMS = """
from benchmarks.gpu.plan import Form
first.FORMS = [
    Form(name, (test,), (sanitized,), "mask", "native") for name, test, sanitized in (
        ("good:native", "test_good.py", "memcheck-good"),
        ("failing:native", "test_bad.py", "memcheck-good"),
        ("racing:native", "test_good.py", "racecheck-good"),
    )
]
first._CHECKED = ("-c", "import sys; open(sys.argv[2], 'w').write(' '.join(sys.argv[3:]))")
"""


def test_forms_are_recorded_once_all_their_checks_have_passed(call, tmp_path):
    for name, body in (("good", "pass"), ("bad", "assert False")):
        (tmp_path / f"test_{name}.py").write_text(f"def test_{name}(): {body}\n")
    files = [str(tmp_path / f"test_{name}.py") for name in ("good", "bad")]
    seen = tmp_path / "work" / carried.FORMS
    # Slower than the reference, as it turns out after the form was first recorded.
    here = {"device": "Some GPU", "torch": "2"}
    rows = [replace(row("mask", who, s)[1], environment=here) for who, s in RACE]
    results = tmp_path / "work" / "results" / "some-gpu" / "mask.jsonl"
    measure = (
        f"import os; print(open({str(seen)!r}).read())\n"
        f"os.makedirs({str(results.parent)!r}); open({str(results)!r}, 'w').write({lines(rows)!r})"
    )
    _, found, summary = call(
        tool("tests", "", kind=plan.TESTS, tests=files, limit=60),
        tool("memcheck-good", "", after=["tests"]),
        tool("racecheck-good", "raise SystemExit(9)"),
        tool("measures", measure, alone=True),
        more=FORMS,
    )
    assert found["measures"].status == PASSED
    assert "--passed good:native\n" in (tmp_path / "work" / "measures.log").read_text()
    recorded = (tmp_path / "out" / carried.FORMS).read_text()
    assert recorded == "--passed good:native --slower good:native=2.00 times as long: one"
    assert "- good:native: passed all checks" in summary
    assert "- failing:native: not passed: test_bad.py" in summary
    assert "- racing:native: not passed: racecheck-good" in summary


RACE = (("reference", 1.0), ("native", 2.0))


def lines(rows):
    return "".join(json.dumps(asdict(each)) + "\n" for each in rows)


def test_the_benchmarks_know_the_tests_that_have_passed_again(tmp_path):
    """Without this they would measure nothing, or run all of them once more."""
    session = first.Session([], tmp_path, tmp_path, seconds=9.0, rehearsal=True)
    session.close()
    session._facts = prerequisites.facts(rehearsal=True)
    passed = ["tests/ops/test_mask_op.py", "tests/masks/test_edits.py::test_one"]
    session.outcomes = {"tests": outcomes.Outcome(FAILED, covered=passed)}
    session._write_gate()
    here = environment.collect(torch.device("cpu"), []) | {"device": environment.REHEARSAL}
    results = tmp_path / "results"
    assert gate.passed_before(passed, results, here)
    assert not gate.passed_before(["tests/masks/test_edits.py"], results, here)
    assert not gate.passed_before(passed, results, {**here, "device": "Some GPU"})


# What became of a part, without one running.


def judged(tmp_path, kind, status, said="", notes=(), cut_by=""):
    log, noted = tmp_path / "log", tmp_path / "notes"
    log.write_text(said)
    noted.write_text("".join(f"{line}\n" for line in notes))
    part = Part("part", kind, 10, tool="memcheck")
    return outcomes.judged(part, status, 1.0, log, noted, cut_by, "stamp")


def note(test, outcome, why=""):
    return json.dumps({"test": test, "outcome": outcome, "why": why})


def test_tests_that_end_well_without_one_that_passed_have_not_passed(tmp_path):
    for kind in (plan.TESTS, plan.SANITIZER):
        for notes in ((), [note("a.py::t", "skipped")], ["{cut off", '"no note"', "3"]):
            found = judged(tmp_path, kind, 0, notes=notes)
            assert (found.status, found.reason) == (FAILED, "ended without a test that passed")
    assert judged(tmp_path, plan.TESTS, 0, notes=[note("a.py::t", "passed")]).status == PASSED


def test_tests_that_were_cut_say_which_one_was_running_and_cover_nothing(tmp_path):
    notes = [note("a.py::t", "started"), note("a.py::t", "passed"), note("a.py::u", "started")]
    found = judged(tmp_path, plan.TESTS, None, notes=notes, cut_by="its limit of 10 s")
    assert (found.status, found.lines) == (CUT, ["was running: a.py::u"])
    assert found.tests == {"passed": 1} and found.covered == []


def test_a_teardown_that_fails_takes_its_test_back(tmp_path):
    notes = [note("a.py::t", "passed"), note("a.py::t", "failed", "left open")]
    found = judged(tmp_path, plan.TESTS, 1, notes=notes)
    assert (found.status, found.covered, found.lines) == (FAILED, [], ["a.py::t: left open"])


def test_findings_of_the_sanitizer_are_shown(tmp_path):
    said = "noise\n========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4\n"
    notes = [note("a.py::t", "passed")]
    found = judged(tmp_path, plan.SANITIZER, sanitized.FOUND, said, notes)
    assert (found.status, found.reason) == (FAILED, "memcheck found something")
    assert "========= Invalid __global__ read of size 4" in found.lines
    assert judged(tmp_path, plan.SANITIZER, 0, said, notes).status == PASSED


def test_a_measurement_that_ran_out_of_time_is_cut_and_not_done(tmp_path):
    said = "the time is used up, 7 of 72 cases left: call again with --resume\n"
    found = judged(tmp_path, plan.RECORDS, 0, said)
    assert (found.status, found.reason) == (CUT, said.strip())
    assert judged(tmp_path, plan.RECORDS, 0, "all measured").status == PASSED
    said = "  triton    not measured: must compute importance\n  reference   1 ms\n"
    assert judged(tmp_path, plan.RECORDS, 1, said).lines == [
        "triton    not measured: must compute importance"
    ]


# The sanitizer, by a stand-in.


@pytest.mark.parametrize(
    "said, status, expected",
    [
        ("========= ERROR SUMMARY: 0 errors", 0, 0),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, 0),
        ("", 0, 1),
        ("========= ERROR SUMMARY: 2 errors", 0, 1),
        ("========= ERROR SUMMARY: 2 errors", 9, sanitized.FOUND),
        ("========= ERROR SUMMARY: 0 errors", 1, 1),
    ],
)
def test_silence_of_the_sanitizer_is_no_clean_run(tmp_path, monkeypatch, said, status, expected):
    stand_in = tmp_path / "compute-sanitizer"
    stand_in.write_text(f"#!/bin/sh\necho '{said}'\nexit {status}\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(sanitized, "_path", lambda: str(tmp_path))
    assert sanitized.main(["memcheck", "tests"]) == expected


def test_without_the_sanitizer_nothing_is_clean(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sanitized, "_path", lambda: str(tmp_path))
    for arguments in ([], ["memcheck", "tests"]):
        assert sanitized.main(arguments) == sanitized.REFUSED
        assert "refused: compute-sanitizer is not installed" in capsys.readouterr().out


# The extension.


@pytest.fixture
def in_tree(tmp_path, monkeypatch):
    """An extension in fastdean/, compiled from these sources, as far as anyone can tell."""
    extension = tmp_path / "fastdean" / build_extension.NAME
    extension.parent.mkdir()
    monkeypatch.setattr(build_extension, "EXTENSION", extension)
    monkeypatch.setattr(build_extension, "_loads", lambda: True)
    monkeypatch.setattr(build_extension, "_compile", lambda build: compiled.append(build) or True)
    monkeypatch.setattr(build_extension, "ROOT", tmp_path)
    monkeypatch.setattr(build_extension, "checksum", lambda: "these")
    monkeypatch.delenv("FASTDEAN_PREBUILT", raising=False)
    compiled = []
    return extension, compiled


def test_only_what_was_compiled_from_these_sources_is_taken(in_tree, tmp_path):
    extension, compiled = in_tree
    for sources, taken in ((None, False), ("others", False), ("these", True)):
        compiled.clear()
        extension.write_text("before")
        if sources is not None:
            extension.with_name(build_extension.SOURCES).write_text(sources + "\n")
        assert build_extension.main(tmp_path / "build") == 0
        # A stale one is gone before anything is compiled: others start meanwhile.
        assert bool(compiled) is not taken and extension.exists() is taken


def test_a_prebuilt_extension_is_taken_where_it_says_what_it_was_made_of(
    in_tree, tmp_path, monkeypatch, capsys
):
    extension, compiled = in_tree
    prebuilt = tmp_path / "elsewhere" / build_extension.NAME
    monkeypatch.setenv("FASTDEAN_PREBUILT", str(prebuilt))
    assert build_extension.main(tmp_path / "build") == 0
    assert compiled and "passed over: FASTDEAN_PREBUILT must be" in capsys.readouterr().out
    prebuilt.parent.mkdir()
    prebuilt.write_text("carried")
    for sources, taken in (("others", False), ("these", True), ("others", False)):
        compiled.clear()
        prebuilt.with_name(build_extension.SOURCES).write_text(f"{sources}\n")
        assert build_extension.main(tmp_path / "build") == 0
        assert ("passed over" in capsys.readouterr().out) is not taken
        assert extension.exists() == (taken or not compiled)
    # The good one that was taken stays.
    assert extension.read_text() == "carried" and not compiled


def test_the_extension_is_compiled_with_cuda_whatever_the_environment_says(tmp_path, monkeypatch):
    commands = []

    def run_it(command, env):
        commands.append((command, env))
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(build_extension.subprocess, "run", run_it)
    monkeypatch.setattr(build_extension, "find_nvcc", lambda path: "/somewhere/nvcc")
    # Of the machine with the GPU; an install here builds where it is out of sight.
    pybind11 = SimpleNamespace(get_cmake_dir=lambda: "/somewhere/pybind11")
    monkeypatch.setitem(sys.modules, "pybind11", pybind11)
    monkeypatch.setenv("FASTDEAN_CUDA", "AUTO")
    assert not build_extension._compile(tmp_path)
    [(command, environment)] = commands
    assert "-DFASTDEAN_CUDA=ON" in command and environment["CUDACXX"] == "/somewhere/nvcc"


def test_nvcc_is_found_where_it_is_not_on_the_path(tmp_path, monkeypatch):
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build_extension.glob, "glob", lambda pattern: [str(tmp_path / "cuda-13")])
    elsewhere = tmp_path / "cuda-13" / "bin" / "nvcc"
    elsewhere.parent.mkdir(parents=True)
    elsewhere.write_text("#!/bin/sh\n")
    elsewhere.chmod(0o755)
    found = build_extension.find_nvcc("")
    assert found == str(elsewhere) or found.startswith("/usr/local/cuda/")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda-13"))
    assert build_extension.find_nvcc("") == str(elsewhere)
    monkeypatch.setenv("CUDACXX", "/opt/nvcc")
    assert build_extension.find_nvcc("") == "/opt/nvcc"


# What a machine needs.


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
    here = environment.collect(torch.device("cpu"), [])
    same = {name: here[name] for name in store.SAME_CODE if name != "device"}
    assert same.items() <= found.items()


def test_everything_that_is_missing_is_named_in_a_line_of_its_own(
    everything_here, monkeypatch, capsys
):
    def import_module(name):
        if name == "triton":
            raise ImportError("no such library")
        return everything_here[name]

    everything_here["torch"].__version__ = "2.9.1"
    monkeypatch.setattr(prerequisites, "import_module", import_module)
    monkeypatch.setattr(prerequisites, "_is_installed", lambda name: name == "pytest")
    monkeypatch.setattr(prerequisites, "_is_program", lambda name: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert prerequisites.main(["facts.json"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: torch >= 2.11 is needed, got 2.9.1",
        "error: triton >= 3.6 is needed, and it cannot be imported: no such library",
        "error: the Python package hypothesis is needed",
        "error: the Python package accelerate is needed",
        "error: the Python package pybind11 is needed",
        "error: the program cmake is needed, on the PATH or beside Python",
        "error: a CUDA device is needed, and torch sees none",
    ]


# Figures and aims.

FACTS = {"device": "Some GPU", "sources": "s", "torch": "2", "triton": "3", "transformers": "5"}


def row(op, contender, median_s=1.0, case="one", setup=None, **changes):
    seconds = {"median_s": median_s}
    metrics = {"floor_s": 1.0, "bytes_per_s": 1.0, "copy_bandwidth": 2.0}
    made = Record(op, case, contender, setup or {}, seconds, metrics, environment=FACTS)
    fields = {name: changes.pop(name) for name in ("toy", "gate") if name in changes}
    here = FACTS | {name: changes.pop(name) for name in FACTS if name in changes}
    made = replace(made, **{"gate": "passed", "environment": here, **fields})
    return f"some-gpu/{op}.jsonl", replace(made, metrics=metrics | changes)


def importance(median_s, case, **changes):
    setup = {"lengths": "beavertails", "tokens_per_example": 76}
    return row("importance", "triton", median_s, case, setup, **changes)


def figure(rows, start):
    [found] = [each for each in aims.figures(rows, FACTS) if each.aim.startswith(start)]
    return found


def test_what_was_not_measured_here_is_missing_and_never_made_up():
    others = [
        importance(1.5, "toy", toy=True),
        importance(1.5, "untested", gate="skipped"),
        importance(1.5, "rehearsed", device="cpu, rehearsal"),
        importance(1.5, "other sources", sources="t"),
        row("importance", "reference", setup={"lengths": "beavertails"}),
    ]
    for rows in ([], others):
        for found in aims.figures(rows, FACTS):
            assert (found.met, found.text) == (None, "not measured")


def test_the_worst_case_counts_and_the_last_measurement_of_each():
    rows = [importance(9.0, "a"), importance(1.5, "a"), importance(1.9, "b")]
    found = figure(rows, "weight importance, BeaverTails'")
    assert found.met is True
    assert found.text == "worst 1.90x (b), best 1.50x; met in 2 of 2; 10 of 12 missing"
    found = figure([*rows, importance(2.5, "c")], "weight importance, BeaverTails'")
    assert found.met is False and found.text.startswith("worst 2.50x (c), best 1.50x; met in 2 of")
    assert figure(rows, "weight importance, 256").met is None


def test_a_share_has_to_reach_its_aim_and_a_time_to_stay_below():
    unit = [row("unit_importance", "triton", bytes_per_s=1.6)]
    assert figure(unit, "unit importance").text == "80% (one)"
    assert figure(unit, "unit importance").met is False
    mask = [row("mask", "native, zeros only", host_s=45e-6, setup={"matrices": 84})]
    assert figure(mask, "masks").text == "45.0 us (one)" and figure(mask, "masks").met is True


def test_what_is_compared_with_another_is_missing_without_it():
    setup = {"tokens": 16384, "features": 4096}
    ours = row("collapse", "native", 1.0, setup=setup)
    assert figure([ours], "collapse loss").met is None
    rows = [ours, row("collapse", "reference", 6.0, setup=setup)]
    assert figure(rows, "collapse loss").met is True
    assert aims.slower_than_the_reference(rows, FACTS, "collapse", "native") == ""
    rows.append(row("collapse", "native", 9.0, setup=setup))
    found = aims.slower_than_the_reference(rows, FACTS, "collapse", "native")
    assert found == "1.50 times as long: one"
    assert aims.slower_than_the_reference([ours], FACTS, "collapse", "native") == ""


# Records on their way.


def test_records_come_back_in_one_file_and_go_where_they_belong(tmp_path, capsys):
    results, out = tmp_path / "results", tmp_path / "out"
    names = ("gpu-a/mask.jsonl", "gpu-b/score.jsonl")
    for name in (*names, "tests/gate.jsonl"):
        (results / name).parent.mkdir(parents=True, exist_ok=True)
        (results / name).write_text(lines([row("score", name)[1]]) + '{"cut o')
    out.mkdir()
    (out / carried.RECORDS).write_text(carried.packed(results))
    assert carried.main(out, tmp_path / "again") == 0
    found = {
        path.relative_to(tmp_path / "again").as_posix(): store.parsed(path.read_text())
        for path in (tmp_path / "again").rglob("*.jsonl")
    }
    assert found == {name: row("score", name)[1] for name in names}
    rehearsed = asdict(row("mask", "native", device="cpu, rehearsal")[1])
    (out / carried.RECORDS).write_text(json.dumps({"results_file": "a/b.jsonl", **rehearsed}))
    assert carried.main(out, tmp_path / "never") == 2
    assert not (tmp_path / "never").exists()
    assert "must come from a GPU, got a rehearsal's" in capsys.readouterr().err


def test_a_state_that_cannot_be_read_is_none(tmp_path):
    for text in ("", "3", "[]", '{"a": 3}', '{"a": {"colour": 1}}', '{"a": {"sta'):
        (tmp_path / "state").write_text(text)
        assert carried.load(tmp_path / "state") == {}


# The plan, against the code and the tests that it names.


def everything():
    return {part.name: part for target in plan.TARGETS for part in plan.parts_of(target)}


def test_the_plan_names_tests_that_exist():
    named = {test for part in everything().values() for test in (*part.tests, *part.needs_tests)}
    named |= {test for form in plan.FORMS for test in form.tests}
    assert len(named) > 20
    for test in named:
        path, _, function = test.partition("[")[0].partition("::")
        source = (ROOT / path).read_text("utf-8")
        assert not function or f"def {function}(" in source, test


def test_whatever_needs_a_gpu_is_run_on_one():
    for target in ("first", "check"):
        named = {Path(test).name for part in plan.parts_of(target) for test in part.tests}
        marked = {
            path.name
            for path in (ROOT / "tests").rglob("test_*.py")
            if re.search(r"^@pytest\.mark\.gpu$", path.read_text("utf-8"), re.MULTILINE)
        }
        assert len(marked) > 4 and marked <= named


def test_every_part_comes_after_what_it_rests_on():
    for target in plan.TARGETS:
        parts = plan.parts_of(target)
        seen = []
        for part in parts:
            assert set(part.needs) | set(part.after) <= set(seen), part.name
            seen.append(part.name)
        measuring = [part.alone for part in parts]
        assert measuring == sorted(measuring)
        tested = [test for part in parts if part.kind == plan.TESTS for test in part.tests]
        for part in parts:
            assert all(is_covered(test, tested) for test in part.needs_tests), part.name


def test_measurements_rest_on_the_tests_that_the_benchmarks_ask_for():
    parts = everything()
    measured = {}
    for part in parts.values():
        if part.arguments[:2] == ("kernels", "--op"):
            measured[part.arguments[2]] = part.needs_tests
    assert measured == GATES
    for name in ("records-score", "records-all-of-score", "records-sweep"):
        assert parts[name].needs_tests == BENCHMARKS["score"].tests(None, True)


def test_measurements_ask_for_what_the_benchmarks_know():
    def parsed(*arguments):
        return command.parsed("", "", BENCHMARKS, arguments)

    for part in everything().values():
        if part.kind == plan.RECORDS:
            parsed(*part.arguments, "--device", "cuda")
            rehearsed = parsed(*part.rehearsed, "--device", "cpu", "--rehearsal", "--out", "out")
            assert rehearsed.rehearsal and rehearsed.out == Path("out")


def test_every_operation_of_the_extension_and_of_triton_is_a_form_and_sanitized():
    from fastdean.ops import _dispatch

    on_a_gpu = {
        f"{op}:{entry.name}"
        for op, entries in _dispatch._TABLE.items()
        for entry in entries
        if entry.name == "triton" or (entry.name == "native" and "importance" not in op)
    }
    assert {form.name for form in plan.FORMS} == on_a_gpu
    parts = everything()
    for form in plan.FORMS:
        assert {parts[name].tool for name in form.sanitized} == {"memcheck", "racecheck"}
        assert any(form.op in part.arguments for part in parts.values())
    for op in ("mask", "collapse"):
        assert (ROOT / "csrc" / f"{op}_cuda.cu").is_file()


def test_the_first_ten_minutes_hold_no_more_measuring_than_they_have():
    parts = plan.parts_of("first")
    measuring = [part for part in parts if part.kind == plan.RECORDS]
    assert sum(part.seconds for part in measuring) <= 320
    for part in measuring:
        assert part.seconds <= part.limit and part.least <= part.limit
