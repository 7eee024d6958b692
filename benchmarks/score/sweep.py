"""`sweep`: how the time of `fastdean.score` grows: one thing is varied, everything else stays.

On models with random weights, in bf16; beside it the plain loop, so that a bend can be told from
one that every implementation has.
"""

from __future__ import annotations

import argparse
import gc
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from benchmarks.harness import command, lengths, models, store, tables
from benchmarks.harness.plots import Line, Panel, seconds_over
from benchmarks.harness.rates import copy_bandwidth
from benchmarks.harness.session import Session
from benchmarks.harness.store import Record
from benchmarks.score.run import NAMES, OURS, compare, tests  # noqa: F401, its own too
from benchmarks.score.work import score_case
from fastdean.coupling.targets.finding import find_targets

_TOKENS = (64, 256, 1024, 32, 128, 512)
_EXAMPLES = (32, 128, 8, 64, 256)
_LAYERS = (0.25, 1.0, 0.5, 0.75)
_OTHERWISE_EXAMPLES = 64
# On this shape tokens per batch are varied, in both dtypes, and nothing else; on a CPU alone: a
# GPU's default is 2048, whatever the model.
_BATCH_SHAPE, _BATCH_EXAMPLES = "smollm2-135m", 24
_BATCHES = (192, 336, 512, 800, 1200)
SWEEPS = ("tokens per example", "examples", "scored weights", "model parameters")


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
        sweep: what is varied: one of `SWEEPS`, or "tokens per batch" with the dtype behind it.
        tokens: of each example; None: BeaverTails' lengths.
        layers: the share of the layers, from the last down, whose targets are scored.
        group: "mlp" or "all": which of their matrices.
        batch: tokens per batch; None: the default.
    """

    sweep: str
    shape: str
    examples: int = _OTHERWISE_EXAMPLES
    tokens: int | None = None
    layers: float = 1.0
    group: str = "mlp"
    dtype: str = "bf16"
    batch: int | None = None


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    said = (
        f"the largest model of {', '.join(models.SHAPES)}; with {_BATCH_SHAPE} tokens per batch "
        "are varied, in both dtypes"
    )
    shapes = {"choices": list(models.SHAPES), "default": "qwen2-7b"}
    add("--random-model", **shapes, metavar="SHAPE", help=said)
    add("--sweep", action="append", choices=SWEEPS, help="may be repeated; default: all")
    command.repeats(parser, 3)


def points(largest: str) -> list[Point]:
    """All sweeps, in an order in which a run that ends early has seen the ends of each.

    `largest`: the shape that all sweeps but that of the size use; the size ends there.
    """
    if largest == _BATCH_SHAPE:
        sizes = itertools.product(("fp32", "bf16"), _BATCHES)
        fixed = {"shape": largest, "examples": _BATCH_EXAMPLES}
        return [Point(f"tokens per batch, {d}", dtype=d, batch=b, **fixed) for d, b in sizes]
    names = list(models.SHAPES)
    sizes = [name for name in names[: names.index(largest) + 1] if name != "toy"] or [largest]
    by_tokens, by_examples, by_weights, by_size = SWEEPS
    sweeps = [
        [Point(by_tokens, largest, examples=32, tokens=t) for t in _TOKENS],
        [Point(by_examples, largest, examples=e) for e in _EXAMPLES],
        [Point(by_weights, largest, layers=share) for share in _LAYERS]
        + [Point(by_weights, largest, group="all")],
        [Point(by_size, name) for name in reversed(sizes)],
    ]
    turns = (point for turn in itertools.zip_longest(*sweeps) for point in turn if point)
    # By model, since loading one takes longer than running over it.
    return sorted(turns, key=lambda point: (point.shape != largest, point.shape))


def run(session: Session) -> int:
    """Append one record per point and contender; 1 if one failed."""
    options = session.options
    due = [
        point
        for point in points(options.random_model)
        if (not options.sweep or point.sweep in options.sweep)
        # Ours has the last turn: it stands for all.
        and not session.earlier("sweep", {OURS}, {"point": vars(point)}, without_problem=OURS)
    ]
    model, loaded, bandwidth = None, ("", ""), 0.0
    for point in session.due(due, "points"):
        bandwidth = bandwidth or copy_bandwidth(session.device)
        if loaded != (point.shape, point.dtype):
            model, loaded = None, (point.shape, point.dtype)
            gc.collect()  # the next model must not stand beside the last one
            model = models.random_model(point.shape, models.DTYPES[point.dtype], session.device)
        _measure(session, point, model, bandwidth)
    return int(session.failed)


def _measure(session: Session, point: Point, model: nn.Module, bandwidth: float) -> None:
    name = models.display_name(point.shape)
    examples = lengths.random_examples(point.examples, point.tokens, model.config.vocab_size)
    targets = scored_modules(model, point)
    case = score_case(
        model,
        examples,
        target_modules=targets,
        contenders=("loop", OURS),
        tokens_per_batch=point.batch,
        op="sweep",
        name=f"{name}, {point.sweep}",
        dtype=point.dtype,
        model_name=name,
    )
    weights = sum(each.module.weight.numel() for each in find_targets(model, targets))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    varied = zip(SWEEPS, (point.tokens, point.examples, weights, parameters), strict=True)
    x = point.batch or dict(varied)[point.sweep]
    setup = {"sweep": point.sweep, "x": x, "point": dict(vars(point))}
    case = replace(case, settings={**case.settings, **setup})
    compare(session, case, examples, bandwidth)


def scored_modules(model: nn.Module, point: Point) -> str | list[str]:
    """What `score` takes as its targets at this point."""
    if point.layers == 1.0:
        return point.group
    found = find_targets(model, point.group)
    count = 1 + max(target.layer_index for target in found)
    lowest = count - max(2, round(point.layers * count))
    return [target.name for target in found if target.layer_index >= max(0, lowest)]


def _columns(rows: Sequence[Record]) -> tables.Columns:
    named = {"": lambda row: NAMES[row.contender]}
    return {rows[0]["sweep"]: "{x:,.0f}", **named, **tables.TURNS, **tables.PEAK, **tables.FLOOR}


# A resumed sweep has several dates: the latest of each point, not of each run.
_LATEST = ("device", "sweep", "x", "contender")
_GROUPS = ("device", "sweep")
TABLE = tables.Table(
    "python -m benchmarks sweep",
    _columns,
    tables.provenance_lines,
    _LATEST,
    _GROUPS,
    lines=lambda rows: sorted(rows, key=lambda row: row["x"]),
)


def picture(rows: Sequence[Record]) -> list[list[Panel]]:
    """Seconds above, tokens per second below, one column a sweep."""
    above, below = [], []
    for group in store.grouped(store.latest(rows, _LATEST), _GROUPS):
        sweep = group[0]["sweep"]
        title = f"{group[0]['device']}\n{sweep}"
        lines, floor = seconds_over(group, "x")
        above.append(Panel(title, sweep, "seconds", lines, floor=floor, log="xy"))
        tokens = {row["x"]: row["tokens"] for row in group}
        *lines, floor = (
            Line(each.label, each.x, [tokens[x] / y for x, y in zip(each.x, each.y, strict=True)])
            for each in (*lines, floor)
        )
        below.append(Panel("", sweep, "tokens per second", lines, floor=floor, log="x"))
    return [above, below]
