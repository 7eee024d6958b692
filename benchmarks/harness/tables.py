"""The tables of a markdown file, made of recorded results.

What stands between `<!-- benchmark: score -->` and `<!-- benchmark end -->` is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.harness import store
from benchmarks.harness.clock import Spread
from benchmarks.harness.store import Record

NOT_MEASURED = "not measured"
Cells = list[str]


@dataclass(frozen=True)
class Table:
    """How an op's records are shown.

    Attributes:
        command: what makes its records.
        latest: of the records alike in these the last run counts.
        groups: records alike in these make one table.
        lines: a group -> (header, the cells of each line).
        notes: a group -> the lines below its table.
    """

    command: str
    latest: tuple[str, ...]
    groups: tuple[str, ...]
    lines: Callable[[Sequence[Record]], tuple[Cells, list[Cells]]]
    notes: Callable[[Sequence[Record]], list[str]]


def rendered(table: Table, records: Iterable[Record]) -> str:
    """One markdown table per group, with what it was measured on below it."""
    texts = []
    for group in store.grouped(store.latest(records, table.latest), table.groups):
        header, lines = table.lines(group)
        rows = [_row(header), "|" + "---|" * len(header), *map(_row, lines)]
        texts.append("\n".join([*rows, "", *table.notes(group)]))
    return "\n\n".join(texts)


def _row(cells: Cells) -> str:
    return f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|"


def spread(record: Record, digits: int = 2) -> str:
    """Seconds: the median, and from the 20th to the 80th percentile."""
    median, p20, p80 = (record[name] for name in ("median_s", "p20_s", "p80_s"))
    return f"{median:.{digits}f} ({p20:.{digits}f} to {p80:.{digits}f})"


def ratio(times: Spread, digits: int = 2) -> str:
    return f"{times.median:.{digits}f}x ({times.p20:.{digits}f} to {times.p80:.{digits}f})"


def times_as_long(seconds: float | None, record: Record) -> str:
    """How many times as long as `record` something takes, as far as it was measured."""
    return NOT_MEASURED if seconds is None else f"{seconds / record['median_s']:.2f}x"


def megabytes(count: int | None) -> str:
    return NOT_MEASURED if count is None else f"{count / 1e6:.0f} MB"


def memory_and_floor(record: Record) -> Cells:
    return [megabytes(record["peak_bytes"]), f"{record['share_of_floor']:.0%}"]


def provenance_lines(group: Sequence[Record]) -> list[str]:
    """A line for each way in which the records were made."""
    return list(dict.fromkeys(map(provenance_line, group)))


def provenance_line(record: Record) -> str:
    """Where, when and with what a record was made, in one line."""
    on = f"{record['device']}, {record['threads']} threads, {record['cpu_capability']}"
    triton = ""
    if record["driver"]:
        on = f"{record['device']}, driver {record['driver']}, CUDA {record['cuda']}"
        triton = f", triton {record['triton']}" if record["triton"] else ""
    # Outside a git checkout the checksum of the sources is what a checkout can be compared with.
    commit = f"sources {record['sources']}" if record["commit"] is None else record["commit"][:10]
    changed = " with changes" if record["dirty"] else ""
    gate = "" if record.gate == store.PASSED else ", tests not run first"
    return (
        f"{on}; torch {record['torch']}{triton}, transformers {record['transformers']}, "
        f"fastdean {record['fastdean']} at {commit}{changed}, {record['date'][:10]}{gate}: "
        f"`{record['command']}`"
    )


def replace_between_markers(text: str, op: str, table: str) -> str:
    """`text` with what stands between the op's markers replaced by `table`."""
    begin, end = f"<!-- benchmark: {op} -->", "<!-- benchmark end -->"
    pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    page, count = pattern.subn(lambda match: f"{begin}\n{table}\n{end}", text)
    if count != 1:
        raise ValueError(
            f"the file must hold the lines {begin} and {end} once, got them {count} times; "
            "write them where the table is to stand"
        )
    return page
