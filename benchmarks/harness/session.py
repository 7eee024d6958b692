"""One call of a benchmark: what is recorded already, contenders in turn, records as they come."""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.harness import store
from benchmarks.harness.clock import Spread
from benchmarks.harness.store import Record, say

Unit = TypeVar("Unit")


@dataclass(frozen=True)
class Sample:
    """One turn of a contender.

    Attributes:
        peak_bytes: memory above what was held before; None where it is not counted.
        process_peak_bytes: the most that a process of its own ever held.
    """

    seconds: float
    peak_bytes: int | None = None
    process_peak_bytes: int | None = None


@dataclass(frozen=True)
class Problem:
    """Why there is no measurement. `failed`: it is a mistake; not having the memory is not one."""

    reason: str
    failed: bool = False


@dataclass
class Session:
    """What holds for all cases of one call of the program.

    Attributes:
        environment: of all its records.
        gate: what they say of the tests.
        end: `time.monotonic()` after which no case starts; None: whenever it is done.
        failed: whether something did not compute what it should.
    """

    options: argparse.Namespace
    environment: dict[str, Any]
    gate: str
    end: float | None = None
    failed: bool = False
    _read: dict[str, list[Record]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return torch.device(self.options.device)

    @property
    def toy(self) -> bool:
        return getattr(self.options, "toy", False)

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """A new folder in `--folder`, removed with all that is in it."""
        with tempfile.TemporaryDirectory(
            prefix=f"fastdean-{name}-", dir=self.options.folder
        ) as folder:
            yield Path(folder)

    def due(self, units: Sequence[Unit], name: str = "cases") -> Iterator[Unit]:
        """The units one after the other, until the time is used up; says what is left."""
        if not units:
            say("nothing left to measure")
        for position, unit in enumerate(units):
            if self.end is not None and time.monotonic() >= self.end:
                left = f"{len(units) - position} of {len(units)} {name} left"
                say(f"the time is used up, {left}: call again with --resume")
                return
            yield unit

    def earlier(
        self,
        op: str,
        contenders: set[str],
        setup: Mapping[str, Any],
        *,
        without_problem: str = "",
        same_command: bool = False,
    ) -> list[Record]:
        """What one earlier call of the program said of all these contenders; [] if none did, or
        without --resume. What took turns in one call can be compared.

        Args:
            setup: what their records have to hold, and maybe more.
            without_problem: the contender that has to have been measured; of the others one that
                could not be is not tried again.
            same_command: whether the call has to have been this one.
        """
        if not self.options.resume:
            return []
        if op not in self._read:
            rows = store.read(self.options.out, op)
            self._read[op] = [r for r in rows if store.stands_for(r, self.environment, self.gate)]
        rows = [
            row
            for row in self._read[op]
            if row.toy == self.toy
            and (row.problem is None or row.contender != without_problem)
            and all(row.setup.get(name) == value for name, value in setup.items())
            and (not same_command or row["command"] == self.environment["command"])
        ]
        runs = store.grouped(rows, ("date",))
        return next((run for run in runs if contenders <= {row.contender for row in run}), [])

    def append(self, op: str, case: str, contender: str, **parts: Any) -> Record:
        """Write one record down; `parts`: the other fields of one."""
        row = Record(
            op, case, contender, toy=self.toy, gate=self.gate, environment=self.environment, **parts
        )
        store.append(self.options.out, row)
        say(f"  {contender:<24} {_said(row)}")
        return row

    def append_turns(
        self,
        op: str,
        case: str,
        contender: str,
        samples: Sequence[Sample],
        setup: Mapping[str, Any],
        metrics: Mapping[str, Any],
    ) -> Record:
        """Write down what a contender's turns on the "tokens" of the setup took.

        `metrics`: what is known besides, maybe the "floor_s".
        """
        seconds = seconds_of(samples)
        found = {"peak_bytes": most([sample.peak_bytes for sample in samples]), **metrics}
        found["tokens_per_s"] = setup["tokens"] / seconds["median_s"]
        if "floor_s" in found:
            found["share_of_floor"] = found["floor_s"] / seconds["median_s"]
        setup = {**setup, "repeats": len(samples)}
        return self.append(op, case, contender, setup=setup, seconds=seconds, metrics=found)


def _said(row: Record) -> str:
    if row.problem is not None:
        return f"not measured: {row.problem['reason']}"
    if not row.seconds:
        return "recorded"
    unit, scale = ("s", 1) if row["median_s"] >= 1 else ("ms", 1e3)
    median, p20, p80 = (scale * each for each in row.spread)
    floor_s, timed_by = row.metrics.get("floor_s"), row.metrics.get("timed_by")
    floor = f", {row['median_s'] / floor_s:.2f}x the floor" if floor_s else ""
    by = f", by {timed_by}" if timed_by else ""
    return f"{median:10.3f} {unit} ({p20:.3f} to {p80:.3f}){floor}{by}"


def attempt(call: Callable[[], Any], device: torch.device) -> tuple[Any, Problem | None]:
    """(result, None), or (None, problem): what one of several cannot do, others may."""
    try:
        return call(), None
    except torch.OutOfMemoryError:
        problem = Problem("out of memory")
    # A transform of a model's code, or a compiler, may end in any exception there is.
    except Exception as error:
        first_line, *_ = str(error).splitlines() or [""]
        problem = Problem(f"{type(error).__name__}: {first_line}", failed=True)
    # Only here, past the handler, is what the frames of the call held free.
    gc.collect()
    release(device)
    return None, problem


def release(device: torch.device) -> None:
    """Let go of the memory that torch's allocator keeps."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.empty_cache()
    except RuntimeError as problem:
        # Nothing that was measured is lost over it.
        say(f"  the allocator keeps its memory: {problem}")


def take_turns(
    contenders: Mapping[str, Callable[[], Sample]],
    rounds: int,
    *,
    warm_up: int = 0,
    forgiving: torch.device | None = None,
) -> Iterator[tuple[str, list[Sample], Problem | None]]:
    """A B C A B C: a machine that slows down or speeds up does so for all of them.

    Yields each as soon as it is done: after its last turn, or at its first error.

    Args:
        warm_up: rounds before the first that counts.
        forgiving: the device on which the others go on where one fails; None: no error is caught.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in contenders}
    for number in range(1 - warm_up, rounds + 1):
        for name, run in contenders.items():
            if name not in samples:
                continue
            sample, problem = (run(), None) if forgiving is None else attempt(run, forgiving)
            if problem is not None:
                del samples[name]
                yield name, [], problem
                continue
            if number > 0:
                samples[name].append(sample)
                say(f"  {number}/{rounds}  {name:<16} {sample.seconds:9.3f} s")
            if number == rounds:
                yield name, samples[name], None


def seconds_of(samples: Sequence[Sample]) -> dict[str, Any]:
    """As the field of a record."""
    rounds = [sample.seconds for sample in samples]
    return {**Spread.of(rounds).record(), "rounds_s": rounds}


def most(values: Sequence[int | None]) -> int | None:
    """None where one of them is not known."""
    return None if None in values else max(values)
