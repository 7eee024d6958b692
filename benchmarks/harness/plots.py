"""Lines of medians over what was varied, with a band from the 20th to the 80th percentile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import records
from records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FLOOR = {"color": "#b03a2e", "linestyle": "--", "label": "floor"}


def draw_seconds(axis: Axes, rows: Sequence[Record], x: str, scale: float = 1.0) -> None:
    """A line per implementation and the floor, both axes logarithmic.

    Args:
        x: the field of `rows` that was varied.
        scale: what seconds are multiplied with.
    """
    for line in records.grouped(rows, ("impl",)):
        line = sorted(line, key=lambda row: row[x])
        places = [row[x] for row in line]
        axis.plot(
            places, [scale * row["median_s"] for row in line], marker="o", label=line[0]["impl"]
        )
        low, high = ([scale * row[end] for row in line] for end in ("p20_s", "p80_s"))
        axis.fill_between(places, low, high, alpha=0.2)
    floors = {row[x]: scale * row["floor_s"] for row in rows}
    axis.plot(sorted(floors), [floors[place] for place in sorted(floors)], **FLOOR)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel(x)
    axis.legend(fontsize=8)
