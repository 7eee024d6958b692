"""The table of `run.py regularizer`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import records
from records import Record

STEP, METRICS = "training step", "collapse_metrics"
# What the others of the same measurement add to.
FLOORS = {STEP: "without", METRICS: "forward passes"}
_NAMES = {
    "without": "without a regulariser",
    "forward passes": "its forward passes alone",
    METRICS: "`collapse_metrics`",
}


def regularizer_table(rows: Iterable[Record]) -> str:
    """One markdown table per device, model and thing measured."""
    keys = ("device", "case", "architecture", "measured")
    chosen = records.latest(rows, keys)
    return "\n\n".join(_table(run) for run in records.grouped(chosen, keys))


def _table(run: Sequence[Record]) -> str:
    first = run[0]
    lines = [
        f"| {first['measured']} | seconds (p20 to p80) | times the first, round by round (p20 to "
        "p80) |",
        "|---|---|---|",
    ]
    for row in run:
        times = f"{row['ratio_median']:.3f}x ({row['ratio_p20']:.3f} to {row['ratio_p80']:.3f})"
        cells = [
            _NAMES.get(row["impl"], f"with it: {row['impl']}"),
            f"{row['median_s']:.3f} ({row['p20_s']:.3f} to {row['p80_s']:.3f})",
            "1.000x" if row["impl"] == FLOORS[first["measured"]] else times + _doubt(row),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    made = (
        f"{first['case']}: {first['tokens']} tokens, {first['labelled']} of them of one of "
        f"{first['classes']} classes, {first['features']} features; {first['repeats']} rounds"
    )
    return "\n".join([*lines, "", f"{made}. {records.provenance_line(first)}"])


def _doubt(row: Record) -> str:
    within = row["ratio_p20"] <= 1 <= row["ratio_p80"]
    return ", no difference beyond noise" if within else ""
