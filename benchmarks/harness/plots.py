"""Pictures of recorded results: lines with a band, or bars, against a floor. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from textwrap import fill
from typing import TYPE_CHECKING

from benchmarks.harness import store
from benchmarks.harness.store import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FLOOR = {"color": "#b03a2e", "linestyle": "--", "label": "floor"}


@dataclass(frozen=True)
class Line:
    """Points from left to right, with a band from `low` to `high` where there are two ends."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Panel:
    """Attributes:
    bars: label -> its (median, 20th, 80th percentile).
    floor: what nothing beats, over x; over bars one height.
    log: the axes with a logarithmic scale: "", "x" or "xy".
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line] = ()
    bars: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    floor: Line | float | None = None
    log: str = ""


# Records of one op, of which at least one -> rows of panels.
Picture = Callable[[Sequence[Record]], list[list[Panel]]]


def drawn(grid: Sequence[Sequence[Panel]]) -> Figure:
    # Not pyplot: it would keep the figure, and ask the machine for a display.
    from matplotlib.figure import Figure

    width = max(map(len, grid))
    figure = Figure(figsize=(5 * width, 4 * len(grid)), layout="constrained")
    panels = figure.subplots(len(grid), width, squeeze=False)
    for axes, row in zip(panels, grid, strict=True):
        for axis, panel in zip(axes, row, strict=False):
            _draw(axis, panel)
        for axis in axes[len(row) :]:
            axis.set_axis_off()
    return figure


def _draw(axis: Axes, panel: Panel) -> None:
    for line in panel.lines:
        axis.plot(line.x, line.y, marker="o", label=line.label)
        if line.low:
            axis.fill_between(line.x, line.low, line.high, alpha=0.2)
    if panel.bars:
        heights, low, high = zip(*panel.bars.values(), strict=True)
        errors = [[h - each for h, each in zip(heights, low, strict=True)]]
        errors += [[each - h for h, each in zip(heights, high, strict=True)]]
        bars = axis.bar(list(panel.bars), heights, yerr=errors, capsize=4, color="#8aa4c8")
        axis.bar_label(bars, fmt="%.2f", padding=3)
        axis.margins(y=0.15)
    if isinstance(panel.floor, Line):
        axis.plot(panel.floor.x, panel.floor.y, **_FLOOR)
    elif panel.floor is not None:
        axis.axhline(panel.floor, **_FLOOR)
    if "x" in panel.log:
        axis.set_xscale("log", base=2)
    if "y" in panel.log:
        axis.set_yscale("log")
    elif panel.floor is not None:
        axis.set_ylim(bottom=0)
    axis.set_title(panel.title, fontsize=9)
    axis.set_xlabel(panel.x_label)
    axis.set_ylabel(fill(panel.y_label, 40), fontsize=8)
    axis.legend(fontsize=8)


def seconds_over(rows: Sequence[Record], x: str) -> tuple[list[Line], Line]:
    """A line of medians for each contender with its percentiles, and the floor; `x`: what was
    varied."""
    rows, lines = sorted(rows, key=lambda row: row[x]), []
    for line in store.grouped(rows, ("contender",)):
        y, low, high = map(list, zip(*(row.spread for row in line), strict=True))
        lines.append(Line(line[0].contender, [row[x] for row in line], y, low, high))
    floors = {row[x]: row["floor_s"] for row in rows}
    return lines, Line("floor", list(floors), list(floors.values()))
