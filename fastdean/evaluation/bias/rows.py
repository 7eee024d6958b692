"""The rows of a benchmark, from the caller, a file or a hub data set, and what they must hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdean.data.sources import load_table
from fastdean.wording.mendable import InputTypeError

Row = Mapping[str, Any]
Source = str | Path | Iterable[Row]


def file_named(source: object, *suffixes: str) -> Path | None:
    """The file that `source` names, where it ends in one of `suffixes`.

    Raises:
        ValueError: it does not exist.
    """
    if not isinstance(source, str | Path) or not str(source).lower().endswith(suffixes):
        return None
    path = Path(source).expanduser()
    if not path.is_file():
        raise ValueError(f"source must be an existing file, got {str(path)!r}; check the path")
    return path


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
        return list(load_table(source, skip_bad_rows=False, **hub_defaults))
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


def require_columns(
    rows: Sequence[Row], columns: Sequence[str], measure: str, **choices: Sequence[str]
) -> None:
    """Raise ValueError for the first row that lacks text in one of `columns`.

    Also for one whose column in `choices` holds anything but these.
    """
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
    for column, known in choices.items():
        pair = " or ".join(map(repr, known))
        listed = pair if len(known) == 2 else f"one of {', '.join(known)}"
        for number, row in enumerate(rows, start=1):
            if row[column] not in known:
                raise ValueError(
                    f"row {number} must have {listed} in the column {column}, got "
                    f"{row[column]!r}; correct the row"
                )
