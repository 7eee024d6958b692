"""The tables of a markdown file, from the recorded results:

    python benchmarks/table.py --op score --into docs/performance.md

What stands between `<!-- benchmark: score -->` and `<!-- benchmark end -->` is replaced; without
`--into` the table is printed. Of each device, case and dtype the latest run counts. `--op` names
the results: `score`, `agreement`, `sweep`, `patch`, `regularizer`, `debias`, or one of the
operations.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import records
from debias_table import debias_table
from operations.catalogue import OPERATIONS
from operations.results_table import operations_table
from records import Record
from regularizer_table import regularizer_table
from shown import rows_to_show
from timing import Spread

_NAMES = {
    "published": "published procedure",
    "loop": "plain loop",
    "vmap": "`torch.func.vmap`",
    "fastdean": "`fastdean.score`",
}


def score_table(rows: Iterable[Record]) -> str:
    """One markdown table per run and case, with what it was measured on below it."""
    chosen = records.latest(rows, ("device", "case", "dtype"))
    return "\n\n".join(
        _score_run(run) for run in records.grouped(chosen, ("device", "case", "date"))
    )


def _score_run(run: Sequence[Record]) -> str:
    lines = [
        "| dtype | | seconds (p20 to p80) | tokens/s | vs plain loop | vs published "
        "| peak memory | floor / time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    sizes = []
    for rows in records.grouped(run, ("dtype",)):
        lines += [f"| {' | '.join(_score_cells(row, rows))} |" for row in rows]
        row = rows[0]
        sizes.append(
            f"{row['dtype']}: {row['examples']} examples, {row['tokens']} tokens, "
            f"floor {row['floor_s']:.2f} s at {row['matrix_rate'] / 1e9:.1f} GFLOP/s"
            + (f", sums {row['sums_bytes'] / 1e6:.0f} MB" if "sums_bytes" in row else "")
        )
    lines += ["", f"{run[0]['case']}. {'; '.join(sizes)}. {records.provenance_line(run[0])}"]
    return "\n".join([*lines, *(_where_time_goes(row) for row in run if row.get("breakdown"))])


def _where_time_goes(row: Record) -> str:
    shares = ", ".join(f"{name} {share:.0%}" for name, share in row["breakdown"].items())
    return f"\nOne profiled run of {_NAMES[row['impl']]}, {row['dtype']}: {shares}."


def _score_cells(row: Record, rows: Sequence[Record]) -> list[str]:
    median = {each["impl"]: each["median_s"] for each in rows}
    note = f", extrapolated from {row['extrapolated']}" if row["extrapolated"] else ""
    return [
        row["dtype"],
        _NAMES[row["impl"]] + note,
        f"{row['median_s']:.2f} ({row['p20_s']:.2f} to {row['p80_s']:.2f})",
        f"{row['tokens_per_s']:.0f}",
        _times(median.get("loop"), row),
        _times(median.get("published"), row),
        _bytes_held(row["peak_bytes"]),
        f"{row['share_of_floor']:.0%}",
    ]


def _times(seconds: float | None, row: Record) -> str:
    """How many times as long as `row` something takes, as far as it was measured."""
    return "not measured" if seconds is None else f"{seconds / row['median_s']:.2f}x"


def agreement_table(rows: Iterable[Record]) -> str:
    """One markdown table per device and case."""
    chosen = records.latest(rows, ("device", "case"))
    return "\n\n".join(_agreement_run(run) for run in records.grouped(chosen, ("device", "case")))


def _agreement_run(run: Sequence[Record]) -> str:
    lines = [
        "| selection | of | ratio | k | kept (mean) | kept (worst matrix) | equal matrices |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in run:
        least, most = row["k"]
        cells = [
            row["impl"],
            row["reference"],
            "" if row["ratio"] is None else f"{row['ratio']:g}",
            str(least) if least == most else f"{least} to {most}",
            f"{row['kept']:.1%}",
            f"{row['kept_least']:.1%}",
            f"{row['equal']} of {row['matrices']}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    first = run[0]
    size = f"{first['examples']} examples, {first['tokens']} tokens"
    return "\n".join([*lines, "", f"{first['case']}. {size}. {records.provenance_line(first)}"])


def sweep_table(rows: Iterable[Record]) -> str:
    """One markdown table per device and sweep."""
    # A resumed sweep has several dates: the latest of each point, not of each run.
    chosen = records.latest(rows, ("device", "sweep", "x", "impl"))
    return "\n\n".join(_sweep(run) for run in records.grouped(chosen, ("device", "sweep")))


def _sweep(run: Sequence[Record]) -> str:
    lines = [
        f"| {run[0]['sweep']} | | seconds (p20 to p80) | tokens/s | floor / time |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(run, key=lambda row: row["x"]):
        cells = [
            f"{row['x']:,.0f}",
            _NAMES[row["impl"]],
            f"{row['median_s']:.2f} ({row['p20_s']:.2f} to {row['p80_s']:.2f})",
            f"{row['tokens_per_s']:.0f}",
            f"{row['share_of_floor']:.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    made = dict.fromkeys(records.provenance_line(row) for row in run)
    return "\n".join([*lines, "", *made])


def patch_table(rows: Iterable[Record]) -> str:
    """One markdown table per device, checkpoint and file system."""
    keys = ("device", "case", "file_system")
    chosen = records.latest(rows, keys)
    return "\n\n".join(_patch_run(run) for run in records.grouped(chosen, keys))


def _patch_run(run: Sequence[Record]) -> str:
    plain = [row for row in run if row["impl"] != "fastdean"]
    lines = [
        "| | seconds (p20 to p80) | "
        + "".join(f"vs {row['how']} | " for row in plain)
        + "peak memory | of it during the call |",
        "|---" * (4 + len(plain)) + "|",
    ]
    for row in run:
        cells = [
            row["how"],
            f"{row['median_s']:.2f} ({row['p20_s']:.2f} to {row['p80_s']:.2f})",
            *(_paired(row, other) for other in plain),
            _bytes_held(row["process_peak_bytes"]),
            _bytes_held(row["peak_bytes"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    first = run[0]
    on = "" if first["file_system"] is None else f", on {first['file_system']}"
    made = f"{first['case']}{on}, {first['repeats']} rounds"
    return "\n".join([*lines, "", f"{made}. {records.provenance_line(first)}"])


def _paired(row: Record, other: Record) -> str:
    """How many times as long as `other` a row takes, round by round."""
    if row is other:
        return "1.00x"
    times = Spread.of_ratios(row["seconds"], other["seconds"])
    return f"{times.median:.2f}x ({times.p20:.2f} to {times.p80:.2f})"


def _bytes_held(count: int | None) -> str:
    return "not measured" if count is None else f"{count / 1e6:.0f} MB"


TABLES: dict[str, Callable[[Iterable[Record]], str]] = {
    "score": score_table,
    "agreement": agreement_table,
    "sweep": sweep_table,
    "patch": patch_table,
    "regularizer": regularizer_table,
    "debias": debias_table,
    **dict.fromkeys(OPERATIONS, operations_table),
}


def replace_between_markers(text: str, op: str, table: str) -> str:
    """`text` with what stands between the op's markers replaced by `table`.

    Raises:
        ValueError: the markers are not there exactly once.
    """
    begin, end = f"<!-- benchmark: {op} -->", "<!-- benchmark end -->"
    pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    found = len(pattern.findall(text))
    if found != 1:
        raise ValueError(
            f"the file must hold the lines {begin} and {end} once, got them {found} times; "
            "write them where the table is to stand"
        )
    return pattern.sub(lambda match: f"{begin}\n{table}\n{end}", text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", choices=list(TABLES), default="score")
    parser.add_argument("--results", type=Path, default=records.RESULTS)
    parser.add_argument("--into", type=Path, help="markdown file with the two marker lines")
    options = parser.parse_args(argv)
    try:
        table = TABLES[options.op](rows_to_show(options.results, options.op))
        if options.into is None:
            print(table)
        else:
            text = replace_between_markers(options.into.read_text("utf-8"), options.op, table)
            options.into.write_text(text, "utf-8")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
