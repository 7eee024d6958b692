"""`kernels`: cases after cases; each contender is checked, timed and recorded."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.harness import gate
from benchmarks.harness.cases import Case, Contender, product_name
from benchmarks.harness.progress import say
from benchmarks.harness.rates import copy_bandwidth, large_product_rate
from benchmarks.harness.session import Session, release
from benchmarks.ops import collapse, expert_importance, importance, mask, selection, unit_importance
from benchmarks.ops.measuring import Measured, check, input_sets, measured
from fastdean.kernels import interpreted

# Results file -> its cases, for a toy run or a real one.
OPERATIONS: dict[str, Callable[[bool], Iterator[Case]]] = {
    module.OP: module.cases
    for module in (importance, selection, unit_importance, expert_importance, mask, collapse)
}
BANDWIDTH = "bytes at the copy bandwidth"
_SECONDS_EACH = {"cuda": 0.1, "cpu": 0.02}
_SEED = 7


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--op", action="append", choices=list(OPERATIONS), help="may be repeated; default: all")
    said = "measure only this contender, named as in the tables; may be repeated"
    add("--impl", action="append", help=said)
    add("--toy", action="store_true", help="tiny sizes, to try the command out")


def tests(options: argparse.Namespace, on_gpu: bool) -> Sequence[str]:
    files = [test for op in options.op or OPERATIONS for test in gate.OPERATIONS[op]]
    return tuple(dict.fromkeys(files))


def require_measurable(options: argparse.Namespace) -> None:
    """Asked before any test runs, so that a mistyped name costs nothing."""
    if interpreted() and not options.toy:
        raise RuntimeError(
            "TRITON_INTERPRET must be unset where kernels are timed, got interpreted kernels, "
            "whose seconds are those of Python; unset it, or try the command out with --toy"
        )
    known: dict[str, list[Contender]] = {}
    for case in _chosen_cases(options):
        for contender in (*case.contenders, *([case.floor] if case.floor else [])):
            known.setdefault(contender.name, []).append(contender)
    device = torch.device(options.device)
    for name in options.impl or ():
        if name not in known:
            # Quoted: some names hold a comma.
            names, ops = ", ".join(map(repr, known)), ", ".join(options.op or OPERATIONS)
            raise ValueError(f"--impl must be one of {names}, got {name!r} for {ops}")
        refusals = [contender.refusal(device) for contender in known[name]]
        if all(refusals):
            raise RuntimeError(f"--impl {name!r} cannot be measured: {refusals[0]}")


def _chosen_cases(options: argparse.Namespace) -> list[Case]:
    """The first case of every operation, then the second of each: all are seen early."""
    here = ("", torch.device(options.device).type)
    groups = [
        [case for case in OPERATIONS[op](options.toy) if case.device_type in here]
        for op in options.op or OPERATIONS
    ]
    turns = itertools.zip_longest(*groups)
    return [case for turn in turns for case in turn if case is not None]


def run(session: Session) -> int:
    """Measure the chosen operations; 0, or 1 if a contender did not compute what it should."""
    cases = _chosen_cases(session.options)
    turns = [
        (case, turn)
        for turn in range(3)
        for case in cases
        if turn == 0 or any(each.turn == turn for each in case.contenders)
    ]
    measuring = _Measuring(session)
    for case, turn in session.due(turns):
        try:
            measuring.measure(case, turn)
        except torch.OutOfMemoryError:
            say(f"  {case.name}: out of memory")
        release(session.device)
    return int(session.failed)


@dataclass
class _Measuring:
    """What holds for all cases of a session; `rates`: what this machine can do, once it is asked
    for."""

    session: Session
    rates: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._device = self.session.device
        self._generator = torch.Generator(self._device).manual_seed(_SEED)

    def measure(self, case: Case, turn: int) -> None:
        """Time the case's contenders of one turn, and record the floor in the first one."""
        wanted = [c for c in case.contenders if c.turn == turn and self._is_wanted(case, c)]
        records_floor = turn == 0 and case.floor is not None and self._is_wanted(case, case.floor)
        if not wanted and not records_floor:
            return
        say(f"{case.op}: {case.name}")
        refusals = {each.name: each.refusal(self._device) for each in wanted}
        for name, reason in refusals.items():
            if reason:
                _leave_out(name, reason)
        able = [each for each in wanted if not refusals[each.name]]
        if not able and not records_floor:
            return
        if not self.rates:
            self.rates["copy_bandwidth"] = copy_bandwidth(self._device)
            self.rates["matrix_rate"] = large_product_rate(self._device, torch.bfloat16)
        sets = input_sets(case, self._generator)
        if case.floor is None:
            floor_s = case.bytes / self.rates["copy_bandwidth"]
            floor = {"floor": BANDWIDTH, "floor_s": floor_s}
        else:
            found = self._measured(case.floor, sets)
            floor = {"floor": case.floor.name, "floor_s": found.timing.seconds.median}
            if records_floor:
                self._append(case, case.floor.name, found, floor, None)
        for contender in able:
            release(self._device)
            self._measure_one(case, contender, sets, floor)

    def _is_wanted(self, case: Case, contender: Contender) -> bool:
        chosen = self.session.options.impl
        if chosen and contender.name not in chosen:
            return False
        return not self.session.earlier(case.op, {contender.name}, case.setup)

    def _measured(self, contender: Contender, sets: list) -> Measured:
        return measured(contender, sets, self._device, _SECONDS_EACH[self._device.type])

    def _measure_one(
        self, case: Case, contender: Contender, sets: list, floor: Mapping[str, Any]
    ) -> None:
        if contender.compiled:
            # Else the sizes of earlier cases use up torch.compile's limit of recompilations.
            torch._dynamo.reset()
        try:
            error = check(case, contender, self._generator)
            found = self._measured(contender, sets)
        except torch.OutOfMemoryError:
            _leave_out(contender.name, "out of memory")
        # A compiler may end in any exception there is: the others are measured all the same.
        except Exception as problem:
            self.session.failed = True
            _leave_out(contender.name, str(problem) or type(problem).__name__)
        else:
            self._append(case, contender.name, found, floor, error)

    def _append(
        self, case: Case, name: str, found: Measured, floor: Mapping[str, Any], error: float | None
    ) -> None:
        """`error`: before the timing, on other inputs: norm-wise, or the share of wrong indices;
        None for the floor, which computes something else."""
        timing = found.timing
        median = timing.seconds.median
        metrics = {
            "sets": found.sets,
            "rounds": timing.rounds,
            "timed_by": timing.timed_by,
            "device_s": found.device_s,
            "host_s": found.host_s,
            "operations": case.operations,
            "bytes": case.bytes,
            "operations_per_s": case.operations / median,
            "bytes_per_s": case.bytes / median,
            "error": error,
            "peak_bytes": found.peak_bytes,
            "product": product_name(self._device.type),
            **floor,
            "share_of_floor": floor["floor_s"] / median,
            **self.rates,
        }
        seconds = timing.seconds.record()
        self.session.append(
            case.op, case.name, name, setup=case.setup, seconds=seconds, metrics=metrics
        )


def _leave_out(name: str, reason: str) -> None:
    say(f"  {name:<24} not measured: {reason}")
