"""`score`: several ways to the same sums, taking turns in one process, each dtype by itself."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from benchmarks.harness import models, store, tables
from benchmarks.harness.budget import say
from benchmarks.harness.cases import Case, Contender
from benchmarks.harness.command import positive
from benchmarks.harness.gate import test_files
from benchmarks.harness.plots import Panel
from benchmarks.harness.rates import Floor, copy_bandwidth, matrix_rate
from benchmarks.harness.session import (
    Problem,
    Sample,
    Session,
    attempt,
    most,
    seconds_of,
    take_turns,
    timed,
)
from benchmarks.harness.store import Record
from benchmarks.harness.tables import Cells, Table
from benchmarks.score import breakdown, subject
from benchmarks.score.baselines import vmap_chunk
from benchmarks.score.work import score_case
from fastdean.coupling.targets import find_targets
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

# test_score.py runs on the CPU: what a GPU runs is the kernels.
_REPEATED = (
    "test_a_deterministic_run_of_score_repeats_its_bits",
    "test_an_op_repeats_its_bits[weight_sums-torch.float32-triton]",
    "test_an_op_repeats_its_bits[weight_sums-torch.bfloat16-triton]",
)


def tests(options: argparse.Namespace, on_gpu: bool) -> Sequence[str]:
    if not on_gpu:
        return test_files("score")
    [repeatable] = test_files("repeatable")
    repeated = (f"{repeatable}::{test}" for test in _REPEATED)
    return (*test_files("score", "score_kernels"), *repeated)


def tests_of_agreement(options: argparse.Namespace, on_gpu: bool) -> Sequence[str]:
    """It selects as well."""
    return test_files("score", *(("score_kernels", "repeatable") if on_gpu else ()))


def add_options(parser: argparse.ArgumentParser) -> None:
    subject.add_options(parser)
    add = parser.add_argument
    add(
        "--dtype",
        action="append",
        choices=list(models.DTYPES),
        help="may be repeated; default: both",
    )
    add(
        "--impl",
        action="append",
        choices=list(NAMES),
        help="measure only this one; may be repeated; vmap besides needs --vmap",
    )
    add("--repeats", type=positive, default=3)
    add(
        "--layers",
        type=positive,
        default=2,
        help="layers the published procedure is run on, first to last; default: 2",
    )
    add("--vmap", action="store_true", help="measure torch.func.vmap too, where memory allows")
    add("--profile", action="store_true", help="say where fastdean's time goes")


def run(session: Session) -> int:
    """Append one record per implementation and dtype as soon as it is done.

    An implementation that runs out of memory or fails is named, and the others are measured; 1 if
    one failed.
    """
    # fp32 first: casting down keeps what casting up cannot bring back.
    chosen = set(session.options.dtype or models.DTYPES)
    due = []
    for dtype in (each for each in models.DTYPES if each in chosen):
        earlier = session.earlier(
            "score",
            _wanted(session.options),
            {"dtype": dtype},
            without_problem=OURS,
            same_command=True,
        )
        due += [] if earlier else [dtype]
        for row in (row for row in earlier if row.problem is not None):
            session.failed |= row.problem["failed"]
            say(f"{row.contender}, {dtype}: not measured: {row.problem['reason']}")
    loaded: subject.Subject | None = None
    bandwidth = 0.0
    for dtype in session.due(due, "dtypes"):
        if loaded is None:
            loaded = subject.load_subject(session.options, dtype)
            bandwidth = copy_bandwidth(session.device)
        rows = _measure(session, loaded, dtype, bandwidth)
        if rows:
            print(tables.rendered(TABLE, rows))
    return int(session.failed)


def _wanted(options: argparse.Namespace) -> set[str]:
    """The implementations asked for; ours always, since the others are compared with it."""
    if options.impl:
        return {*options.impl, OURS}
    return {"published", "loop", OURS, *(["vmap"] if options.vmap else [])}


def _measure(
    session: Session, loaded: subject.Subject, dtype: str, bandwidth: float
) -> list[Record]:
    options, model = session.options, loaded.model
    models.cast_parameters_(model, models.DTYPES[dtype])
    examples = loaded.examples(subject.examples_in(options, dtype))
    chunk = vmap_examples(options, model)
    case = score_case(
        model,
        examples,
        target_modules=options.targets,
        layers=options.layers,
        vmap_examples=chunk,
        name=f"{loaded.name}, {options.targets}",
        dtype=dtype,
        model_name=loaded.name,
    )
    wanted = _wanted(options)
    case = replace(case, contenders=tuple(c for c in case.contenders if c.name in wanted))
    comparison = Comparison(session, case, examples, bandwidth)
    if "vmap" in wanted and not chunk:
        comparison.leave_out("vmap", _NO_ROOM)
    return comparison.measure(options.repeats, profile=options.profile)


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


@dataclass
class Comparison:
    """The contenders of one case in turn, on the same examples, and the floor of the machine."""

    session: Session
    case: Case
    examples: Sequence[Example]
    bandwidth: float

    def measure(self, repeats: int, *, profile: bool = False) -> list[Record]:
        """Appends each record as soon as its contender has had its last turn."""
        case, device = self.case, self.session.device
        problems = require_same_sums(case, self.examples[:_CHECKED_EXAMPLES], device)
        for name, problem in problems.items():
            self.leave_out(name, problem)
        able = {each.name: each for each in case.contenders if each.name not in problems}
        floors, rows = [self._floor()], []
        say(
            f"{case.name}, {case.dtype}: {len(self.examples)} examples, {case.settings['tokens']} "
            f"tokens; products run at {floors[0].matrix_rate / 1e9:.1f} GFLOP/s; floor "
            f"{floors[0].seconds:.2f} s"
        )
        turns = {name: partial(self._turn, each) for name, each in able.items()}
        for name, samples, problem in take_turns(turns, repeats, forgiving=device):
            if problem is not None:
                self.leave_out(name, problem)
                continue
            if len(floors) == 1:
                # Before and after: a machine that was busy once must not raise the floor.
                floors.append(self._floor())
            shares = self._profiled(able[name]) if profile and name == OURS else None
            best = min(floors, key=lambda each: each.seconds)
            rows.append(self._append(able[name], samples, best, shares))
        return rows

    def leave_out(self, name: str, problem: Problem) -> None:
        # Without our own there is nothing to compare, whatever the reason.
        self.session.failed |= problem.failed or name == OURS
        case = self.case
        self.session.append(case.op, case.name, name, setup=case.setup, problem=vars(problem))

    def _turn(self, contender: Contender) -> Sample:
        sample = timed(lambda: contender.run(self.examples), self.session.device)
        return replace(sample, seconds=contender.scale * sample.seconds)

    def _floor(self) -> Floor:
        dtype, device = models.DTYPES[self.case.dtype], self.session.device
        rate = matrix_rate(self.case.shapes, dtype, device)
        return Floor(self.case.operations, self.case.bytes, rate, self.bandwidth)

    def _profiled(self, contender: Contender) -> dict[str, float] | None:
        run, device = partial(contender.run, self.examples), self.session.device
        found, problem = attempt(lambda: breakdown.profile(run, device), device)
        if found is None:
            seen = "the profiler sees no kernels" if problem is None else problem.reason
            say(f"  no breakdown: {seen}")
        return found

    def _append(
        self,
        contender: Contender,
        samples: Sequence[Sample],
        floor: Floor,
        shares: dict[str, float] | None,
    ) -> Record:
        """`peak_bytes` is never extrapolated: it is that of the layers run."""
        case, seconds = self.case, seconds_of(samples)
        ran = {"repeats": len(samples), "extrapolated": contender.extrapolated}
        metrics = {
            "tokens_per_s": case.settings["tokens"] / seconds["median_s"],
            "peak_bytes": most([sample.peak_bytes for sample in samples]),
            **vars(floor),
            "floor_s": floor.seconds,
            "share_of_floor": floor.seconds / seconds["median_s"],
            "breakdown": shares,
        }
        parts = {"setup": case.setup | ran, "seconds": seconds, "metrics": metrics}
        return self.session.append(case.op, case.name, contender.name, **parts)


def require_same_sums(
    case: Case, examples: Sequence[Example], device: torch.device
) -> dict[str, Problem]:
    """Run everything once on a few examples: a warm-up, and what does not agree is not timed.

    Returns:
        Of each contender that could not run its name and why.
    Raises:
        RuntimeError: two contenders disagree, or fastdean could not run.
    """
    *others, ours = case.contenders
    expected, problem = attempt(lambda: ours.run(examples), device)
    if problem is not None:
        raise RuntimeError(
            f"{ours.name} must run on {len(examples)} examples, got {problem.reason}; "
            "there is nothing to time before it does"
        )
    problems = {}
    for each in others:
        # One after the other: at 7B the sums of all of them together would not fit.
        sums, problem = attempt(partial(each.run, examples), device)
        if problem is None:
            _require_alike(each.name, sums, expected, _MAY_DIFFER[case.dtype])
        else:
            problems[each.name] = problem
        del sums
    return problems


def _require_alike(name: str, sums: Mapping, expected: Mapping, most: float) -> None:
    for parameter, value in sums.items():
        reference = expected[parameter].double()
        error = float((value.double() - reference).norm() / reference.norm())
        if not error <= most:
            raise RuntimeError(
                f"{name} and fastdean must compute the same sums to {most:g}, got {error:.2g} in "
                f"{parameter}; there is nothing to time before they do"
            )


def _lines(rows: Sequence[Record]) -> tuple[Cells, list[Cells]]:
    header = ["dtype", "", "seconds (p20 to p80)", "tokens/s", "vs plain loop", "vs published"]
    lines = []
    for alike in store.grouped(rows, ("dtype",)):
        median = {row.contender: row["median_s"] for row in alike}
        lines += [_cells(row, median) for row in alike]
    return [*header, "peak memory", "floor / time"], lines


def _cells(row: Record, median: Mapping[str, float]) -> Cells:
    note = f", extrapolated from {row['extrapolated']}" if row["extrapolated"] else ""
    return [
        row["dtype"],
        NAMES[row.contender] + note,
        tables.spread(row),
        f"{row['tokens_per_s']:.0f}",
        tables.times_as_long(median.get("loop"), row),
        tables.times_as_long(median.get("published"), row),
        tables.held(row["peak_bytes"]),
        f"{row['share_of_floor']:.0%}",
    ]


def _notes(rows: Sequence[Record]) -> list[str]:
    sizes = "; ".join(_size(alike[0]) for alike in store.grouped(rows, ("dtype",)))
    notes = [f"{rows[0].case}. {sizes}. {tables.provenance_line(rows[0])}"]
    for row in (row for row in rows if row["breakdown"]):
        shares = ", ".join(f"{name} {share:.0%}" for name, share in row["breakdown"].items())
        notes += ["", f"One profiled run of {NAMES[row.contender]}, {row['dtype']}: {shares}."]
    return notes


def _size(row: Record) -> str:
    return (
        f"{row['dtype']}: {row['examples']} examples, {row['tokens']} tokens, "
        f"floor {row['floor_s']:.2f} s at {row['matrix_rate'] / 1e9:.1f} GFLOP/s"
        + ("" if row["sums_bytes"] is None else f", sums {row['sums_bytes'] / 1e6:.0f} MB")
    )


_KIND = ("device", "case", "dtype")
TABLE = Table("python -m benchmarks score", _KIND, ("device", "case", "date"), _lines, _notes)


def picture(rows: Sequence[Record]) -> list[list[Panel]]:
    """A panel for each device, case and dtype."""
    panels = []
    for group in store.grouped(store.latest(rows, _KIND), _KIND):
        bars = {
            row.contender + ("\nextrapolated" if row["extrapolated"] else ""): (
                row["median_s"],
                row["p20_s"],
                row["p80_s"],
            )
            for row in group
        }
        title = "\n".join(group[0][key] for key in _KIND)
        panels.append(Panel(title, "", "seconds", bars=bars, floor=group[0]["floor_s"]))
    return [panels]
