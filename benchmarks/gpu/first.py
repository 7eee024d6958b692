"""What is to be learned from a GPU, most worth first, within ten minutes and whatever cuts them.

    python3 -m benchmarks.gpu.first OUT [--target first|check|sanitize|bench] [--rehearsal]

`plan.py` says which parts there are. Each is a process of its own with a limit of its own, and what
came of it is written as it ends: one that fails, hangs or dies takes itself out and what rests on
it, nothing else. Tests run beside each other, nothing runs beside a measurement. OUT gets the files
that `carried.py` lists; logs and builds lie in `build/gpu-...`. A second call goes on where the
first one ended: what has passed with the same sources, versions and GPU is not run again.

SECONDS_ALL is what all parts may take together (default 560: ten minutes less a margin), counted
from the start of the command; what no longer fits is not started and said so. FRESH=1 forgets what
earlier calls have found. `--rehearsal` runs the same parts where there is no GPU.

The status is 0 if everything has passed, 1 if not, 2 if this machine lacks something.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.gpu import aims, carried, summary
from benchmarks.gpu.outcomes import CUT, FAILED, PASSED, REFUSAL, SKIPPED, Outcome, judged
from benchmarks.gpu.plan import FORMS, RECORDS, SANITIZER, TARGETS, TOOL, Part, parts_of
from benchmarks.gpu.processes import Keeper, Running
from benchmarks.harness import gate
from benchmarks.harness.gate import is_covered

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# Share of the time, and seconds at most, for the files that are written last.
_MARGIN, _MOST_MARGIN_S = 0.1, 5.0
_FORMS_PART = Part("forms", TOOL, 30)
_CHECKED = ("-m", "fastdean.ops.checked")
# What is running may write records and notes in between.
_PUBLISH_EVERY_S = 5
_TURN_S = 0.1
# Made anew by every call: what they find is not in the files.
_ALWAYS = ("machine", "build")
_FACTS = "facts.json"
# Ten minutes less a margin; a rehearsal interprets the kernels, in Python and on few processors.
_SECONDS_ALL, _SLOWER_HERE = 560, 10


class Session:
    """One call of the program: parts that wait, run and have ended."""

    def __init__(
        self, parts: Sequence[Part], out: Path, work: Path, *, seconds: float, rehearsal: bool
    ) -> None:
        self.parts, self.out, self.work = list(parts), out, work
        self.rehearsal = rehearsal
        self._seconds = seconds
        self._end = _STARTED + seconds - min(_MOST_MARGIN_S, _MARGIN * seconds)
        self._cores = os.cpu_count() or 1
        self._keeper = Keeper()
        self._running: dict[str, tuple[Part, Running]] = {}
        self._limits: dict[str, str] = {}
        self._facts: dict[str, str] = {}
        self._recorded_forms: tuple[str, ...] = ()
        self._all_measured = False
        self._published = 0.0
        carried.adopt(out, work)
        self._earlier = carried.load(work / carried.STATE)
        # What this call asks for is known again once it is clear on what machine it runs.
        self.outcomes: dict[str, Outcome] = {}

    def run(self) -> None:
        waiting = list(self.parts)
        self._publish("started")
        while waiting or self._running:
            self._collect()
            for part in self._startable(waiting):
                waiting.remove(part)
                self._begin(part)
            if time.monotonic() - self._published > _PUBLISH_EVERY_S:
                self._publish("under way")
            time.sleep(_TURN_S)
        self._all_measured = True
        self._record_forms()
        while self._running:
            self._collect()
            time.sleep(_TURN_S)
        self._publish("ended")

    def close(self, why: str = "") -> None:
        """End what runs; with `why`, what was cut by it."""
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        for name, (part, running) in list(self._running.items()):
            running.stop()
            self._ended(name, part, running, None, why)
        self._keeper.close()
        if why:
            self._publish(why)

    def _startable(self, waiting: list[Part]) -> Iterator[Part]:
        """What may start now, one after the other; what cannot start at all is crossed out."""
        for part in list(waiting):
            if any(running.alone for running, _ in self._running.values()):
                return
            if self._left() <= 0:
                waiting.remove(part)
                self._skip(part, "no time was left")
                continue
            before = {*part.after, *part.needs}
            missing = {name for name in before if name not in self.outcomes}
            # A part that measures waits for all before it, and all after it wait for it.
            ready = not missing and not (part.alone and self._running)
            if not ready:
                if part.alone:
                    return
                continue
            known = self._known(part)
            if known is not None:
                waiting.remove(part)
                self.outcomes[part.name] = known
                continue
            lack = self._lack(part)
            if lack:
                waiting.remove(part)
                self._skip(part, lack)
                continue
            if self._running and self._weight() + self._workers(part) > self._cores:
                return
            yield part

    def _known(self, part: Part) -> Outcome | None:
        """What an earlier call has found, where it passed and nothing has changed."""
        earlier = self._earlier.get(part.name)
        if part.name in _ALWAYS or earlier is None or earlier.status != PASSED:
            return None
        return earlier if earlier.stamp == self._stamp(part) else None

    def _lack(self, part: Part) -> str:
        """Why a part cannot start; "" if it can."""
        for name in part.needs:
            if self.outcomes[name].status != PASSED:
                return f"{name} has not passed: {self.outcomes[name].status}"
        seen = self._covered()
        missing = [test for test in part.needs_tests if not is_covered(test, seen)]
        if missing:
            return f"tests have not passed: {', '.join(missing)}"
        if self._left() < part.least:
            return f"{self._left():.0f} s were left, and it takes at least {part.least}"
        return ""

    def _left(self) -> float:
        return self._end - time.monotonic()

    def _weight(self) -> int:
        return sum(self._workers(part) for part, _ in self._running.values())

    def _workers(self, part: Part) -> int:
        if part.workers == 1 or importlib.util.find_spec("xdist") is None:
            return 1
        return min(part.workers, max(2, self._cores // 3))

    def _begin(self, part: Part) -> None:
        limit = part.limit * (_SLOWER_HERE if self.rehearsal else 1)
        cut_by = f"its limit of {limit} s"
        if self._left() < limit:
            limit, cut_by = self._left(), "the end of the time for all parts"
        self._limits[part.name] = cut_by
        self._notes(part.name).unlink(missing_ok=True)
        if part.name == "machine":
            (self.work / _FACTS).unlink(missing_ok=True)
        if part.kind == RECORDS:
            self._write_gate()
        print(f"{time.monotonic() - _STARTED:5.0f} s  {part.name}: started", flush=True)
        running = Running(
            self._command(part, limit),
            self._keeper,
            log=self._log(part.name),
            limit=limit,
            cwd=ROOT,
            environment=self._environment(part),
        )
        self._running[part.name] = (part, running)

    def _collect(self) -> None:
        for name, (part, running) in list(self._running.items()):
            status = running.poll()
            cut = status is None and running.seconds > running.limit
            if status is None and not cut:
                continue
            # Also after a good end: nothing that it started is left beside a measurement.
            running.stop()
            self._ended(name, part, running, status, self._limits[name] if cut else "")
            self._publish("under way")
            self._record_forms()

    def _ended(
        self, name: str, part: Part, running: Running, status: int | None, cut_by: str
    ) -> None:
        del self._running[name]
        if name == "machine" and status == 0:
            self._facts = self._read_facts()
            status = 0 if self._facts else 1
        logs = self._log(name), self._notes(name)
        outcome = judged(part, status, running.seconds, *logs, cut_by, self._stamp(part))
        self.outcomes[name] = outcome
        print(
            f"{time.monotonic() - _STARTED:5.0f} s  {name}: {outcome.status} after "
            f"{outcome.seconds:.0f} s {outcome.reason}".rstrip(),
            flush=True,
        )
        for line in outcome.lines:
            print(f"         {line}", flush=True)

    def _read_facts(self) -> dict[str, str]:
        try:
            found = json.loads((self.work / _FACTS).read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _skip(self, part: Part, reason: str) -> None:
        self.outcomes[part.name] = Outcome(SKIPPED, reason=reason)
        print(f"{time.monotonic() - _STARTED:5.0f} s  {part.name}: not started: {reason}")

    def _command(self, part: Part, limit: float) -> list[str]:
        python = sys.executable
        if part.kind == TOOL:
            script, *arguments = part.arguments
            if part.name == "machine":
                arguments = [str(self.work / _FACTS)]
                arguments += ["--rehearsal"] if self.rehearsal else []
            elif part.name == "build":
                arguments = [str(self.work / "extension")]
            script = script if script.startswith("-") else str(HERE / script)
            return [python, script, *arguments]
        if part.kind == RECORDS:
            chosen = part.rehearsed if self.rehearsal else part.arguments
            device = ["cpu", "--rehearsal"] if self.rehearsal else ["cuda"]
            # A case that has started is finished.
            seconds = max(1.0, min(part.seconds, limit - 15))
            where = ["--out", str(self.work / "results"), "--resume", "--tested"]
            limits = ["--seconds", f"{seconds:.0f}"]
            return [python, "-m", "benchmarks", *chosen, "--device", *device, *where, *limits]
        options = ["-q", "--tb=short", "--durations=5", "-p", "no:cacheprovider"]
        options += ["-p", "benchmarks.gpu.watched_tests", "-o", "faulthandler_timeout=60"]
        if part.kind == SANITIZER:
            options += ["-k", "not reference"]
            return [python, str(HERE / "sanitized.py"), part.tool, *options, *part.tests]
        if self.rehearsal:
            options += ["-p", "benchmarks.gpu.interpreted"]
        if self._workers(part) > 1:
            options += ["-p", "xdist.plugin", "-n", str(self._workers(part))]
        return [python, "-m", "pytest", *options, *part.tests]

    def _environment(self, part: Part) -> dict[str, str]:
        found = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "FASTDEAN_WATCHED_TESTS": str(self._notes(part.name)),
            # What else is installed there must not change how tests run.
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        }
        found.pop("FASTDEAN_REQUIRE_GPU", None)
        if part.kind == RECORDS:
            found.pop("TRITON_INTERPRET", None)
        elif not self.rehearsal:
            found["FASTDEAN_REQUIRE_GPU"] = "1"
        return found

    def _log(self, name: str) -> Path:
        return self.work / f"{name}.log"

    def _notes(self, name: str) -> Path:
        return self.work / f"{name}.tests.jsonl"

    def _stamp(self, part: Part) -> str:
        """Of all that an outcome depends on; what waited for an extension that did not come, and
        passed without it, has not passed for good."""
        build = self.outcomes.get("build")
        native = "build" not in part.after or (build is not None and build.status == PASSED)
        return hashlib.sha256(json.dumps([self._facts, native]).encode()).hexdigest()[:16]

    def _covered(self) -> list[str]:
        return [test for outcome in self.outcomes.values() for test in outcome.covered]

    def _write_gate(self) -> None:
        """Tell the benchmarks which tests have passed, in the form they write themselves."""
        path = self.work / "results" / "tests" / f"{gate.OP}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        row = gate.seen_to_pass(self._covered(), self._facts)
        carried.put(path, json.dumps(asdict(row)) + "\n")

    def _lacking(self) -> dict[str, str]:
        """Form -> what it lacks to be a checked one; in a rehearsal nothing can be sanitized."""
        seen = self._covered()
        passed = {name for name, outcome in self.outcomes.items() if outcome.status == PASSED}
        found = {}
        for form in FORMS:
            lack = [test for test in form.tests if not is_covered(test, seen)]
            lack += [] if self.rehearsal else [n for n in form.sanitized if n not in passed]
            found[form.name] = f"not passed: {', '.join(lack)}" if lack else ""
        return found

    def _record_forms(self) -> None:
        """Write the forms that have passed, as soon as there are more; at last with their speed."""
        passed = tuple(name for name, lack in self._lacking().items() if not lack)
        named = (*passed, *(self._slower(passed) if self._all_measured else ()))
        if not passed or named == self._recorded_forms or "forms" in self._running:
            return
        if any(part.alone for part, _ in self._running.values()) or self._left() < 1:
            return
        self._recorded_forms = named
        arguments = [*_CHECKED, "--out", str(self.work / carried.FORMS)]
        arguments += ["--passed", *passed]
        slower = named[len(passed) :]
        arguments += ["--slower", *slower] if slower else []
        arguments += ["--rehearse"] if self.rehearsal else []
        (self.work / carried.FORMS).unlink(missing_ok=True)
        self._begin(replace(_FORMS_PART, arguments=tuple(arguments)))

    def _slower(self, passed: Sequence[str]) -> list[str]:
        rows = list(carried.rows_of(self.work / "results"))
        found = {
            form.name: aims.slower_than_the_reference(rows, self._facts, form.op, form.ours)
            for form in FORMS
            if form.name in passed
        }
        return [f"{name}={figure}" for name, figure in found.items() if figure]

    def _publish(self, state: str) -> None:
        self._published = time.monotonic()
        results = self.work / "results"
        ran = f"{self._published - _STARTED:.0f} of {self._seconds:.0f} s"
        shown = summary.rendered(
            f"{state}, {ran} used, {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} UTC",
            self._facts,
            [*self.parts, _FORMS_PART],
            self.outcomes,
            {name: running.seconds for name, (_, running) in self._running.items()},
            aims.figures(carried.rows_of(results), self._facts),
            self._lacking(),
            rehearsal=self.rehearsal,
        )
        kept = {name: each for name, each in self._earlier.items() if name not in self.outcomes}
        carried.save(self.work / carried.STATE, kept | self.outcomes)
        carried.put(self.out / carried.SUMMARY, shown)
        carried.put(self.out / carried.STATE, (self.work / carried.STATE).read_text("utf-8"))
        carried.put(self.out / carried.RECORDS, carried.packed(results))
        names = [*(part.name for part in self.parts), "forms"]
        carried.put(self.out / carried.LOG, carried.joined_logs(self.work, names))
        forms = self.work / carried.FORMS
        if forms.is_file() and "forms" not in self._running:
            carried.put(self.out / carried.FORMS, forms.read_text("utf-8"))


_STARTED = time.monotonic()
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def _only_one(work: Path) -> Iterator[None]:
    with (work / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"error: another call is at work in {work}; wait for it") from None
        yield


def _interrupted(number: int, frame: object) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def main(argv: Sequence[str] | None = None, parts: Sequence[Part] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--target", choices=TARGETS, default="first")
    parser.add_argument("--rehearsal", action="store_true")
    parser.add_argument("--work", type=Path, help="default: in build/ of this checkout")
    options = parser.parse_args(argv)
    kind = "gpu-rehearsal" if options.rehearsal else "gpu-work"
    work = (options.work or ROOT / "build" / kind).resolve()
    out = options.out.resolve()
    if os.environ.get("FRESH") == "1":
        shutil.rmtree(work, ignore_errors=True)
        for name in carried.FILES:
            (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    for number in _SIGNALS:
        signal.signal(number, _interrupted)
    default = _SECONDS_ALL * (_SLOWER_HERE if options.rehearsal else 1)
    seconds = float(os.environ.get("SECONDS_ALL") or default)
    with _only_one(work):
        session = Session(
            parts or parts_of(options.target),
            out,
            work,
            seconds=seconds,
            rehearsal=options.rehearsal,
        )
        try:
            session.run()
        except KeyboardInterrupt as signalled:
            session.close(f"cut by {signalled}")
            return 1
        except BaseException:
            session.close("cut by an error of its own")
            raise
        session.close()
    print((out / carried.SUMMARY).read_text("utf-8"))
    statuses = {name: outcome.status for name, outcome in session.outcomes.items()}
    if statuses.get("machine", PASSED) != PASSED:
        return 2
    # Where nothing can be sanitized and little is measured, that is no failure.
    bad = {FAILED, CUT} if options.rehearsal else {FAILED, CUT, SKIPPED, REFUSAL}
    return 1 if bad & set(statuses.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
