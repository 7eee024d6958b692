"""Cases after cases: skip what is recorded, check, time, append; until the time is used up."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import records
import torch
from progress import Budget, say
from records import Environment

from fastdean.kernels import interpreted
from operations.case import Contender, OpCase, product_name
from operations.catalogue import OPERATIONS
from operations.measuring import Measured, check, measured, number_of_sets, too_large
from operations.rates import Rates, measure_rates
from operations.record import BANDWIDTH, Floor, OpRecord

_SECONDS_EACH = {"cuda": 0.1, "cpu": 0.02}
_SEED = 7


def require_measurable(options: argparse.Namespace) -> None:
    """Asked before any test runs, so that a mistyped name costs nothing.

    Raises:
        ValueError: `--impl` names no contender of the chosen operations.
        RuntimeError: a contender that it names cannot run on the device, or kernels would be
            interpreted in a run that is no toy.
    """
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
            ops = ", ".join(options.op or OPERATIONS)
            raise ValueError(f"--impl must be one of {_listed(known)}, got {name!r} for {ops}")
        refusals = [contender.refusal(device) for contender in known[name]]
        if all(refusals):
            raise RuntimeError(f"--impl {name!r} cannot be measured: {refusals[0]}")


def _listed(names: Iterable[str]) -> str:
    """Quoted: some names hold a comma."""
    return ", ".join(map(repr, names))


def _chosen_cases(options: argparse.Namespace) -> list[OpCase]:
    ops = options.op or list(OPERATIONS)
    here = ("", torch.device(options.device).type)
    groups = [
        [case for case in OPERATIONS[op](options.toy) if case.device_type in here] for op in ops
    ]
    return list(_in_turns(groups))


def run_operations(
    options: argparse.Namespace, environment: Environment, budget: Budget, gate: str
) -> int:
    """Measure the chosen operations; 0, or 1 if a contender did not compute what it should."""
    device = torch.device(options.device)
    run = _Run(options, environment, device, gate)
    cases = _chosen_cases(options)
    turns = [
        (case, turn)
        for turn in range(3)
        for case in cases
        if turn == 0 or any(each.turn == turn for each in case.contenders)
    ]
    for position, (case, turn) in enumerate(turns):
        if budget.spent:
            left = len({id(case) for case, _ in turns[position:]})
            say(f"the time is used up, {left} of {len(cases)} cases left: call again with --resume")
            break
        try:
            run.measure(case, turn)
        except torch.OutOfMemoryError:
            say(f"  {case.name}: out of memory")
            _release(device)
    return 1 if run.failed else 0


def _in_turns(groups: Sequence[Sequence[OpCase]]) -> Iterator[OpCase]:
    """The first case of every operation, then the second of each: all are seen early."""
    for turn in itertools.zip_longest(*groups):
        yield from (case for case in turn if case is not None)


def recorded_key(row: Mapping[str, Any]) -> tuple:
    """What two measurements on the same code and machine, of which one will do, have in common."""
    settings = json.dumps(row["settings"], sort_keys=True)
    return (settings, *(row[name] for name in ("op", "impl", "dtype", "toy")))


@dataclass
class _Run:
    """What holds for all cases of one call of the program."""

    options: argparse.Namespace
    environment: Environment
    device: torch.device
    gate: str

    def __post_init__(self) -> None:
        self.failed = False
        self._rates: Rates | None = None
        self._generator = torch.Generator(self.device).manual_seed(_SEED)
        self._recorded = set()
        if self.options.resume:
            rows = (row for op in OPERATIONS for row in records.read(self.options.out, op))
            self._recorded = {
                recorded_key(row)
                for row in rows
                if records.stands_for(row, self.environment, self.gate)
            }

    def measure(self, case: OpCase, turn: int) -> None:
        """Time the case's contenders of one turn, and record the floor in the first one."""
        wanted = [c for c in case.contenders if c.turn == turn and self._is_wanted(case, c)]
        floor_is_due = turn == 0 and case.floor is not None and self._is_wanted(case, case.floor)
        if not wanted and not floor_is_due:
            return
        say(f"{case.op}: {case.name}")
        able = [contender for contender in wanted if self._is_able(contender)]
        if not able and not floor_is_due:
            return
        rates = self._rates_of_machine()
        count = number_of_sets(case.input_bytes, self.device)
        sets = [case.inputs(self._generator) for _ in range(count)]
        floor = self._floor(case, sets, rates, floor_is_due)
        for contender in able:
            self._measure_one(case, contender, sets, floor, rates)
        del sets
        _release(self.device)

    def _is_wanted(self, case: OpCase, contender: Contender) -> bool:
        chosen = not self.options.impl or contender.name in self.options.impl
        return chosen and not self._has(case, contender)

    def _is_able(self, contender: Contender) -> bool:
        reason = contender.refusal(self.device)
        if reason:
            _left_out(contender, reason)
        return not reason

    def _has(self, case: OpCase, contender: Contender) -> bool:
        row = {
            "op": case.op,
            "impl": contender.name,
            "dtype": case.dtype,
            "settings": case.settings,
            "toy": self.options.toy,
        }
        return recorded_key(row) in self._recorded

    def _rates_of_machine(self) -> Rates:
        if self._rates is None:
            self._rates = measure_rates(self.device, torch.bfloat16)
            say(
                f"copies at {self._rates.copy_bandwidth / 1e9:.1f} GB/s, a large bf16 product at "
                f"{self._rates.matrix_rate / 1e12:.3f} TFLOP/s"
            )
        return self._rates

    def _floor(self, case: OpCase, sets: list, rates: Rates, due: bool) -> Floor:
        """Measured anew for whatever is compared with it, and recorded once."""
        if case.floor is None:
            return Floor(BANDWIDTH, case.bytes / rates.copy_bandwidth)
        seconds = _SECONDS_EACH[self.device.type]
        found = measured(case.floor, sets, self.device, seconds)
        floor = Floor(case.floor.name, found.timing.seconds.median)
        if due:
            self._append(case, case.floor, found, floor, rates, None)
        return floor

    def _measure_one(
        self, case: OpCase, contender: Contender, sets: list, floor: Floor, rates: Rates
    ) -> None:
        _release(self.device)
        reason = too_large(contender, self.device)
        if reason:
            _left_out(contender, reason)
            return
        if contender.compiled:
            # Else the sizes of earlier cases use up torch.compile's limit of recompilations.
            torch._dynamo.reset()
        try:
            error = check(case, contender, self._generator)
            found = measured(contender, sets, self.device, _SECONDS_EACH[self.device.type])
        except torch.OutOfMemoryError:
            _left_out(contender, "out of memory")
        # A compiler may end in any exception there is: the others are measured all the same.
        except Exception as problem:
            self.failed = True
            _left_out(contender, str(problem) or type(problem).__name__)
        else:
            self._append(case, contender, found, floor, rates, error)
        _release(self.device)

    def _append(
        self,
        case: OpCase,
        contender: Contender,
        found: Measured,
        floor: Floor,
        rates: Rates,
        error: float | None,
    ) -> None:
        row = OpRecord.of(
            case,
            contender,
            found,
            floor,
            rates,
            sets=found.sets,
            error=error,
            product=product_name(self.device.type),
            toy=self.options.toy,
            gate=self.gate,
        )
        records.append(self.options.out, case.op, self.environment, row)
        busy = "" if row.device_s is None else f", device busy {row.device_s * 1e3:.3f} ms"
        say(
            f"  {row.impl:<24} {row.median_s * 1e3:10.3f} ms  {row.median_s / row.floor_s:6.2f}x "
            f"the floor  ({row.timed_by}{busy})"
        )


def _left_out(contender: Contender, reason: str) -> None:
    say(f"  {contender.name:<24} not measured: {reason}")


def _release(device: torch.device) -> None:
    if device.type != "cuda":
        return
    try:
        torch.cuda.empty_cache()
    except RuntimeError as problem:
        # What is held is held: nothing that was measured is lost over it.
        say(f"  the allocator keeps its memory: {problem}")
