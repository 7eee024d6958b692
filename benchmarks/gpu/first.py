"""What is to be learned from a GPU, most worth first, within ten minutes and whatever cuts them.

    python3 -m benchmarks.gpu.first OUT [--target first|check|sanitize|bench] [--rehearsal]

`plan.py` says which parts there are. Each is a process with a limit of its own, and its outcome is
written as it ends: one that fails, hangs or dies takes out itself and what needs it, nothing else.
OUT gets
    summary.md            what passed, what failed, every figure against its aim: to be read
    state.json            the same for the next call
    log.txt               what every part printed
    checked_forms.json    the forms that passed all their checks
    results/              the measurements, as `python -m benchmarks` writes them
A second call with the same OUT goes on: what has passed with the same sources, versions and GPU is
not run again. Builds and whole logs lie in `build/gpu-...`.

SECONDS_ALL is what all parts may take together (default 560: ten minutes less a margin), counted
from the start of the command. FRESH=1 forgets earlier calls. `--rehearsal` runs the same parts
where there is no GPU. The status is 0 if everything has passed, 1 if not, 2 if this machine lacks
something.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu import aims, plan, processes, summary
from benchmarks.gpu.outcomes import CUT, FAILED, PASSED, REFUSAL, SKIPPED, Outcome, judged
from benchmarks.gpu.plan import SANITIZER, TARGETS, TOOL, Part, Stage
from benchmarks.harness import gate, store
from benchmarks.harness.gate import is_covered
from fastdean.files.atomic import write_text_atomic

STATE, SUMMARY, LOG, FORMS = "state.json", "summary.md", "log.txt", "checked_forms.json"
_CHECKED = ("-m", "fastdean.ops.checked")
_STARTED = time.monotonic()
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SECONDS_ALL = 560
# A rehearsal interprets the kernels, in Python and on few processors.
_SLOWER_HERE = 10
# Share of the time, and seconds at most, for the files that are written last.
_MARGIN, _MOST_MARGIN_S = 0.1, 5.0
_PUBLISH_EVERY_S = 5
# Of a long log, the bytes that log.txt gets from its beginning and its end.
_HEAD, _TAIL = 64 << 10, 192 << 10


class Running(NamedTuple):
    """A part on its way; `cut_by`: what ends it at `end`, if it does not end by itself."""

    part: Part
    process: subprocess.Popen
    start: float
    end: float
    cut_by: str


class Call:
    """One call of the program: the parts that run and those that have ended."""

    def __init__(self, out: Path, work: Path, seconds: float, *, rehearsal: bool) -> None:
        self.out, self.work, self.rehearsal = out, work, rehearsal
        self._seconds = seconds
        self._end = _STARTED + seconds - min(_MOST_MARGIN_S, _MARGIN * seconds)
        self._mark = f"{os.getpid()}-{time.time_ns()}"
        self._keeper = processes.keeper(self._mark)
        self._names = ["forms"]
        self._running: dict[str, Running] = {}
        self._facts: dict[str, Any] = {}
        self._recorded_forms: list[str] = []
        self._earlier = loaded(out / STATE)
        self.outcomes: dict[str, Outcome] = {}

    def run(self, stages: Sequence[Stage]) -> None:
        self._names = [*(part.name for stage in stages for part in stage), "forms"]
        self._publish("started")
        for stage in stages:
            self._run_stage(stage)
            self._record_forms()
        self._publish("ended")

    def close(self, why: str = "") -> None:
        """End what runs; `why` is the reason in the summary."""
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        for name in list(self._running):
            self._ended(name, None, why)
        self._keeper.communicate()
        if why:
            self._publish(why)

    def _run_stage(self, stage: Stage) -> None:
        waiting, cores = list(stage), os.cpu_count() or 1
        published = time.monotonic()
        while waiting or self._running:
            while waiting:
                busy = sum(running.part.workers for running in self._running.values())
                if busy and busy + waiting[0].workers > cores:
                    break
                self._start(waiting.pop(0))
            for name, running in list(self._running.items()):
                status = running.process.poll()
                if status is not None or time.monotonic() > running.end:
                    self._ended(name, status, running.cut_by if status is None else "")
                    self._publish("under way")
            if time.monotonic() - published > _PUBLISH_EVERY_S:
                published = time.monotonic()
                self._publish("under way")
            time.sleep(0.05)

    def _start(self, part: Part) -> None:
        earlier = self._earlier.get(part.name)
        known = PASSED, self._stamp(part)
        # What a tool finds out or builds is not in the files.
        if earlier and part.kind != TOOL and (earlier.status, earlier.stamp) == known:
            self.outcomes[part.name] = earlier
            return
        lack = self._lack(part)
        if lack:
            self.outcomes[part.name] = Outcome(SKIPPED, reason=lack)
            self._say(f"{part.name}: not started: {lack}")
            return
        limit = part.limit * (_SLOWER_HERE if self.rehearsal else 1)
        cut_by = f"its limit of {limit} s"
        if self._left() < limit:
            limit, cut_by = self._left(), "the end of the time for all parts"
        self._notes(part.name).unlink(missing_ok=True)
        if part.kind == plan.RECORDS:
            gate.record_passed(self._covered(), self.out / "results", self._facts)
        self._say(f"{part.name}: started")
        with self._log(part.name).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *part.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=store.ROOT,
                env=self._environment(part.name),
                start_new_session=True,
            )
        start = time.monotonic()
        self._running[part.name] = Running(part, process, start, start + limit, cut_by)

    def _environment(self, name: str) -> dict[str, str]:
        variables = {
            **os.environ,
            "PYTHONPATH": str(store.ROOT),
            "PYTHONUNBUFFERED": "1",
            "FASTDEAN_WATCHED_TESTS": str(self._notes(name)),
            # What else is installed there must not change how tests run.
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "FASTDEAN_REQUIRE_GPU": "" if self.rehearsal else "1",
            processes.MARK: f"{self._mark}/{name}/",
        }
        variables.pop("TRITON_INTERPRET", None)
        return variables

    def _lack(self, part: Part) -> str:
        """Why a part cannot start; "" if it can."""
        for name in part.needs:
            if self.outcomes[name].status != PASSED:
                return f"{name} has not passed: {self.outcomes[name].status}"
        missing = [t for t in part.needs_tests if not is_covered(t, self._covered())]
        if missing:
            return f"tests have not passed: {', '.join(missing)}"
        left = self._left()
        if left <= 0:
            return "no time was left"
        if left < part.least:
            return f"{left:.0f} s were left, it takes at least {part.least}"
        return ""

    def _ended(self, name: str, status: int | None, cut_by: str) -> None:
        part, process, start, _, _ = self._running.pop(name)
        seconds = time.monotonic() - start
        # Also after a good end: nothing that it started is left beside a measurement.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        processes.end_marked(f"{self._mark}/{name}/")
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        log, notes = self._log(name), self._notes(name)
        if name == "machine" and status == 0:
            self._facts = _facts_in(log)
            status = 0 if self._facts else 1
        outcome = judged(part, status, seconds, log, notes, cut_by, self._stamp(part))
        self.outcomes[name] = outcome
        said = f"{name}: {outcome.status} after {outcome.seconds:.0f} s {outcome.reason}"
        self._say("\n         ".join([said.rstrip(), *outcome.lines]))

    def _say(self, line: str) -> None:
        print(f"{time.monotonic() - _STARTED:5.0f} s  {line}", flush=True)

    def _left(self) -> float:
        return self._end - time.monotonic()

    def _log(self, name: str) -> Path:
        return self.work / f"{name}.log"

    def _notes(self, name: str) -> Path:
        return self.work / f"{name}.tests.jsonl"

    def _stamp(self, part: Part) -> str:
        """Of all that an outcome depends on; what passed without the extension, which did not
        come, has not passed for good."""
        build = self.outcomes.get("build")
        has_extension = part.native and build is not None and build.status == PASSED
        return hashlib.sha256(json.dumps([self._facts, has_extension]).encode()).hexdigest()[:16]

    def _covered(self) -> list[str]:
        return [test for outcome in self.outcomes.values() for test in outcome.covered]

    def _lacking(self) -> dict[str, str]:
        """Form -> what it lacks to be a checked one; in a rehearsal nothing can be sanitized."""
        seen, lacking = self._covered(), {}
        passed = {name for name, outcome in self.outcomes.items() if outcome.status == PASSED}
        for form in plan.FORMS:
            lack = [test for test in form.tests if not is_covered(test, seen)]
            lack += [n for n in form.sanitized if n not in passed and not self.rehearsal]
            lacking[form.name] = f"not passed: {', '.join(lack)}" if lack else ""
        return lacking

    def _record_forms(self) -> None:
        """Write down the forms that have passed, and which are slower, where that has changed."""
        rows, lacking = measurements(self.out), self._lacking()
        passed = [form for form in plan.FORMS if not lacking[form.name]]
        slower = {f.name: aims.slower_text(rows, self._facts, f.op, f.impl) for f in passed}
        slower = [f"{name}={text}" for name, text in slower.items() if text]
        named = ["--passed", *(form.name for form in passed)]
        named += ["--slower", *slower] if slower else []
        if not passed or named == self._recorded_forms:
            return
        self._recorded_forms = named
        rehearse = ["--rehearse"] if self.rehearsal else []
        command = (*_CHECKED, "--out", str(self.out / FORMS), *named, *rehearse)
        self._run_stage([Part("forms", TOOL, command, 30, least=1)])

    def _publish(self, state: str) -> None:
        rows = measurements(self.out)
        text = summary.rendered(
            f"{state}, {time.monotonic() - _STARTED:.0f} of {self._seconds:.0f} s used, "
            f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} UTC",
            self._facts,
            self._names,
            self.outcomes,
            {name: time.monotonic() - each.start for name, each in self._running.items()},
            aims.figures(rows, self._facts),
            self._lacking(),
            rehearsal=self.rehearsal,
        )
        outcomes = {name: asdict(each) for name, each in (self._earlier | self.outcomes).items()}
        write_text_atomic(self.out / STATE, json.dumps(outcomes, indent=1))
        write_text_atomic(self.out / SUMMARY, text)
        write_text_atomic(self.out / LOG, _joined(map(self._log, self._names)))


def measurements(out: Path) -> list[store.Record]:
    """All that was recorded in OUT; the tests are none."""
    ops = sorted({path.stem for path in (out / "results").glob("*/*.jsonl")} - {gate.OP})
    return [row for op in ops for row in store.read(out / "results", op)]


def loaded(state: Path) -> dict[str, Outcome]:
    """Outcomes by part; none where there is no state, or one that cannot be read."""
    try:
        found = json.loads(state.read_text("utf-8"))
        return {name: Outcome(**fields) for name, fields in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _facts_in(log: Path) -> dict[str, Any]:
    """The JSON object that the machine's part printed, between whatever warnings; else {}."""
    for line in log.read_text("utf-8", "replace").splitlines():
        with suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                return found
    return {}


def _joined(logs: Iterable[Path]) -> str:
    sections = []
    for log in (log for log in logs if log.is_file()):
        said = log.read_bytes()
        if len(said) > _HEAD + _TAIL:
            said = said[:_HEAD] + b"\n[...]\n" + said[-_TAIL:]
        sections.append(f"===== {log.stem} =====\n{said.decode('utf-8', 'replace')}\n")
    return "".join(sections)


def _interrupted(number: int, frame: object) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def main(argv: Sequence[str] | None = None, stages: Sequence[Stage] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--target", choices=TARGETS, default="first")
    parser.add_argument("--rehearsal", action="store_true")
    parser.add_argument("--work", type=Path, help="default: in build/ of this checkout")
    options = parser.parse_args(argv)
    kind = "gpu-rehearsal" if options.rehearsal else "gpu-work"
    work = (options.work or store.ROOT / "build" / kind).resolve()
    out = options.out.resolve()
    if os.environ.get("FRESH") == "1":
        for folder in (work, out / "results"):
            shutil.rmtree(folder, ignore_errors=True)
        for name in (STATE, SUMMARY, LOG, FORMS):
            (out / name).unlink(missing_ok=True)
    for folder in (out, work):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            why = f"got {str(folder)!r} ({error.strerror}); name another"
            raise SystemExit(f"error: out and work must be folders, {why}") from None
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"error: another call is at work in {work}; wait for it") from None
        for number in _SIGNALS:
            signal.signal(number, _interrupted)
        default = _SECONDS_ALL * (_SLOWER_HERE if options.rehearsal else 1)
        seconds = float(os.environ.get("SECONDS_ALL") or default)
        call = Call(out, work, seconds, rehearsal=options.rehearsal)
        try:
            stages = stages or plan.stages(options.target, out, work, rehearsal=options.rehearsal)
            call.run(stages)
        except KeyboardInterrupt as signalled:
            call.close(f"cut by {signalled}")
            return 1
        except BaseException:
            call.close("cut by an error of its own")
            raise
        call.close()
    print((out / SUMMARY).read_text("utf-8"))
    statuses = {name: outcome.status for name, outcome in call.outcomes.items()}
    if statuses.get("machine", PASSED) != PASSED:
        return 2
    bad = {FAILED, CUT, SKIPPED}
    if options.rehearsal:
        # Nothing can be sanitized there.
        for part in (part for stage in stages for part in stage if part.kind == SANITIZER):
            statuses.pop(part.name, None)
    else:
        bad.add(REFUSAL)
    return 1 if bad & set(statuses.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
