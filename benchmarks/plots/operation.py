"""One operation's contenders over what its cases vary; a panel for each other setting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import records
from records import Record

from plots.lines import draw_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Op -> what is on the x axis, and what tells panels apart.
_AXES = {
    "importance": ("tokens_per_example", ("rows", "columns", "examples")),
    "unit_importance": ("tokens", ("units",)),
    "selection": ("ratio", ("rows", "columns")),
    "mask": ("matrices", ("rows", "columns")),
    "expert_importance": ("examples", ("experts", "active", "rows", "columns")),
    "collapse": ("labelled", ("tokens", "features", "classes")),
}


def draw_operation(rows: Sequence[Record]) -> Figure:
    """`rows` as `rows_to_show` gives them, of one op."""
    from matplotlib.figure import Figure

    x, panel_keys = _AXES[rows[0]["op"]]
    chosen = records.latest(rows, ("device", "case", "dtype", "impl"))
    # The floor is a line of its own already.
    chosen = [row | row["settings"] for row in chosen if row["impl"] != row["floor"]]
    panels = records.grouped(chosen, ("device", *panel_keys))
    figure = Figure(figsize=(4.5 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        draw_seconds(axis, panel, x, scale=1e3)
        axis.set_xlabel(x.replace("_", " "))
        axis.set_ylabel("milliseconds")
        sizes = ", ".join(f"{key} {panel[0][key]:,}" for key in panel_keys)
        axis.set_title(f"{panel[0]['device']}\n{sizes}", fontsize=9)
    return figure
