"""How the time of `fastdean.score` grows: one thing is varied, everything else stays.

On models with random weights, in bf16; beside it the plain loop, so that a bend can be told from
one that every implementation has.
"""

from __future__ import annotations

import argparse
import gc
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import measure
import records
import torch
from cases import score_case
from measure import Problem
from progress import Budget, say
from random_model import SHAPES, display_name
from records import Environment, ScoreRecord
from score_run import floor_now, require_same_sums
from subject import Subject, lengths_of, random_examples, random_subject
from torch import nn

from fastdean.targets import find_targets

_TOKENS = (64, 256, 1024, 32, 128, 512)
_EXAMPLES = (32, 128, 8, 64, 256)
_LAYERS = (0.25, 1.0, 0.5, 0.75)
_OTHERWISE_EXAMPLES = 64
_DTYPE = "bf16"
_CHECKED_EXAMPLES = 2


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
        sweep: what is varied: "tokens per example", "examples", "model parameters" or
            "scored weights".
        shape: the model's.
        tokens: of each example; None: BeaverTails' lengths.
        layers: the share of the layers, from the last down, whose targets are scored.
        group: "mlp" or "all": which of their matrices.
    """

    sweep: str
    shape: str
    examples: int = _OTHERWISE_EXAMPLES
    tokens: int | None = None
    layers: float = 1.0
    group: str = "mlp"


@dataclass(frozen=True)
class SweepRecord(ScoreRecord):
    """A `ScoreRecord` at one point of a sweep.

    Attributes:
        sweep: what is varied.
        x: its value: tokens, examples, the model's parameters, or scored weights.
        point: the point's settings, to know it again.
    """

    sweep: str
    x: float
    point: dict[str, Any]


def points(largest: str) -> list[Point]:
    """All sweeps, in an order in which a run that ends early has seen the ends of each.

    Args:
        largest: the shape that all sweeps but that of the size use; the size ends there.
    """
    names = list(SHAPES)
    sizes = [name for name in names[: names.index(largest) + 1] if name != "toy"] or [largest]
    sweeps = [
        [Point("tokens per example", largest, examples=32, tokens=t) for t in _TOKENS],
        [Point("examples", largest, examples=e) for e in _EXAMPLES],
        [Point("scored weights", largest, layers=share) for share in _LAYERS]
        + [Point("scored weights", largest, group="all")],
        [Point("model parameters", name) for name in reversed(sizes)],
    ]
    turns = (point for turn in itertools.zip_longest(*sweeps) for point in turn if point)
    # By model, since loading one takes longer than running over it.
    return sorted(turns, key=lambda point: (point.shape != largest, point.shape))


def run_sweeps(
    options: argparse.Namespace, environment: Environment, budget: Budget, gate: str
) -> int:
    """Append one record per point and implementation; 1 if an implementation failed."""
    device = torch.device(options.device)
    due = [p for p in points(options.random_model) if not options.sweep or p.sweep in options.sweep]
    if options.resume:
        done = [
            row["point"]
            for row in records.read(options.out, "sweep")
            if records.stands_for(row, environment, gate)
        ]
        due = [point for point in due if vars(point) not in done]
    subject: Subject | None = None
    loaded, failed = "", False
    bandwidth = measure.copy_bandwidth(device) if due else 0.0
    for position, point in enumerate(due):
        if budget.spent:
            say(f"the time is used up, {len(due) - position} points left: call again with --resume")
            break
        if loaded != point.shape:
            subject = None  # the next model must not stand beside this one
            gc.collect()
            subject, loaded = random_subject(point.shape, _DTYPE, device), point.shape
        rows, problems = _measured(point, subject.model, device, bandwidth, options.repeats, gate)
        # Together: when a sweep is resumed, one of a point's records stands for all.
        for row in rows:
            records.append(options.out, "sweep", environment, row)
        for name, problem in problems.items():
            say(f"  {name:<10} not measured: {problem.reason}")
            failed |= problem.failed
    return int(failed)


def _measured(
    point: Point,
    model: nn.Module,
    device: torch.device,
    bandwidth: float,
    repeats: int,
    gate: str,
) -> tuple[list[SweepRecord], dict[str, Problem]]:
    """The point's records, and of each implementation that could not run its name and why."""
    name = display_name(point.shape)
    examples = random_examples(model, lengths_of(point.examples, point.tokens))
    targets = scored_modules(model, point)
    case = score_case(
        model, examples, target_modules=targets, op="sweep", name=f"{name}, {point.sweep}"
    )
    case = replace(case, implementations=case.implementations[1:])  # less the published procedure
    problems = require_same_sums(case, examples[:_CHECKED_EXAMPLES], _DTYPE, device)
    able = [each for each in case.implementations if each.name not in problems]
    floor = floor_now(case, _DTYPE, device, bandwidth)
    x = _value(point, model, targets)
    say(f"{point.sweep} {x:g}: {case.work.tokens} tokens, floor {floor.seconds:.3f} s")
    outcomes = list(measure.interleaved(able, examples, repeats, device, say))
    problems |= {each.implementation.name: each.problem for each in outcomes if each.problem}
    rows = [
        SweepRecord.of(
            case,
            each.implementation,
            each.samples,
            floor,
            dtype=_DTYPE,
            model=name,
            examples=len(examples),
            breakdown=None,
            gate=gate,
            sweep=point.sweep,
            x=x,
            point=dict(vars(point)),
        )
        for each in outcomes
        if each.problem is None
    ]
    return rows, problems


def scored_modules(model: nn.Module, point: Point) -> str | list[str]:
    """What `score` takes as its targets at this point."""
    if point.layers == 1.0:
        return point.group
    found = find_targets(model, point.group)
    count = 1 + max(target.layer_index for target in found)
    lowest = count - max(2, round(point.layers * count))
    return [target.name for target in found if target.layer_index >= max(0, lowest)]


def _value(point: Point, model: nn.Module, targets: str | Sequence[str]) -> float:
    if point.sweep == "tokens per example":
        return point.tokens
    if point.sweep == "examples":
        return point.examples
    if point.sweep == "model parameters":
        return sum(parameter.numel() for parameter in model.parameters())
    return sum(target.module.weight.numel() for target in find_targets(model, targets))
