"""Collapse and bias against steps: a line per arm, with a band over all of its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from textwrap import fill

from benchmarks.harness import store
from benchmarks.harness.plots import Line, Panel
from benchmarks.harness.store import Record
from experiments.debias.figures import MASKED_LOSS, NC3, PERPLEXITY
from experiments.debias.table import BASE, ONE_EXPERIMENT, ONE_STATE, by_arm, label

_NOT_DRAWN = (NC3, PERPLEXITY, MASKED_LOSS)


def picture(rows: Sequence[Record]) -> list[list[Panel]]:
    """A row of panels per experiment, a panel for each figure."""
    grid = []
    for run in store.grouped(store.latest(rows, ONE_STATE), ONE_EXPERIMENT):
        names = dict.fromkeys(name for row in run for name in row["figures"])
        names = [name for name in names if name not in _NOT_DRAWN]
        titles = [fill(run[0].case, 70), *[""] * len(names)]
        grid.append([_panel(run, name, titles[i]) for i, name in enumerate(names)])
    return grid


def _panel(rows: Sequence[Record], name: str, title: str) -> Panel:
    start = [(0, row["figures"].get(name)) for row in rows if row.contender == BASE]
    lines = []
    for arm, members in by_arm(row for row in rows if row.contender != BASE).items():
        values: dict[int, list[float]] = {}
        for step, value in [*start, *((row["step"], row["figures"].get(name)) for row in members)]:
            if value is not None:
                values.setdefault(step, []).append(value)
        steps = sorted(values)
        mean, low, high = ([f(values[s]) for s in steps] for f in (fmean, min, max))
        lines.append(Line(label(arm), steps, mean, low, high))
    unit, neutral = rows[0]["units"].get(name), rows[0]["neutral"].get(name)
    level = None if neutral is None else ("neutral", neutral)
    return Panel(title, "steps", f"{name}, {unit}" if unit else name, lines, level=level)
