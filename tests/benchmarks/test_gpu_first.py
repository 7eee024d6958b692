"""`make gpu-first`: what its parts leave behind when they fail, hang, die, or are cut."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.gpu import (  # fmt: skip
    aims,
    build_extension,
    first,
    outcomes,
    plan,
    prerequisites,
    results,
    sanitized,
)
from benchmarks.gpu.outcomes import CUT, FAILED, PASSED, REFUSAL, SKIPPED
from benchmarks.gpu.plan import Part
from benchmarks.harness import command, gate, store
from benchmarks.harness.gate import is_covered
from benchmarks.harness.store import Record

ROOT = store.ROOT
FACTS = {"device": "Some GPU", "sources": "s", "torch": "2", "triton": "3", "transformers": "5"}

# One call of the program with stages of the test's own, that start in no time.
DRIVER = """
import json, os, sys
from benchmarks.gpu import first
from benchmarks.gpu.plan import Part

stages = [[Part(**each) for each in stage] for stage in json.loads({stages!r})]
{more}
sys.exit(first.main([{out!r}, "--work", {work!r}, *{arguments!r}], stages=stages))
"""
MACHINE = f"print({json.dumps(FACTS)!r}); print('a warning')"
SLEEP = "import time; time.sleep(99)"


def tool(name, code, limit=20, kind=plan.TOOL, **fields):
    """Like the parts of the plan that pass, a stand-in for tests is known again."""
    part = {"name": name, "kind": kind, "command": ["-c", code], "limit": limit, "least": 0}
    return part | fields


@pytest.fixture
def program(tmp_path):
    """Starts the program on stages, after one that says what machine this is."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")  # where the names of tests start

    def start(*stages, more="", machine=MACHINE, arguments=(), **variables):
        stages = [[tool("machine", machine, needs=[])], *stages]
        places = {name: str(tmp_path / name) for name in ("out", "work")}
        asked = {"more": more, "arguments": arguments}
        code = DRIVER.format(stages=json.dumps(stages), **asked, **places)
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
def call(program, tmp_path, monkeypatch):
    """The program from start to end: its status, the outcomes by part, and the summary."""
    # Its tests are no part of this process's own run, whose other processes would note them.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)

    def call(*stages, **options):
        process = program(*stages, **options)
        said, _ = process.communicate(timeout=60)
        found = first.loaded(tmp_path / "out" / first.STATE)
        assert found, said
        return process.returncode, found, (tmp_path / "out" / first.SUMMARY).read_text()

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


def test_a_part_that_fails_hangs_dies_or_prints_garbage_takes_only_itself_out(call, tmp_path):
    status, found, summary = call(
        [
            tool("fails", "raise ValueError('no such | thing')"),
            tool("hangs", f"print('so far', flush=True); {SLEEP}", limit=2),
            tool("dies", "import os; os.kill(os.getpid(), 9)"),
            tool("garbage", "import sys; sys.stdout.buffer.write(bytes(range(256)) * 9000); 1 / 0"),
            tool("refuses", "print('refused: no device'); raise SystemExit(3)"),
        ],
        [tool("rests on it", "", needs=["machine", "fails"]), tool("after", "print('fine')")],
    )
    expected = {"machine": PASSED, "fails": FAILED, "hangs": CUT, "dies": FAILED}
    expected |= {"garbage": FAILED, "refuses": REFUSAL, "rests on it": SKIPPED, "after": PASSED}
    assert status == 1 and {name: each.status for name, each in found.items()} == expected
    assert found["fails"].lines == ["ValueError: no such | thing"]
    assert (found["hangs"].reason, found["hangs"].lines) == ("its limit of 2 s", ["so far"])
    assert found["dies"].reason == "killed by signal 9"
    assert all(len(line) < 210 and line.isprintable() for line in found["garbage"].lines)
    assert found["rests on it"].reason == "fails has not passed: failed"
    assert "| after | passed |" in summary and "## Cut\n\n- hangs: its limit of 2 s" in summary
    assert (tmp_path / "out" / first.LOG).stat().st_size < 1 << 20


def test_on_a_machine_that_lacks_something_nothing_else_starts(call):
    status, found, _ = call([tool("good", "")], machine="raise SystemExit(2)")
    assert (status, found["machine"].status, found["good"].status) == (2, FAILED, SKIPPED)


def test_a_rehearsal_is_whole_without_the_sanitizer_alone(call):
    needs = ["machine", "sanitizer"]
    stages = [
        [tool("sanitizer", "print('refused: not installed'); raise SystemExit(3)")],
        [tool("memcheck", "", kind=plan.SANITIZER, needs=needs)],
    ]
    status, found, _ = call(*stages, arguments=["--rehearsal"])
    assert (status, found["memcheck"].status) == (0, SKIPPED)


def test_what_passed_is_not_run_again_until_something_changes(call, tmp_path):
    def counted(name, code=""):
        code = f"print('ran', file=open({str(tmp_path / name)!r}, 'a')); {code}"
        return tool(name, code, kind=plan.RECORDS)

    def runs(device="Some GPU", **variables):
        machine = f"print({json.dumps(FACTS | {'device': device})!r})"
        parts = [counted("good"), counted("bad", "raise SystemExit(1)")]
        call(parts, machine=machine, **variables)
        return [len((tmp_path / name).read_text().splitlines()) for name in ("good", "bad")]

    assert [runs(), runs()] == [[1, 1], [1, 2]]
    # OUT is what a call goes on from, also on a machine that has nothing else.
    (tmp_path / "work").rename(tmp_path / "of another machine")
    assert runs() == [1, 3]
    assert [runs("another GPU"), runs("another GPU")] == [[2, 4], [2, 5]]
    assert runs("another GPU", FRESH="1") == [3, 6]


def test_a_killed_program_leaves_a_true_summary_and_no_process(program, call, tmp_path):
    pids = tmp_path / "pids"
    # The child leaves its session.
    code = (
        "import os, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '99'], start_new_session=True)\n"
        f"print(os.getpid(), child.pid, file=open({str(pids)!r}, 'w'), flush=True)\n"
        "time.sleep(99)"
    )
    good = tool("good", "", kind=plan.RECORDS)
    process = program([good], [tool("long", code)])
    until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    started = [int(pid) for pid in pids.read_text().split()]
    assert all(map(alive, started))
    process.kill()
    process.communicate()
    until(lambda: not any(map(alive, started)))
    summary = (tmp_path / "out" / first.SUMMARY).read_text()
    assert "| good | passed |" in summary and "| long | passed" not in summary
    found = first.loaded(tmp_path / "out" / first.STATE)
    assert found["good"].status == PASSED and "long" not in found
    # Resumed: what was under way is run again, and nothing else.
    status, found, _ = call([good | {"command": ["-c", "1 / 0"]}], [tool("long", "")])
    assert (status, found["long"].status, found["good"].status) == (0, PASSED, PASSED)


def test_a_program_that_is_told_to_end_says_what_it_cut(program, tmp_path):
    started = tmp_path / "started"
    process = program([tool("long", f"open({str(started)!r}, 'w'); {SLEEP}")])
    until(started.exists)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 1
    outcome = first.loaded(tmp_path / "out" / first.STATE)["long"]
    assert (outcome.status, outcome.reason) == (CUT, "cut by SIGTERM")


def test_the_time_for_all_parts_is_kept(call):
    start = time.monotonic()
    parts = [tool("never", "", least=1000)], [tool("long", SLEEP)], [tool("late", "")]
    _, found, _ = call(*parts, SECONDS_ALL="3")
    assert time.monotonic() - start < 30
    reason = "the end of the time for all parts"
    assert (found["long"].status, found["long"].reason) == (CUT, reason)
    assert {found[name].status for name in ("never", "late")} == {SKIPPED}


def pytest_part(tmp_path, **bodies):
    """A part that runs a file of two tests for each, of which the second has the body."""
    files = [tmp_path / f"test_{name}.py" for name in bodies]
    for path, (name, body) in zip(files, bodies.items(), strict=True):
        path.write_text(f"def test_other(): pass\n\ndef test_{name}(): {body}\n")
    command = ["-m", "pytest", *plan._pytest(*map(str, files))]
    return tool("tests", "", kind=plan.TESTS, limit=60, command=command)


def test_a_failing_operation_takes_only_its_own_cases_out(call, tmp_path):
    measuring = [
        tool(f"records-{name}", "", needs_tests=[f"test_{name}.py"]) for name in ("good", "bad")
    ]
    part = pytest_part(tmp_path, good="assert True", bad="assert 1 == 2, 'off by one'")
    _, found, summary = call([part], measuring)
    assert found["tests"].status == FAILED
    assert found["tests"].tests == {"passed": 3, "failed": 1}
    assert found["tests"].covered == ["test_good.py", "test_bad.py::test_other"]
    assert "`test_bad.py::test_bad: AssertionError: off by one" in summary
    assert found["records-good"].status == PASSED
    assert found["records-bad"].status == SKIPPED
    assert found["records-bad"].reason == "tests have not passed: test_bad.py"


FORMS = """
first.plan.FORMS = [
    first.plan.Form(name, op, (sanitized,)) for name, op, sanitized in (
        ("good:native", "mask", "memcheck-good"),
        ("failing:native", "collapse", "memcheck-good"),
        ("racing:native", "mask", "racecheck-good"),
    )
]
first.gate.OPERATIONS = {"mask": ("test_good.py",), "collapse": ("test_bad.py",)}
first._CHECKED = ("-c", "import sys; open(sys.argv[2], 'a').write(' '.join(sys.argv[3:]) + ';')")
"""


def test_forms_are_recorded_once_all_their_checks_have_passed(call, tmp_path):
    # Slower than the reference, as it turns out after the form was first recorded.
    rows = [row("mask", "reference", 1.0), row("mask", "native", 2.0)]
    for each in rows:
        store.append(tmp_path / "measured", each)
    measure = f"import shutil; shutil.copytree({str(tmp_path / 'measured')!r}, sys.argv[1])"
    command = ["-c", f"import sys; {measure}", str(tmp_path / "out" / "results")]
    _, _, summary = call(
        [pytest_part(tmp_path, good="pass", bad="assert False")],
        [tool("memcheck-good", ""), tool("racecheck-good", "raise SystemExit(9)")],
        [tool("measures", "", command=command)],
        more=FORMS,
    )
    recorded = (tmp_path / "out" / first.FORMS).read_text()
    slower = "--passed good:native --slower good:native=2.00 times as long: one;"
    assert recorded == f"--passed good:native;{slower}"
    assert "- good:native: passed all checks" in summary
    assert "- failing:native: not passed: test_bad.py" in summary
    assert "- racing:native: not passed: racecheck-good" in summary


def note(test, outcome, why=""):
    return json.dumps({"test": test, "outcome": outcome, "why": why})


FINDING = "noise\n========= Invalid __global__ read of size 4\n"
LEFT = "the time is used up, 7 of 72 cases left: call again with --resume"
WRONG = "triton    not measured: must compute importance"


@pytest.mark.parametrize(
    "kind, status, said, notes, expected, reason, lines",
    [
        (plan.TESTS, 0, "", [note("a", "passed")], PASSED, "", []),
        (plan.TESTS, 0, "", [note("a", "skipped"), "{cut", "3"], FAILED, "ended without", []),
        (plan.TESTS, None, "", [note("a", "started")], CUT, "its limit", ["was running: a"]),
        # A teardown that fails takes its test back.
        (plan.TESTS, 1, "", [note("a", "passed"), note("a", "failed", "left open"),
                             note("a", "passed")], FAILED, "1 of 1 tests failed", ["a: left open"]),
        (plan.SANITIZER, sanitized.FOUND, FINDING, [note("a", "passed")], FAILED,
         "the sanitizer found something", ["========= Invalid __global__ read of size 4"]),
        (plan.RECORDS, 0, LEFT, [], CUT, LEFT, [LEFT]),
        (plan.RECORDS, 1, f"  {WRONG}\n  reference 1 ms", [], FAILED, "ended with", [WRONG]),
    ],
)  # fmt: skip
def test_what_became_of_a_part(tmp_path, kind, status, said, notes, expected, reason, lines):
    log, noted = tmp_path / "log", tmp_path / "notes"
    log.write_text(said)
    noted.write_text("".join(f"{line}\n" for line in notes))
    part, cut_by = Part("part", kind, (), 10), "its limit" if status is None else ""
    found = outcomes.judged(part, status, 1.0, log, noted, cut_by, "stamp")
    assert (found.status, found.lines) == (expected, lines) and found.reason.startswith(reason)
    assert bool(found.covered) == (kind == plan.TESTS and expected == PASSED)


CLEAN = "========= ERROR SUMMARY: 0 errors"


@pytest.mark.parametrize(
    "said, status, expected",
    [
        (CLEAN, 0, 0),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, 0),
        ("", 0, 1),
        (CLEAN.replace("0", "2"), 9, sanitized.FOUND),
    ],
)
def test_silence_of_the_sanitizer_is_no_clean_run(tmp_path, monkeypatch, said, status, expected):
    monkeypatch.setattr(sanitized, "_path", lambda: str(tmp_path))
    assert sanitized.main(["memcheck", "tests"]) == sanitized.REFUSED  # there is none
    stand_in = tmp_path / "compute-sanitizer"
    stand_in.write_text(f"#!/bin/sh\necho '{said}'\nexit {status}\n")
    stand_in.chmod(0o755)
    assert sanitized.main(["memcheck", "tests"]) == expected


@pytest.mark.parametrize("place", ["fastdean", "elsewhere"])
@pytest.mark.parametrize("sources, is_taken", [(None, False), ("others", False), ("these", True)])
def test_only_an_extension_of_these_sources_is_taken(
    tmp_path, monkeypatch, place, sources, is_taken
):
    compiled, extension = [], tmp_path / "fastdean" / build_extension.NAME
    monkeypatch.setattr(build_extension, "EXTENSION", extension)
    monkeypatch.setattr(build_extension, "ROOT", tmp_path)
    monkeypatch.setattr(build_extension, "_loads", lambda: True)
    monkeypatch.setattr(build_extension, "_compile", lambda build: compiled.append(build) or True)
    monkeypatch.setattr(build_extension, "checksum", lambda: "these")
    given = tmp_path / place / build_extension.NAME
    monkeypatch.setenv("FASTDEAN_PREBUILT", "" if given == extension else str(given))
    for each in (extension, given):
        each.parent.mkdir(exist_ok=True)
    given.write_text("given")
    if sources is not None:
        given.with_name(build_extension.SOURCES).write_text(sources + "\n")
    assert build_extension.main(tmp_path / "build") == 0
    # A stale one is gone before anything is compiled: others start meanwhile.
    assert bool(compiled) is not is_taken and extension.exists() is is_taken
    assert not is_taken or extension.read_text() == "given"


def test_everything_that_is_missing_is_named_in_a_line_of_its_own(monkeypatch, capsys):
    monkeypatch.setitem(prerequisites.NEEDED, "torch", (99, 1))
    monkeypatch.setitem(prerequisites.NEEDED, "no_such_package", (3,))
    monkeypatch.setattr(prerequisites, "_is_program", lambda name: name == "gcc")
    assert prerequisites.main(["--rehearsal"]) == 2
    lines = capsys.readouterr().err.splitlines()
    for start in ("torch >= 99.1 is needed, got 2.", "no_such_package >= 3 is needed, got none",
                  "the program cmake is needed"):  # fmt: skip
        assert sum(line.startswith(f"error: {start}") for line in lines) == 1


def test_a_measurement_goes_on_where_its_tests_have_passed_in_other_parts(
    tmp_path, quick_benchmarks
):
    stages = plan.stages("first", tmp_path, tmp_path, rehearsal=True)
    [part] = [part for stage in stages for part in stage if part.name == "records-mask"]
    assert main(part.command[2:]) == 1  # it runs no tests itself
    facts = prerequisites.facts(rehearsal=True)
    gate.record_passed(part.needs_tests, tmp_path / "results", facts)
    assert main(part.command[2:]) == 0
    rows = first.measurements(tmp_path)
    assert rows and all(row.gate == "passed" and store.is_of(row, facts) for row in rows)
    assert {row["device"] for row in rows} == {"cpu, rehearsal"}


# Figures and aims.


def row(op, contender, median_s=1.0, case="one", setup=None, gate="passed", toy=False, **changes):
    here = FACTS | {name: changes.pop(name) for name in FACTS if name in changes}
    metrics = {"floor_s": 1.0, "bytes_per_s": 1.0, "copy_bandwidth": 2.0, **changes}
    here["date"] = "2026-01-01"
    return Record(op, case, contender, setup or {}, {"median_s": median_s}, metrics,
                  gate=gate, toy=toy, environment=here)  # fmt: skip


def importance(median_s, case, **changes):
    setup = {"lengths": "beavertails", "tokens_per_example": 76}
    return row("importance", "triton", median_s, case, setup, **changes)


def figure(rows, start):
    [found] = [each for each in aims.figures(rows, FACTS) if each.aim.startswith(start)]
    return found.met, found.text


def test_what_was_not_measured_here_is_missing_and_never_made_up():
    others = [
        importance(1.5, "toy", toy=True),
        importance(1.5, "untested", gate="skipped"),
        importance(1.5, "rehearsed", device="cpu, rehearsal"),
        importance(1.5, "other sources", sources="t"),
        row("importance", "reference", setup={"lengths": "beavertails"}),
    ]
    for rows in ([], others):
        found = {(each.met, each.text) for each in aims.figures(rows, FACTS)}
        assert found == {(None, "not measured")}


def test_the_worst_case_counts_and_the_last_measurement_of_each():
    rows = [importance(9.0, "a"), importance(1.5, "a"), importance(1.9, "b")]
    text = "worst 1.90x (b), best 1.50x; met in 2 of 2; 10 of 12 missing"
    assert figure(rows, "weight importance, BeaverTails'") == (True, text)
    unit = [row("unit_importance", "triton", bytes_per_s=1.6)]
    assert figure(unit, "unit importance") == (False, "80% (one)")


def test_what_is_compared_with_another_is_missing_without_it():
    setup = {"tokens": 16384, "features": 4096}
    rows = []
    for impl, seconds, met, slower in (
        ("native", 1.0, None, ""),
        ("reference", 6.0, True, ""),
        ("native", 9.0, False, "1.50 times as long: one"),
    ):
        rows.append(row("collapse", impl, seconds, setup=setup))
        assert figure(rows, "collapse loss")[0] is met
        assert aims.slower_text(rows, FACTS, "collapse", "native") == slower


def test_records_of_a_gpu_go_where_tables_are_made_from(tmp_path, capsys):
    rows = [row("mask", "native"), row("score", "fastdean", device="Another GPU")]
    for each in rows:
        store.append(tmp_path / "results", each)
    assert results.main(tmp_path, tmp_path / "again") == 0
    assert [each for op in ("mask", "score") for each in store.read(tmp_path / "again", op)] == rows
    store.append(tmp_path / "results", row("mask", "native", device="cpu, rehearsal"))
    assert results.main(tmp_path, tmp_path / "never") == 2
    assert not (tmp_path / "never").exists()
    assert "must come from a GPU, got a rehearsal's" in capsys.readouterr().err


# The plan, against the code and the tests that it names.


def parts_of(target, *, rehearsal=False):
    stages = plan.stages(target, Path("out"), Path("work"), rehearsal=rehearsal)
    return {part.name: part for stage in stages for part in stage}


def paths_in(part):
    return [word for word in part.command if word.startswith("tests/")]


def test_the_plan_names_tests_that_exist_and_every_test_that_needs_a_gpu():
    for target in plan.TARGETS:
        parts = parts_of(target).values()
        run = [test for part in parts if part.kind == plan.TESTS for test in paths_in(part)]
        named = {test for part in parts for test in (*paths_in(part), *part.needs_tests)}
        named |= {test for form in plan.FORMS for test in form.tests}
        for test in named:
            path, _, function = test.partition("[")[0].partition("::")
            source = (ROOT / path).read_text("utf-8")
            assert not function or f"def {function}(" in source, test
        # What rests on tests comes with them.
        assert all(is_covered(test, run) for part in parts for test in part.needs_tests)
        if target in ("first", "check"):
            marked = {
                path.relative_to(ROOT).as_posix()
                for path in (ROOT / "tests").rglob("test_*.py")
                if re.search(r"^@pytest\.mark\.gpu$", path.read_text("utf-8"), re.MULTILINE)
            }
            assert len(marked) > 4 and marked <= set(run)


def test_measurements_come_last_alone_and_ask_for_what_the_benchmarks_know():
    for rehearsal in (False, True):
        for target in ("first", "bench"):
            stages = plan.stages(target, Path("out"), Path("work"), rehearsal=rehearsal)
            kinds = [[part.kind for part in stage] for stage in stages]
            count = kinds.count([plan.RECORDS])
            assert count > 6 and kinds[-count:] == [[plan.RECORDS]] * count
            for [part] in stages[-count:]:
                options = command.parsed("", "", BENCHMARKS, ["op"], ["op"], part.command[2:])
                assert options.rehearsal == rehearsal and options.resume and options.tested
                tests = BENCHMARKS[options.run].tests(options, on_gpu=True)
                assert part.needs_tests == tuple(tests) and options.seconds <= part.limit
                assert part.least <= part.limit
    assert sum(float(part.command[-1]) for [part] in stages[-count:][:8]) <= 320


def test_every_operation_of_the_extension_and_of_triton_is_a_form_and_sanitized():
    from fastdean.ops import _dispatch

    on_a_gpu = {
        f"{op}:{entry.name}"
        for op, entries in _dispatch._TABLE.items()
        for entry in entries
        if entry.name != "reference" and entry not in _dispatch.ONLY_ON_CPU
    }
    assert {form.name for form in plan.FORMS} == on_a_gpu
    parts = parts_of("first")
    for form in plan.FORMS:
        assert {parts[name].command[2] for name in form.sanitized} == {"memcheck", "racecheck"}
        assert any(form.op in part.command for part in parts.values())
