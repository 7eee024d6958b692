"""Collapse and bias against steps: a line per arm, with a band over all of its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

from benchmarks.harness import store
from benchmarks.harness.plots import Line, Panel
from benchmarks.harness.store import Record
from experiments.debias.figures import MASKED_LOSS, NC3, PERPLEXITY
from experiments.debias.table import BASE, ONE_EXPERIMENT, ONE_STATE, by_arm, label

_NOT_DRAWN = (NC3, PERPLEXITY, MASKED_LOSS)


def picture(rows: Sequence[Record]) -> list[list[Panel]]:
    """A row of panels per experiment, a panel for each figure."""
    return [
        [
            _panel(run, name, fill(run[0].case, 70) if position == 0 else "")
            for position, name in enumerate(_names(run))
        ]
        for run in store.grouped(store.latest(rows, ONE_STATE), ONE_EXPERIMENT)
    ]


def _names(rows: Sequence[Record]) -> list[str]:
    found = dict.fromkeys(name for row in rows for name in row["figures"])
    return [name for name in found if name not in _NOT_DRAWN]


def _panel(rows: Sequence[Record], name: str, title: str) -> Panel:
    start = [row["figures"].get(name) for row in rows if row.contender == BASE]
    lines = []
    for arm, members in by_arm(row for row in rows if row.contender != BASE).items():
        values = {0: start} if start else {}
        for row in members:
            values.setdefault(row["step"], []).append(row["figures"].get(name))
        found = {s: [v for v in values[s] if v is not None] for s in sorted(values)}
        found = {step: each for step, each in found.items() if each}
        means, low, high = (
            [function(each) for each in found.values()]
            for function in (lambda each: sum(each) / len(each), min, max)
        )
        lines.append(Line(label(arm), list(found), means, low, high))
    unit, neutral = rows[0]["units"].get(name), rows[0]["neutral"].get(name)
    level = None if neutral is None else ("neutral", neutral)
    return Panel(title, "steps", f"{name}, {unit}" if unit else name, lines, level=level)
