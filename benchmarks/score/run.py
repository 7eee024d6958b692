"""`run.py score`: three or four ways to the same sums, taking turns in one process."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import breakdown
import inputs
import measure
import records
import torch
from baselines import vmap_chunk
from cases import Case, Implementation, score_case
from measure import Floor, Outcome, Problem, attempt
from progress import Budget, say
from records import Environment, LeftOutRecord, Record, ScoreRecord
from subject import Subject, load_subject
from torch import nn

from fastdean.data import Example
from fastdean.targets import find_targets

# Largest norm-wise difference between the sums of two implementations; published ones are bf16.
# In fp32 it is torch's own cross-entropy on a CPU that is off, by 1.6e-4 at a vocabulary of 49k.
_MAY_DIFFER = {"fp32": 1e-3, "bf16": 1e-1}
_CHECKED_EXAMPLES = 2
_OURS = "fastdean"
IMPLEMENTATIONS = ("published", "loop", "vmap", _OURS)
_NO_ROOM = Problem("the gradients of two examples do not fit into the free memory", failed=False)


def run_score(
    options: argparse.Namespace, environment: Environment, budget: Budget, gate: str
) -> int:
    """Measure every dtype, print as it goes, append one record per implementation and dtype.

    An implementation that runs out of memory or fails is named, and the others are measured; 1 if
    one failed.
    """
    # fp32 first: casting down keeps what casting up cannot bring back.
    dtypes = sorted(set(options.dtype or inputs.DTYPES), key=list(inputs.DTYPES).index)
    failed = False
    if options.resume:
        earlier = {dtype: _earlier_run(options, environment, dtype, gate) for dtype in dtypes}
        dtypes = [dtype for dtype in dtypes if not earlier[dtype]]
        for row in itertools.chain.from_iterable(earlier.values()):
            failed |= bool(row.get("failed"))
            if "reason" in row:
                say(f"{row['impl']}, {row['dtype']}: not measured: {row['reason']}")
    if not dtypes or budget.spent:
        say("nothing left to measure" if not dtypes else "the time is used up: call again")
        return int(failed)
    subject = load_subject(options, dtypes[0])
    bandwidth = measure.copy_bandwidth(torch.device(options.device))
    run = _Run(options, environment, gate, subject, bandwidth)
    for dtype in dtypes:
        run.measure(dtype)
    return int(failed or run.failed)


def _earlier_run(
    options: argparse.Namespace, environment: Environment, dtype: str, gate: str
) -> list[Record]:
    """What the same command said of `dtype` on the same code and machine; [] if it was cut off.

    Records of one call of the program belong together: what took turns can be compared.
    """
    rows = [
        row
        for op in ("score", "left_out")
        for row in records.read(options.out, op)
        if row["op"] == "score"
        and row["dtype"] == dtype
        and row["command"] == environment.command
        and records.stands_for(row, environment, gate)
    ]
    wanted = _wanted(options)
    for run in records.grouped(rows, ("date",)):
        measured = {row["impl"] for row in run if "reason" not in row}
        if _OURS in measured and wanted <= {row["impl"] for row in run}:
            return run
    return []


def _wanted(options: argparse.Namespace) -> set[str]:
    """The implementations asked for; ours always, since the others are compared with it."""
    if options.impl:
        return {*options.impl, _OURS}
    return {"published", "loop", _OURS, *(["vmap"] if options.vmap else [])}


@dataclass
class _Run:
    """What holds for all dtypes of one call of the program."""

    options: argparse.Namespace
    environment: Environment
    gate: str
    subject: Subject
    bandwidth: float
    failed: bool = False

    def __post_init__(self) -> None:
        self._device = torch.device(self.options.device)

    def measure(self, dtype: str) -> None:
        model = self.subject.model
        inputs.cast_parameters_(model, inputs.DTYPES[dtype])
        examples = self.subject.examples(examples_in(self.options, dtype))
        chunk = vmap_examples(self.options, model)
        case = score_case(
            model,
            examples,
            target_modules=self.options.targets,
            layers=self.options.layers,
            vmap_examples=chunk,
            name=f"{self.subject.name}, {self.options.targets}",
        )
        wanted = _wanted(self.options)
        chosen = [each for each in case.implementations if each.name in wanted]
        case = replace(case, implementations=tuple(chosen))
        if "vmap" in wanted and not chunk:
            self._leave_out(case, "vmap", dtype, _NO_ROOM)
        problems = require_same_sums(case, examples[:_CHECKED_EXAMPLES], dtype, self._device)
        for name, problem in problems.items():
            self._leave_out(case, name, dtype, problem)
        able = [each for each in case.implementations if each.name not in problems]
        rows = list(self._measured(case, able, examples, dtype))
        print(_render(rows))
        for row in rows:
            if row.breakdown is not None:
                print(f"\n{row.impl}, {dtype}: share of one profiled run")
                print(breakdown.render(row.breakdown))

    def _measured(
        self,
        case: Case,
        implementations: Sequence[Implementation],
        examples: Sequence[Example],
        dtype: str,
    ) -> Iterator[ScoreRecord]:
        """Appends each record as soon as its implementation has had its last turn."""
        floor = self._floor(case, dtype)
        say(
            f"{dtype}: {len(examples)} examples, {case.work.tokens} tokens; products run at "
            f"{floor.matrix_rate / 1e9:.1f} GFLOP/s, copies at {self.bandwidth / 1e9:.1f} GB/s; "
            f"floor {floor.seconds:.2f} s"
        )
        outcomes = measure.interleaved(
            implementations, examples, self.options.repeats, self._device, say
        )
        floors = [floor]
        for outcome in outcomes:
            name = outcome.implementation.name
            if outcome.problem is not None:
                self._leave_out(case, name, dtype, outcome.problem)
                continue
            if len(floors) == 1:
                # Before and after: a machine that was busy once must not raise the floor.
                floors.append(self._floor(case, dtype))
            floor = min(floors, key=lambda each: each.seconds)
            row = self._record(case, outcome, examples, floor, dtype)
            path = records.append(self.options.out, "score", self.environment, row)
            say(f"  {name}: appended to {path.parent.name}/{path.name}")
            yield row

    def _floor(self, case: Case, dtype: str) -> Floor:
        return floor_now(case, dtype, self._device, self.bandwidth)

    def _record(
        self,
        case: Case,
        outcome: Outcome,
        examples: Sequence[Example],
        floor: Floor,
        dtype: str,
    ) -> ScoreRecord:
        profiled = self.options.profile and outcome.implementation.name == _OURS
        run = partial(outcome.implementation.run, examples)
        return ScoreRecord.of(
            case,
            outcome.implementation,
            outcome.samples,
            floor,
            dtype=dtype,
            model=self.subject.name,
            examples=len(examples),
            breakdown=self._profiled(run) if profiled else None,
            gate=self.gate,
        )

    def _profiled(self, run: Callable[[], Any]) -> dict[str, float] | None:
        found, problem = attempt(lambda: breakdown.profile(run, self._device), self._device)
        if found is None:
            seen = "the profiler sees no kernels" if problem is None else problem.reason
            say(f"  no breakdown: {seen}")
        return found

    def _leave_out(self, case: Case, name: str, dtype: str, problem: Problem) -> None:
        # Without our own there is nothing to compare, whatever the reason.
        self.failed |= problem.failed or name == _OURS
        say(f"  {name:<10} not measured: {problem.reason}")
        row = LeftOutRecord(
            case.op, case.name, name, dtype, problem.reason, problem.failed, self.gate
        )
        records.append(self.options.out, "left_out", self.environment, row)


def examples_in(options: argparse.Namespace, dtype: str) -> int:
    if dtype == "bf16" and options.bf16_examples is not None:
        return options.bf16_examples
    return options.examples


def vmap_examples(options: argparse.Namespace, model: nn.Module) -> int:
    """0 unless vmap was asked for and the gradients of two examples fit into the memory."""
    if not options.vmap:
        return 0
    weights = [target.module.weight for target in find_targets(model, options.targets)]
    chunk = min(options.examples, vmap_chunk(weights))
    if chunk < 2:
        return 0
    say(f"vmap: the gradients of {chunk} examples at a time")
    return chunk


def require_same_sums(
    case: Case, examples: Sequence[Example], dtype: str, device: torch.device
) -> dict[str, Problem]:
    """Run everything once on a few examples: a warm-up, and what does not agree is not timed.

    Returns:
        Of each implementation that could not run its name and why.
    Raises:
        RuntimeError: two implementations disagree, or fastdean could not run.
    """
    *others, ours = case.implementations
    expected, problem = attempt(lambda: ours.run(examples), device)
    if problem is not None:
        raise RuntimeError(
            f"{ours.name} must run on {len(examples)} examples, got {problem.reason}; "
            "there is nothing to time before it does"
        )
    problems = {}
    for each in others:
        # One after the other: at 7B the sums of all of them together would not fit.
        sums, problem = attempt(lambda run=each.run: run(examples), device)
        if problem is not None:
            problems[each.name] = problem
            continue
        for parameter, value in sums.items():
            reference = expected[parameter].double()
            error = float((value.double() - reference).norm() / reference.norm())
            if not error <= _MAY_DIFFER[dtype]:
                raise RuntimeError(
                    f"{each.name} and fastdean must compute the same sums to "
                    f"{_MAY_DIFFER[dtype]:g}, got {error:.2g} in {parameter}; "
                    "there is nothing to time before they do"
                )
        del sums
    return problems


def floor_now(case: Case, dtype: str, device: torch.device, bandwidth: float) -> Floor:
    rate = measure.matrix_rate(case.shapes, inputs.DTYPES[dtype], device)
    return Floor(case.work.operations, case.work.bytes, rate, bandwidth)


def _render(rows: Sequence[ScoreRecord]) -> str:
    median = {row.impl: row.median_s for row in rows}
    lines = [
        f"{'':<10} {'median':>10} {'p20':>10} {'p80':>10} {'tokens/s':>9} {'x loop':>7} "
        f"{'x publ.':>8} {'peak':>10} {'floor/time':>10}"
    ]
    for row in rows:
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f} MB"
        note = f"  extrapolated from {row.extrapolated}" if row.extrapolated else ""
        lines.append(
            f"{row.impl:<10} {row.median_s:8.2f} s {row.p20_s:8.2f} s {row.p80_s:8.2f} s "
            f"{row.tokens_per_s:9.1f} {_times(median.get('loop'), row):>7} "
            f"{_times(median.get('published'), row):>8} {peak:>10} "
            f"{row.share_of_floor:10.1%}{note}"
        )
    return "\n".join(lines)


def _times(seconds: float | None, row: ScoreRecord) -> str:
    """How many times as long as `row` something takes, as far as it was measured."""
    return "-" if seconds is None else f"{seconds / row.median_s:.2f}"
