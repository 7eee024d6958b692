"""Collapse and bias against steps: a line per arm, with a band over all of its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING

import records
from debias_figures import MASKED_LOSS, NC3, PERPLEXITY
from debias_table import BASE, ONE_STATE, by_arm, label
from records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NOT_DRAWN = (NC3, PERPLEXITY, MASKED_LOSS)


def draw_debias(rows: Sequence[Record]) -> Figure:
    """`rows` as `records.read(results, "debias")` gives them: a row of panels per experiment."""
    from matplotlib.figure import Figure

    experiments = records.grouped(records.latest(rows, ONE_STATE), ("device", "case"))
    drawn = [_names(experiment) for experiment in experiments]
    width = max(map(len, drawn))
    figure = Figure(figsize=(5 * width, 4 * len(experiments)), layout="constrained")
    panels = figure.subplots(len(experiments), width, squeeze=False)
    for axes, experiment, names in zip(panels, experiments, drawn, strict=True):
        for axis, name in zip(axes, names, strict=False):
            _draw(axis, experiment, name)
        for axis in axes[len(names) :]:
            axis.set_axis_off()
        axes[0].set_title(fill(experiment[0]["case"], 70), fontsize=8, loc="left")
    return figure


def _names(rows: Sequence[Record]) -> list[str]:
    found = dict.fromkeys(name for row in rows for name in row["figures"])
    return [name for name in found if name not in _NOT_DRAWN]


def _draw(axis: Axes, rows: Sequence[Record], name: str) -> None:
    start = [row["figures"].get(name) for row in rows if row["arm"] == BASE]
    for arm, members in by_arm(row for row in rows if row["arm"] != BASE).items():
        values = {0: start} if start else {}
        for row in members:
            values.setdefault(row["step"], []).append(row["figures"].get(name))
        values = {step: [v for v in found if v is not None] for step, found in values.items()}
        steps = sorted(step for step, found in values.items() if found)
        means = [sum(values[step]) / len(values[step]) for step in steps]
        axis.plot(steps, means, marker="o", label=label(arm))
        ends = ([end(values[step]) for step in steps] for end in (min, max))
        axis.fill_between(steps, *ends, alpha=0.2)
    neutral = rows[0]["neutral"].get(name)
    if neutral is not None:
        axis.axhline(neutral, color="#777777", linestyle=":", label="neutral")
    axis.set_xlabel("steps")
    unit = rows[0]["units"].get(name)
    axis.set_ylabel(fill(f"{name}, {unit}" if unit else name, 40), fontsize=8)
    axis.legend(fontsize=8)
