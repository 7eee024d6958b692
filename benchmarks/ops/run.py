"""`kernels`: each operation by itself at the shapes of Qwen2-7B, against plain torch and a floor.

Cases after cases; each contender is checked, timed and recorded.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from benchmarks.harness import command, gate
from benchmarks.harness.cases import Case, Contender, product_name
from benchmarks.harness.clock import Spread
from benchmarks.harness.rates import copy_bandwidth, large_product_rate
from benchmarks.harness.session import Session, release
from benchmarks.harness.store import say
from benchmarks.ops import collapse, importance, mask, select_importance, selection, unit_importance
from benchmarks.ops.measuring import check, input_sets, measured
from fastdean.kernels import interpreted

# Results file -> its cases, for a toy run or a real one.
OPERATIONS: dict[str, Callable[[bool], Iterator[Case]]] = {
    "importance": importance.cases,
    "selection": selection.cases,
    "unit_importance": unit_importance.cases,
    "expert_importance": importance.expert_cases,
    "select_importance": select_importance.cases,
    "mask": mask.cases,
    "collapse": collapse.cases,
}
BANDWIDTH = "bytes at the copy bandwidth"
_SECONDS_EACH = {"cuda": 0.1, "cpu": 0.02}
_SEED = 7


def add_options(parser: argparse.ArgumentParser) -> None:
    add, several = parser.add_argument, {"action": "append"}
    said = f"one of {', '.join(OPERATIONS)}; may be repeated; default: all"
    add("--op", **several, choices=list(OPERATIONS), metavar="OP", help=said)
    toys = [case for cases in OPERATIONS.values() for case in cases(True)]
    names = {each.name for case in toys for each in (case.floor, *case.contenders) if each}
    said = f"only this contender, named as in the tables; may be repeated; of {sorted(names)}"
    add("--impl", **several, choices=sorted(names), metavar="NAME", help=said)
    command.toy(parser)


def tests(options: argparse.Namespace, on_gpu: bool) -> Sequence[str]:
    files = [test for op in options.op or OPERATIONS for test in gate.OPERATIONS[op]]
    return tuple(dict.fromkeys(files))


def require(options: argparse.Namespace) -> None:
    if interpreted() and not options.toy:
        raise RuntimeError(
            "TRITON_INTERPRET must be unset where kernels are timed, got interpreted kernels, "
            "whose seconds are those of Python; unset it, or try the command out with --toy"
        )


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
    generator = torch.Generator(session.device).manual_seed(_SEED)
    rates: dict[str, float] = {}
    for case, turn in session.due(turns):
        try:
            _measure(session, case, turn, generator, rates)
        except torch.OutOfMemoryError:
            say(f"  {case.name}: out of memory")
        release(session.device)
    return int(session.failed)


def _measure(
    session: Session, case: Case, turn: int, generator: torch.Generator, rates: dict[str, float]
) -> None:
    """Time the case's contenders of one turn, and record the floor in the first one.

    `rates`: what this machine can do, once it has been asked for.
    """
    device, chosen = session.device, session.options.impl

    def is_wanted(contender: Contender) -> bool:
        is_chosen = not chosen or contender.name in chosen
        return is_chosen and not session.earlier(case.op, {contender.name}, case.setup)

    def timed(contender: Contender) -> tuple[Spread, dict[str, Any]]:
        return measured(contender, sets, device, _SECONDS_EACH[device.type])

    def append(
        name: str, seconds: Spread, found: Mapping[str, Any], error: float | None = None
    ) -> None:
        """`error`: before the timing, on other inputs: norm-wise, or the share of wrong indices;
        None for the floor, which computes something else."""
        metrics = {
            **found,
            "operations": case.operations,
            "bytes": case.bytes,
            "operations_per_s": case.operations / seconds.median,
            "bytes_per_s": case.bytes / seconds.median,
            "error": error,
            "product": product_name(device.type),
            **floor,
            "share_of_floor": floor["floor_s"] / seconds.median,
            **rates,
        }
        parts = {"setup": case.setup, "seconds": seconds.record(), "metrics": metrics}
        session.append(case.op, case.name, name, **parts)

    wanted = [each for each in case.contenders if each.turn == turn and is_wanted(each)]
    records_floor = turn == 0 and case.floor is not None and is_wanted(case.floor)
    if wanted or records_floor:
        say(f"{case.op}: {case.name}")
    refusals = {each.name: each.refusal(device) for each in wanted}
    for name, reason in refusals.items():
        if reason:
            _leave_out(name, reason)
    able = [each for each in wanted if not refusals[each.name]]
    if not able and not records_floor:
        return
    if not rates:
        rates["copy_bandwidth"] = copy_bandwidth(device)
        rates["matrix_rate"] = large_product_rate(device, torch.bfloat16)
    sets = input_sets(case, generator)
    if case.floor is None:
        floor = {"floor": BANDWIDTH, "floor_s": case.bytes / rates["copy_bandwidth"]}
    else:
        seconds, found = timed(case.floor)
        floor = {"floor": case.floor.name, "floor_s": seconds.median}
        if records_floor:
            append(case.floor.name, seconds, found)
    for contender in able:
        release(device)
        if contender.compiled:
            # Else the sizes of earlier cases use up torch.compile's limit of recompilations.
            torch._dynamo.reset()
        try:
            error = check(case, contender, generator)
            seconds, found = timed(contender)
        except torch.OutOfMemoryError:
            _leave_out(contender.name, "out of memory")
        # A compiler may end in any exception there is: the others are measured all the same.
        except Exception as problem:
            session.failed = True
            _leave_out(contender.name, str(problem) or type(problem).__name__)
        else:
            append(contender.name, seconds, found, error)


def _leave_out(name: str, reason: str) -> None:
    say(f"  {name:<24} not measured: {reason}")
