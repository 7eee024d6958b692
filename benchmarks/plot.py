"""The recorded times as a picture: `python benchmarks/plot.py --out score.png`.

One panel for each device, case and dtype, of its latest run: a bar per implementation (median
seconds, with the 20th to the 80th percentile), and the floor as a line. Needs the extra `plot`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import records

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]

_KIND = ("device", "case", "dtype")


def draw(rows: Sequence[Record]) -> Figure:
    """`rows` as `records.read(results, "score")` gives them; at least one."""
    # Not pyplot: it would keep the figure, and ask the machine for a display.
    from matplotlib.figure import Figure

    panels: dict[tuple, list[Record]] = {}
    for row in records.latest(rows, _KIND):
        panels.setdefault(tuple(row[key] for key in _KIND), []).append(row)
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (kind, panel) in zip(axes, panels.items(), strict=True):
        _draw_panel(axis, panel)
        axis.set_title("\n".join(kind), fontsize=9)
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=records.RESULTS)
    parser.add_argument("--out", type=Path, default=Path("score.png"))
    options = parser.parse_args(argv)
    rows = list(records.read(options.results, "score"))
    if not rows:
        print(f"error: no score.jsonl of any device under {options.results}", file=sys.stderr)
        return 2
    draw(rows).savefig(options.out, format="png", dpi=150)
    return 0


if __name__ == "__main__":
    sys.exit(main())
