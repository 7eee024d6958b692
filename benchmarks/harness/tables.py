"""The tables of a markdown file, made of recorded results.

What stands between `<!-- benchmark: score -->` and `<!-- benchmark end -->` is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import store
from benchmarks.harness.clock import Spread
from benchmarks.harness.store import Record

NOT_MEASURED = "not measured"
# In the middle the median, in brackets from the 20th to the 80th percentile.
SPREAD = "{median_s:.2f} ({p20_s:.2f} to {p80_s:.2f})"
# A cell: a format of the record's fields, or a function of what its line is made of.
Columns = Mapping[str, str | Callable[[Any], str]]


@dataclass(frozen=True)
class Table:
    """How an op's records are shown.

    Attributes:
        command: what makes its records.
        columns: heading -> cell, or a group -> these.
        notes: a format of a group's first record, whose provenance follows it; or a group -> the
            lines below its table.
        latest: of the records alike in these the last run counts.
        groups: records alike in these make one table; (): as `latest`.
        lines: a group -> what each line of its table is made of.
    """

    command: str
    columns: Columns | Callable[[Sequence[Record]], Columns]
    notes: str | Callable[[Sequence[Record]], list[str]]
    latest: tuple[str, ...] = ("device", "case")
    groups: tuple[str, ...] = ()
    lines: Callable[[Sequence[Record]], Sequence[Any]] = list


def rendered(table: Table, records: Iterable[Record]) -> str:
    """One markdown table per group, with what it was measured on below it."""
    texts = []
    for group in store.grouped(store.latest(records, table.latest), table.groups or table.latest):
        columns = table.columns(group) if callable(table.columns) else table.columns
        cells = [[_shown(cell, line) for cell in columns.values()] for line in table.lines(group)]
        notes = table.notes
        if isinstance(notes, str):
            notes = [f"{notes.format_map(group[0])} {provenance_line(group[0])}"]
        else:
            notes = notes(group)
        texts.append("\n".join([*markdown(list(columns), cells), "", *notes]))
    return "\n\n".join(texts)


def _shown(cell: str | Callable[[Any], str], line: Any) -> str:
    return cell.format_map(line) if isinstance(cell, str) else cell(line)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = [f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in r)}|" for r in (header, *rows)]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]


def ratio(times: Spread, digits: int = 2) -> str:
    return f"{times.median:.{digits}f}x ({times.p20:.{digits}f} to {times.p80:.{digits}f})"


def share(part: float | None, whole: float | None) -> str:
    """How many times `whole` something is, as far as both were measured."""
    return NOT_MEASURED if part is None or not whole else f"{part / whole:.2f}x"


def megabytes(count: int | None) -> str:
    return NOT_MEASURED if count is None else f"{count / 1e6:.0f} MB"


def megabytes_of(name: str) -> Callable[[Record], str]:
    return lambda record: megabytes(record[name])


# Groups of which each run makes a table of its own.
RUNS = ("device", "case", "date")
# Of contenders that took turns over tokens.
TURNS: Columns = {"seconds (p20 to p80)": SPREAD, "tokens/s": "{tokens_per_s:.0f}"}
PEAK: Columns = {"peak memory": megabytes_of("peak_bytes")}
FLOOR: Columns = {"floor / time": "{share_of_floor:.0%}"}


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
