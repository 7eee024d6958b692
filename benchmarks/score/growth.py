"""`growth`: how time and memory of both orders grow with layers, examples and hidden size.

On models with random weights in fp32: batch by batch, layer by layer with states in memory, and the
same with the weights left in their files and states in files. Each turn is a process of its own.
One thing is varied, everything else stays at the middle.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.harness import command, gate, lengths, models, store, tables
from benchmarks.harness.plots import Line, Panel
from benchmarks.harness.session import Session, most, take_turns
from benchmarks.harness.store import Record
from benchmarks.score.orders import BATCHES, KEEP_TOP, LAYERS, STREAMED, WAYS, turn, write

_WAYS = (BATCHES, LAYERS, STREAMED)
_TOKENS, _VOCABULARY, _HEAD = 64, 8192, 32


@dataclass(frozen=True)
class Sizes:
    layers: int
    examples: int
    hidden: int

    def shape(self) -> models.Shape:
        """Heads of 32 numbers, two query heads for one of keys; MLPs four times as wide."""
        heads = self.hidden // _HEAD
        tied = (max(1, heads // 2), True)
        return models.Shape(self.hidden, 4 * self.hidden, self.layers, heads, _VOCABULARY, *tied)


_MIDDLE, _TOY = Sizes(layers=8, examples=32, hidden=384), Sizes(layers=2, examples=2, hidden=32)
_VARIED = {"layers": (4, 16, 32), "examples": (8, 64, 128), "hidden": (192, 576, 768)}
_VARIED_TOY = {"layers": (4,), "examples": (4,), "hidden": (64,)}
_LABELS = {"layers": "layers", "examples": "examples", "hidden": "hidden size"}


def add_options(parser: argparse.ArgumentParser) -> None:
    said = "where checkpoint and states are written, and removed again: it chooses the disk"
    command.scratch_folder(parser, said)
    command.toy(parser)
    command.repeats(parser, 1)


def tests(options: argparse.Namespace, on_gpu: bool) -> Sequence[str]:
    return gate.test_files("by_layers", "streaming")


def points(*, toy: bool) -> list[Sizes]:
    """The middle, which is a point of all sweeps, and the others of each."""
    middle, varied = (_TOY, _VARIED_TOY) if toy else (_MIDDLE, _VARIED)
    return [middle, *(replace(middle, **{name: x}) for name in varied for x in varied[name])]


def run(session: Session) -> int:
    """Append one record per point and way."""
    rounds = {"repeats": session.options.repeats}
    due = [
        sizes
        for sizes in points(toy=session.toy)
        if not session.earlier("growth", set(_WAYS), _setup(sizes) | rounds)
    ]
    for sizes in session.due(due, "points"):
        store.say(f"{sizes.layers} layers, {sizes.examples} examples, hidden size {sizes.hidden}")
        _measure(session, sizes)
    return 0


def _setup(sizes: Sizes) -> dict[str, Any]:
    return {**vars(sizes), "dtype": "fp32", "keep_top": KEEP_TOP, "tokens_per_example": _TOKENS}


def _measure(session: Session, sizes: Sizes) -> None:
    options = session.options
    examples = lengths.random_examples(sizes.examples, _TOKENS, _VOCABULARY)
    with session.scratch("growth") as folder:
        model = models.model_of(sizes.shape(), torch.float32, torch.device("cpu"))
        weight_bytes = sum(each.nbytes for each in model.parameters())
        write(folder, model, {"data": examples})
        del model
        gc.collect()
        turns = {name: partial(turn, folder, WAYS[name], options.device) for name in _WAYS}
        ran = {"tokens": sizes.examples * _TOKENS, "weight_bytes": weight_bytes}
        case, setup = "random weights, mlp", _setup(sizes) | ran
        for name, samples, _ in take_turns(turns, options.repeats):
            above = most([sample.peak_bytes for sample in samples])
            # Resident weights are held before a turn is timed; streamed ones count as they come.
            held = 0 if WAYS[name].streamed else weight_bytes
            metrics = {"with_weights_bytes": None if above is None else above + held}
            session.append_turns("growth", case, name, samples, setup, metrics)


_COLUMNS: tables.Columns = {
    **{label: f"{{{name}}}" for name, label in _LABELS.items()},
    "weights": tables.megabytes_of("weight_bytes"),
    "order": "{contender}",
    "seconds (p20 to p80)": tables.SPREAD,
    "memory with weights": tables.megabytes_of("with_weights_bytes"),
}
_NOTE = (
    "{case}, fp32, {tokens_per_example} tokens an example, keep_top {keep_top:g}. Memory is the "
    "peak above the process without a model: with all weights where they are resident, with the "
    "mapped pages of those that are streamed."
)
# A resumed run has several dates: the latest of each point, not of each run.
_LATEST = ("device", *_LABELS, "contender")
_GROUPS = ("device",)
TABLE = tables.Table(
    "python -m benchmarks growth",
    _COLUMNS,
    lambda rows: [_NOTE.format_map(rows[0]), *tables.provenance_lines(rows)],
    _LATEST,
    _GROUPS,
)


def picture(rows: Sequence[Record]) -> list[list[Panel]]:
    """A row of panels for the time and one for the memory of each device; one column a sweep."""
    grid = []
    for of_device in store.grouped(store.latest(rows, _LATEST), _GROUPS):
        above, below = [], []
        for name, label in _LABELS.items():
            swept = _of_sweep(of_device, name)
            for panels, y, scale, what in (
                (above, "median_s", 1, "seconds"),
                (below, "with_weights_bytes", 1e6, "MB, weights included"),
            ):
                lines = [
                    Line(line[0].contender, [r[name] for r in line], [r[y] / scale for r in line])
                    for line in store.grouped(swept, ("contender",))
                    if None not in [r[y] for r in line]
                ]
                panels.append(Panel(of_device[0]["device"], label, what, lines, log="xy"))
        grid += [above, below]
    return grid


def _of_sweep(rows: Sequence[Record], name: str) -> list[Record]:
    """Those at the middle but for what is varied, from the smallest to the largest."""
    fixed = {other: size for other, size in vars(_MIDDLE).items() if other != name}
    chosen = [row for row in rows if all(row[each] == size for each, size in fixed.items())]
    return sorted(chosen, key=lambda row: row[name])
