"""How `fastdean.score` grows: seconds above, tokens per second below, one column a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import records
from records import Record

from plots.lines import FLOOR, draw_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_sweep(rows: Sequence[Record]) -> Figure:
    """`rows` as `records.read(results, "sweep")` gives them; at least one."""
    from matplotlib.figure import Figure

    chosen = records.latest(rows, ("device", "sweep", "x", "impl"))
    columns = records.grouped(chosen, ("device", "sweep"))
    figure = Figure(figsize=(4.5 * len(columns), 7), layout="constrained")
    axes = figure.subplots(2, len(columns), squeeze=False)
    for above, below, column in zip(*axes, columns, strict=True):
        draw_seconds(above, column, "x")
        above.set_ylabel("seconds")
        above.set_title(f"{column[0]['device']}\n{column[0]['sweep']}", fontsize=9)
        _draw_tokens(below, column)
        for axis in (above, below):
            axis.set_xlabel(column[0]["sweep"])
    return figure


def _draw_tokens(axis: Axes, rows: Sequence[Record]) -> None:
    ordered = sorted(rows, key=lambda row: row["x"])
    for line in records.grouped(ordered, ("impl",)):
        places, rates = ([row[key] for row in line] for key in ("x", "tokens_per_s"))
        axis.plot(places, rates, marker="o", label=line[0]["impl"])
    best = {row["x"]: row["tokens"] / row["floor_s"] for row in ordered}
    axis.plot(list(best), list(best.values()), **FLOOR)
    axis.set_xscale("log", base=2)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("tokens per second")
    axis.legend(fontsize=8)
