"""Implementations side by side: a bar each, with the 20th to the 80th percentile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import records
from records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KIND = ("device", "case", "dtype")


def draw_score(rows: Sequence[Record]) -> Figure:
    """`rows` as `records.read(results, "score")` gives them; at least one."""
    # Not pyplot: it would keep the figure, and ask the machine for a display.
    from matplotlib.figure import Figure

    panels = records.grouped(records.latest(rows, _KIND), _KIND)
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        _draw_panel(axis, panel)
        axis.set_title("\n".join(panel[0][key] for key in _KIND), fontsize=9)
    return figure


def _draw_panel(axis: Axes, rows: Sequence[Record]) -> None:
    medians = [row["median_s"] for row in rows]
    spread = [
        [row["median_s"] - row["p20_s"] for row in rows],
        [row["p80_s"] - row["median_s"] for row in rows],
    ]
    names = [row["impl"] + ("\nextrapolated" if row["extrapolated"] else "") for row in rows]
    bars = axis.bar(names, medians, yerr=spread, capsize=4, color="#8aa4c8")
    axis.bar_label(bars, fmt="%.2f", padding=3)
    axis.axhline(rows[0]["floor_s"], color="#b03a2e", linestyle="--", label="floor")
    axis.set_ylabel("seconds")
    axis.set_ylim(bottom=0)
    axis.margins(y=0.15)
    axis.legend()
