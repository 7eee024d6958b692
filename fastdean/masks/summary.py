"""Counts of a mask: the table with one row per matrix, and its sums per layer and per module.

The counts are weights, or units where the scores were per unit. The optional column "weights" says
how many weights stand behind "kept"; without it they are as many. Where the scores had signs,
"same" and "opposite" divide the coupled ones, and "same_by_chance" says how many of independent
signs would be the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastdean.files.declared import Kind, Lists, Maybe, Real, Record, Text, Whole

_COLUMNS: dict[str, Kind] = {
    "name": Text(longest=1000),
    "layer": Maybe(Whole()),
    "module": Text(longest=1000),
    "numel": Maybe(Whole()),
    "k": Maybe(Whole()),
    "first": Maybe(Whole()),
    "second": Maybe(Whole()),
    "coupled": Maybe(Whole()),
    "removed": Maybe(Whole()),
    "kept": Whole(),
}
TABLE_COLUMNS = tuple(_COLUMNS)
# What a table looks like in a file.
TABLE = Lists(
    Record(
        _COLUMNS,
        optional={
            "weights": Whole(),
            "same": Whole(),
            "opposite": Whole(),
            "same_by_chance": Real(least=0),
        },
    )
)
SIGN_COLUMNS = ("same", "opposite", "same_by_chance")
_CANDIDATES = ("first", "second", "coupled", "removed")
_COUNTS = (*_CANDIDATES, "kept")
# What the rule left out of the coupled ones is spared; what it keeps is what the mask edits.
_HEADINGS = {"removed": "spared", "same_by_chance": "same by chance"}


@dataclass(frozen=True)
class MaskSummary:
    """Counts of a mask: `rows` per layer, `modules` per module name, `total` over all.

    Each row has "layer" (int, None outside of layers) or "module", "matrices", "first", "second",
    "coupled", "removed", "kept" and "weights", and `SIGN_COLUMNS` where the scores had signs (the
    last is no whole number); counts that the mask does not know are None. `unit` is what is
    counted, "weights" or "units"; "weights" is the number of weights in either case. `str()` gives
    the rows of the layers and the total as an aligned table, in which "removed" is headed "spared"
    and "kept" by what happens to these: "zeroed", or "scaled" by another `scale`. Where no set was
    spared (`spares`), that column is left out.
    """

    rows: list[dict[str, Any]]
    modules: list[dict[str, Any]]
    total: dict[str, Any]
    unit: str = "weights"
    scale: float = 0.0
    spares: bool = True

    @classmethod
    def of(
        cls,
        table: Sequence[Mapping[str, Any]],
        unit: str,
        scale: float = 0.0,
        spares: bool = True,
    ) -> MaskSummary:
        """The sums of a table's rows."""
        return cls(
            rows=_aggregate(table, "layer"),
            modules=_aggregate(table, "module"),
            total=_sum_rows({"layer": "total"}, table),
            unit=unit,
            scale=scale,
            spares=spares,
        )

    def __str__(self) -> str:
        counts = [column for column in _COUNTS if column != "removed" or self.spares]
        columns: tuple[str, ...] = ("layer", "matrices", *counts)
        done = "zeroed" if self.scale == 0 else "scaled"
        caption = []
        if "same" in self.total:
            columns = (*columns, *SIGN_COLUMNS)
            caption.append("same, opposite: signs of the coupled ones on the two sets")
        if self.unit != "weights":
            columns = (*columns, "weights")
            caption += [f"counted in {self.unit}; weights: those of the {self.unit} {done}"]
        headings = {**_HEADINGS, "kept": done}
        head = [headings.get(column, column) for column in columns]
        body = [[_cell(row[column]) for column in columns] for row in [*self.rows, self.total]]
        widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in [head, *body]
        ]
        return "\n".join([*caption, *lines])


def check_table(table: Sequence[Mapping[str, Any]], weights: Mapping[str, int]) -> None:
    """Raise ValueError unless the rows say what a mask with so many weights per parameter holds."""
    for row in table:
        missing = [column for column in TABLE_COLUMNS if column not in row]
        if missing:
            raise ValueError(
                f"table must have the columns {', '.join(TABLE_COLUMNS)}, got a row without "
                f"{missing[0]!r}"
            )
        column = "weights" if "weights" in row else "kept"
        held = weights.get(row["name"], 0)
        if row[column] != held:
            raise ValueError(
                f"table must agree with entries, got {column}={row[column]} for {row['name']!r}, "
                f"which has {held} weights"
            )
    names = [row["name"] for row in table]
    if len(set(names)) != len(names) or not set(weights) <= set(names):
        raise ValueError(
            "table must have exactly one row per matrix, and one for every entry, got "
            f"{len(names)} rows of {len(set(names))} names for {len(weights)} entries"
        )


def rows_from_names(weights: Mapping[str, int]) -> list[dict[str, Any]]:
    """Rows for parameter name -> number of weights, where the candidates are not known."""
    return [
        {**dict.fromkeys(_CANDIDATES), **place_of(name), "kept": count}
        for name, count in weights.items()
    ]


def place_of(name: str) -> dict[str, Any]:
    """Layer number and module name, read off a parameter's name."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if _is_number(part)), None)
    inner = parts[0 if number is None else number + 1 :]
    return {
        "layer": None if number is None else int(parts[number]),
        "module": ".".join(inner[:-1] or inner),
    }


def _is_number(part: str) -> bool:
    """Whether a part of a name numbers a layer; "²" is a digit too, but no number."""
    return part.isascii() and part.isdigit() and len(part) < 10


def _aggregate(table: Sequence[Mapping[str, Any]], key: str) -> list[dict[str, Any]]:
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in table:
        groups.setdefault(row[key], []).append(row)
    return [_sum_rows({key: value}, group) for value, group in groups.items()]


def _sum_rows(head: dict[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    sums = {
        column: None if any(row[column] is None for row in rows) else sum(r[column] for r in rows)
        for column in _COUNTS
    }
    if rows and all("same" in row for row in rows):
        sums |= {column: sum(row[column] for row in rows) for column in SIGN_COLUMNS}
    weights = sum(row.get("weights", row["kept"]) for row in rows)
    return {**head, "matrices": len(rows), **sums, "weights": weights}


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    return "-" if value is None else str(value)
