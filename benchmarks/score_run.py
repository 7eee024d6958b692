"""`run.py score`: three or four ways to the same sums, taking turns in one process."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

import breakdown
import inputs
import measure
import records
import torch
from baselines import vmap_chunk
from cases import Case, score_case
from progress import Budget, say
from records import Environment, ScoreRecord
from subject import Subject, load_subject
from torch import nn

from fastdean.data import Example
from fastdean.targets import find_targets

# Largest norm-wise difference between the sums of two implementations; published ones are bf16.
_MAY_DIFFER = {"fp32": 1e-4, "bf16": 1e-1}
_CHECKED_EXAMPLES = 2


def run_score(
    options: argparse.Namespace, environment: Environment, budget: Budget, gate: str
) -> int:
    """Measure every dtype, print as it goes, append one record per implementation and dtype."""
    device = torch.device(options.device)
    # fp32 first: casting down keeps what casting up cannot bring back.
    dtypes = sorted(set(options.dtype or inputs.DTYPES), key=list(inputs.DTYPES).index)
    if options.resume:
        dtypes = [dtype for dtype in dtypes if not _is_recorded(options, environment, dtype)]
    if not dtypes or budget.spent:
        say("nothing left to measure" if not dtypes else "the time is used up: call again")
        return 0
    subject = load_subject(options, dtypes[0])
    bandwidth = measure.copy_bandwidth(device)
    for dtype in dtypes:
        inputs.cast_parameters_(subject.model, inputs.DTYPES[dtype])
        examples = subject.examples(examples_in(options, dtype))
        case = score_case(
            subject.model,
            examples,
            target_modules=options.targets,
            layers=options.layers,
            vmap_examples=_vmap_examples(options, subject.model),
            name=f"{subject.name}, {options.targets}",
        )
        require_same_sums(case, examples[:_CHECKED_EXAMPLES], dtype)
        rows = _measured(case, examples, dtype, subject, bandwidth, options, gate)
        print(_render(rows))
        for row in rows:
            if row.breakdown is not None:
                print(f"\n{row.impl}, {dtype}: share of one profiled run")
                print(breakdown.render(row.breakdown))
            path = records.append(options.out, "score", environment, row)
        say(f"appended to {path.parent.name}/{path.name}")
    return 0


def _is_recorded(options: argparse.Namespace, environment: Environment, dtype: str) -> bool:
    """Whether the same command has been run on the same code and machine, all of it for `dtype`.

    A run writes its records together, so that one of them stands for all.
    """
    return any(
        row["dtype"] == dtype
        and all(
            row.get(key) == vars(environment)[key]
            for key in ("sources", "device", "torch", "command")
        )
        for row in records.read(options.out, "score")
    )


def examples_in(options: argparse.Namespace, dtype: str) -> int:
    if dtype == "bf16" and options.bf16_examples is not None:
        return options.bf16_examples
    return options.examples


def _vmap_examples(options: argparse.Namespace, model: nn.Module) -> int:
    """0 unless vmap was asked for and the gradients of two examples fit into the memory."""
    if not options.vmap:
        return 0
    weights = [target.module.weight for target in find_targets(model, options.targets)]
    chunk = min(options.examples, vmap_chunk(weights))
    if chunk < 2:
        say("vmap: left out, the gradients of two examples do not fit into the free memory")
        return 0
    say(f"vmap: the gradients of {chunk} examples at a time")
    return chunk


def require_same_sums(case: Case, examples: Sequence[Example], dtype: str) -> None:
    """Run everything once on a few examples: a warm-up, and what does not agree is not timed."""
    *others, ours = case.implementations
    expected = ours.run(examples)
    for each in others:
        # One after the other: at 7B the sums of all of them together would not fit.
        for parameter, value in each.run(examples).items():
            reference = expected[parameter].double()
            error = float((value.double() - reference).norm() / reference.norm())
            if not error <= _MAY_DIFFER[dtype]:
                raise RuntimeError(
                    f"{each.name} and fastdean must compute the same sums to "
                    f"{_MAY_DIFFER[dtype]:g}, got {error:.2g} in {parameter}; "
                    "there is nothing to time before they do"
                )


def _measured(
    case: Case,
    examples: Sequence[Example],
    dtype: str,
    subject: Subject,
    bandwidth: float,
    options: argparse.Namespace,
    gate: str,
) -> list[ScoreRecord]:
    device = torch.device(options.device)
    floor = floor_now(case, dtype, device, bandwidth)
    say(
        f"{dtype}: {len(examples)} examples, {case.work.tokens} tokens; products run at "
        f"{floor.matrix_rate / 1e9:.1f} GFLOP/s, copies at {bandwidth / 1e9:.1f} GB/s; "
        f"floor {floor.seconds:.2f} s"
    )
    samples = measure.interleaved(case.implementations, examples, options.repeats, device, say)
    # Measured before and after: a machine that was busy once must not raise the floor.
    again = floor_now(case, dtype, device, bandwidth)
    floor = min(floor, again, key=lambda each: each.seconds)
    rows = []
    for each in case.implementations:
        profiled = options.profile and each.name == "fastdean"
        rows.append(
            ScoreRecord.of(
                case,
                each,
                samples[each.name],
                floor,
                dtype=dtype,
                model=subject.name,
                examples=len(examples),
                breakdown=breakdown.profile(partial(each.run, examples), device)
                if profiled
                else None,
                gate=gate,
            )
        )
    return rows


def floor_now(case: Case, dtype: str, device: torch.device, bandwidth: float) -> measure.Floor:
    rate = measure.matrix_rate(case.shapes, inputs.DTYPES[dtype], device)
    return measure.Floor(case.work.operations, case.work.bytes, rate, bandwidth)


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
            f"{row.tokens_per_s:9.1f} {median['loop'] / row.median_s:7.2f} "
            f"{median['published'] / row.median_s:8.2f} {peak:>10} {row.share_of_floor:10.1%}{note}"
        )
    return "\n".join(lines)
