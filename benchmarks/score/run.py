"""`score`: several ways to the same sums, taking turns in one process, each dtype by itself.

They are `published`, the released procedure on a few layers, extrapolated to all; `loop`, the best
plain loop; `vmap`, that is `torch.func.vmap` of `grad`; and `fastdean`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks.harness import command, gate, models, profile, store, tables
from benchmarks.harness.cases import Case, Contender, norm_error
from benchmarks.harness.clock import elapsed
from benchmarks.harness.memory import Held
from benchmarks.harness.plots import Panel
from benchmarks.harness.rates import copy_bandwidth, matrix_rate
from benchmarks.harness.session import Problem, Sample, Session, attempt, take_turns
from benchmarks.harness.store import Record, say
from benchmarks.score import subject
from benchmarks.score.baselines import vmap_chunk
from benchmarks.score.work import score_case
from fastdean.coupling.targets.finding import find_targets
from fastdean.data.examples import Example

# Largest norm-wise difference between the sums of two implementations; published ones are bf16.
# In fp32 it is torch's own cross-entropy on a CPU that is off, by 1.6e-4 at a vocabulary of 49k.
_MAY_DIFFER = {"fp32": 1e-3, "bf16": 1e-1}
_CHECKED_EXAMPLES = 2
OURS = "fastdean"
NAMES = {
    "published": "published procedure",
    "loop": "plain loop",
    "vmap": "`torch.func.vmap`",
    OURS: "`fastdean.score`",
}
_NO_ROOM = Problem("the gradients of two examples do not fit into the free memory")


def tests(options: argparse.Namespace, on_gpu: bool) -> Sequence[str]:
    return gate.score_tests(on_gpu)


def add_options(parser: argparse.ArgumentParser) -> None:
    subject.add_options(parser)
    add, several = parser.add_argument, {"action": "append"}
    add("--dtype", **several, choices=list(models.DTYPES), help="may be repeated; default: both")
    said = "measure only this one; may be repeated; vmap besides needs --vmap"
    add("--impl", **several, choices=list(NAMES), help=said)
    said = "layers the published procedure is run on, first to last"
    add("--layers", type=command.positive, default=2, metavar="N", help=said)
    add("--vmap", action="store_true", help="measure torch.func.vmap too, where memory allows")
    add("--profile", action="store_true", help="say where fastdean's time goes")
    command.repeats(parser, 3)


def run(session: Session) -> int:
    """Append one record per implementation and dtype as soon as it is done.

    An implementation that runs out of memory or fails is named, and the others are measured; 1 if
    one failed.
    """
    options, due = session.options, []
    # Ours always, since the others are compared with it.
    wanted = {*(options.impl or NAMES), OURS} - (set() if options.vmap else {"vmap"})
    # fp32 first: casting down keeps what casting up cannot bring back.
    again = {"without_problem": OURS, "same_command": True}
    for dtype in (each for each in models.DTYPES if each in (options.dtype or models.DTYPES)):
        earlier = session.earlier("score", wanted, {"dtype": dtype}, **again)
        due += [] if earlier else [dtype]
        for row in (row for row in earlier if row.problem is not None):
            session.failed |= row.problem["failed"]
            say(f"{row.contender}, {dtype}: not measured: {row.problem['reason']}")
    loaded, bandwidth = None, 0.0
    for dtype in session.due(due, "dtypes"):
        if loaded is None:
            loaded = subject.load_subject(options, dtype)
            bandwidth = copy_bandwidth(session.device)
        models.cast_parameters_(loaded.model, models.DTYPES[dtype])
        examples = loaded.examples(subject.examples_in(options, dtype))
        chunk = 0
        if "vmap" in wanted:
            targets = find_targets(loaded.model, options.targets)
            chunk = min(options.examples, vmap_chunk([each.module.weight for each in targets]))
            if chunk > 1:
                say(f"vmap: the gradients of {chunk} examples at a time")
        case = score_case(
            loaded.model,
            examples,
            target_modules=options.targets,
            layers=options.layers,
            contenders=wanted if chunk > 1 else wanted - {"vmap"},
            vmap_examples=chunk,
            name=f"{loaded.name}, {options.targets}",
            dtype=dtype,
            model_name=loaded.name,
        )
        if "vmap" in wanted and chunk < 2:
            leave_out(session, case, "vmap", _NO_ROOM)
        rows = compare(session, case, examples, bandwidth, options.profile)
        if rows:
            print(tables.rendered(TABLE, rows))
    return int(session.failed)


def leave_out(session: Session, case: Case, name: str, problem: Problem) -> None:
    """Record why a contender is not measured."""
    # Without our own there is nothing to compare, whatever the reason.
    session.failed |= problem.failed or name == OURS
    session.append(case.op, case.name, name, setup=case.setup, problem=vars(problem))


def compare(
    session: Session,
    case: Case,
    examples: Sequence[Example],
    bandwidth: float,
    with_breakdown: bool = False,
) -> list[Record]:
    """The contenders in turn, on the same examples, and the floor of the machine.

    Appends each record as soon as its contender has had its last turn.
    """
    device, tokens = session.device, case.settings["tokens"]

    def measured_floor() -> dict[str, float]:
        rate = matrix_rate(case.products, models.DTYPES[case.dtype], device)
        seconds = max(case.operations / rate, case.bytes / bandwidth)
        work = {"operations": case.operations, "bytes": case.bytes}
        return {**work, "matrix_rate": rate, "copy_bandwidth": bandwidth, "floor_s": seconds}

    def turn(contender: Contender) -> Sample:
        held = Held(device)
        seconds = contender.scale * elapsed(lambda: contender.run(examples), device)
        # Never extrapolated: it is that of the layers run.
        return Sample(seconds, held.added_bytes())

    def shares_of(contender: Contender) -> dict[str, float] | None:
        run = partial(contender.run, examples)
        shares, problem = attempt(lambda: profile.shares_of(run, device), device)
        if shares is None:
            seen = "the profiler sees no kernels" if problem is None else problem.reason
            say(f"  no breakdown: {seen}")
        return shares

    problems = require_same_sums(case, examples[:_CHECKED_EXAMPLES], device)
    for name, problem in problems.items():
        leave_out(session, case, name, problem)
    able = {each.name: each for each in case.contenders if each.name not in problems}
    floors, rows = [measured_floor()], []
    say(
        f"{case.name}, {case.dtype}: {len(examples)} examples, {tokens} tokens; products run at "
        f"{floors[0]['matrix_rate'] / 1e9:.1f} GFLOP/s; floor {floors[0]['floor_s']:.2f} s"
    )
    turns = {name: partial(turn, each) for name, each in able.items()}
    for name, samples, problem in take_turns(turns, session.options.repeats, forgiving=device):
        if problem is not None:
            leave_out(session, case, name, problem)
            continue
        if len(floors) == 1:
            # Before and after: a machine that was busy once must not raise the floor.
            floors.append(measured_floor())
        metrics = {
            **min(floors, key=lambda each: each["floor_s"]),
            "breakdown": shares_of(able[name]) if with_breakdown and name == OURS else None,
        }
        setup = {**case.setup, "extrapolated": able[name].extrapolated}
        rows.append(session.append_turns(case.op, case.name, name, samples, setup, metrics))
    return rows


def require_same_sums(
    case: Case, examples: Sequence[Example], device: torch.device
) -> dict[str, Problem]:
    """Run everything once on a few examples: a warm-up, and what does not agree is not timed.

    Returns:
        Of each contender that could not run its name and why.
    """
    *others, ours = case.contenders
    expected, problem = attempt(lambda: ours.run(examples), device)
    if problem is not None:
        raise RuntimeError(
            f"{ours.name} must run on {len(examples)} examples, got {problem.reason}; "
            "there is nothing to time before it does"
        )
    problems, allowed = {}, _MAY_DIFFER[case.dtype]
    for each in others:
        # One after the other: at 7B the sums of all of them together would not fit.
        sums, problem = attempt(partial(each.run, examples), device)
        if problem is not None:
            problems[each.name] = problem
            continue
        for parameter, value in sums.items():
            error = norm_error(value, expected[parameter])
            if not error <= allowed:
                raise RuntimeError(
                    f"{each.name} and fastdean must compute the same sums to {allowed:g}, got "
                    f"{error:.2g} in {parameter}; there is nothing to time before they do"
                )
        del sums
    return problems


def _columns(rows: Sequence[Record]) -> tables.Columns:
    medians = {(row["dtype"], row.contender): row["median_s"] for row in rows}

    def named(row: Record) -> str:
        note = f", extrapolated from {row['extrapolated']}" if row["extrapolated"] else ""
        return NAMES[row.contender] + note

    def compared(with_: str) -> Callable[[Record], str]:
        return lambda row: tables.share(medians.get((row["dtype"], with_)), row["median_s"])

    return {
        "dtype": "{dtype}",
        "": named,
        **tables.TURNS,
        "vs plain loop": compared("loop"),
        "vs published": compared("published"),
        **tables.PEAK,
        **tables.FLOOR,
    }


def _notes(rows: Sequence[Record]) -> list[str]:
    sizes = []
    for row, *_ in store.grouped(rows, ("dtype",)):
        sums = "" if row["sums_bytes"] is None else f", sums {row['sums_bytes'] / 1e6:.0f} MB"
        sizes.append(
            f"{row['dtype']}: {row['examples']} examples, {row['tokens']} tokens, "
            f"floor {row['floor_s']:.2f} s at {row['matrix_rate'] / 1e9:.1f} GFLOP/s{sums}"
        )
    notes = [f"{rows[0].case}. {'; '.join(sizes)}. {tables.provenance_line(rows[0])}"]
    for row in (row for row in rows if row["breakdown"]):
        shares = ", ".join(f"{name} {share:.0%}" for name, share in row["breakdown"].items())
        notes += ["", f"One profiled run of {NAMES[row.contender]}, {row['dtype']}: {shares}."]
    return notes


_KIND = ("device", "case", "dtype")
TABLE = tables.Table("python -m benchmarks score", _columns, _notes, _KIND, tables.RUNS)


def picture(rows: Sequence[Record]) -> list[list[Panel]]:
    """A panel for each device, case and dtype."""
    panels = []
    for group in store.grouped(store.latest(rows, _KIND), _KIND):
        notes = {row.contender: "\nextrapolated" if row["extrapolated"] else "" for row in group}
        bars = {row.contender + notes[row.contender]: row.spread for row in group}
        title = "\n".join(group[0][key] for key in _KIND)
        panels.append(Panel(title, "", "seconds", bars=bars, floor=group[0]["floor_s"]))
    return [panels]
