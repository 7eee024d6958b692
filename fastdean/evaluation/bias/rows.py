"""The rows of a benchmark, given as they are or by the name of a file or of a hub data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdean.data.sources import load_table
from fastdean.wording.mendable import InputTypeError

Row = Mapping[str, Any]
Source = str | Path | Iterable[Row]


def is_file(source: Source, *suffixes: str) -> bool:
    """Whether `source` names a file that ends in one of `suffixes`."""
    return isinstance(source, str | Path) and str(source).lower().endswith(suffixes)


def benchmark_rows(source: Source, **hub_defaults: str) -> list[Row]:
    """The rows of `source`, in order, with the benchmark's own columns.

    Args:
        source: rows, or what `fastdean.data.load_table` reads.
        hub_defaults: `split` and `config` of the hub data set, where the source names none.
    Raises:
        TypeError: `source` is neither, or a row is no mapping.
        ValueError: no rows, or a source that cannot be read.
    """
    if isinstance(source, str | Path):
        return load_table(source, **hub_defaults)
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise InputTypeError(
            "source must be rows, the path of a file or a hub id, got "
            f"{type(source).__name__}; give a list of dictionaries"
        )
    rows = list(source)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise InputTypeError(
                f"source must hold dictionaries, got {type(row).__name__} as row {number}; give "
                "each row its columns by name"
            )
    if not rows:
        raise ValueError("source must hold at least one row, got none; check its filter")
    return rows


def require_columns(rows: Sequence[Row], columns: Sequence[str], measure: str) -> None:
    """Raise ValueError for the first row that lacks one of `columns`, or text in it."""
    for number, row in enumerate(rows, start=1):
        missing = [column for column in columns if column not in row]
        if missing:
            raise ValueError(
                f"row {number} must have the columns {', '.join(columns)} of {measure}, got no "
                f"{' and no '.join(missing)} in {sorted(map(str, row))}; rename its columns"
            )
        for column in columns:
            if not isinstance(row[column], str) or not row[column].strip():
                raise ValueError(
                    f"row {number} must be text in the column {column!r} of {measure}, got "
                    f"{row[column]!r:.40}; correct the row or leave it out"
                )
