"""The table of one operation: a row for each case, a column for each contender."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from benchmarks.harness import store, tables
from benchmarks.harness.store import Record
from benchmarks.harness.tables import Columns, Table

Case = Mapping[str, Record]
# Ours first, whatever was measured first.
_OURS = ("triton", "native", "reference")
# A resumed run has several dates: the latest of each contender, not of each run.
_LATEST = ("device", "case", "dtype", "contender")


def operation_table(op: str) -> Table:
    return Table(
        f"python -m benchmarks kernels --op {op}",
        _columns,
        lambda rows: [_reading(rows), *tables.provenance_lines(rows)],
        _LATEST,
        ("device",),
        lines=lambda rows: [
            {row.contender: row for row in case} for case in store.grouped(rows, ("case", "dtype"))
        ],
    )


def _columns(rows: Sequence[Record]) -> Columns:
    """Of lines that are contender -> record of one case."""
    names = dict.fromkeys(row.contender for row in rows if row.contender != row["floor"])
    names = sorted(names, key=lambda name: _OURS.index(name) if name in _OURS else len(_OURS))
    ours = names[0]

    def some(case: Case) -> Record:
        return case.get(ours) or next(iter(case.values()))

    return {
        "case": lambda case: f"{some(case).case}, {some(case)['dtype']}",
        "floor": lambda case: _milliseconds(some(case)["floor_s"]),
        **{name: partial(_time, name, ours) for name in names},
        f"{ours} / floor": lambda case: (
            f"{case[ours]['median_s'] / case[ours]['floor_s']:.2f}x" if ours in case else ""
        ),
        f"rate of {ours}": lambda case: _rate(case[ours]) if ours in case else "",
    }


def _time(name: str, ours: str, case: Case) -> str:
    """Milliseconds, how many times ours that is, and for how many the device is busy."""
    if name not in case:
        return ""
    row, notes = case[name], []
    if ours in case and name != ours:
        notes.append(f"{row['median_s'] / case[ours]['median_s']:.1f}x")
    if row["device_s"] is not None:
        notes.append(f"device {_milliseconds(row['device_s'])}")
    return _milliseconds(row["median_s"]) + (f" ({', '.join(notes)})" if notes else "")


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"


def _rate(row: Record) -> str:
    """The rate that bounds it: bytes where the floor is made of bytes, else operations."""
    if row["floor"].startswith("bytes"):
        return f"{row['bytes_per_s'] / 1e9:.0f} GB/s"
    return _operations_per_s(row["operations_per_s"])


def _operations_per_s(rate: float) -> str:
    return f"{rate / 1e12:.1f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.1f} GFLOP/s"


def _reading(rows: Sequence[Record]) -> str:
    """What the numbers are, as far as it is not the same for all tables."""
    spread = max((row["p80_s"] - row["p20_s"]) / row["median_s"] for row in rows)
    clocks = {
        name: sorted({row.contender for row in rows if row["timed_by"] == name})
        for name in dict.fromkeys(row["timed_by"] for row in rows)
    }
    timed_by = "; ".join(f"{name}: {', '.join(names)}" for name, names in clocks.items())
    row = rows[0]
    busy = any(each["device_s"] is not None for each in rows)
    device = " Device: what it is busy for, by torch's profiler, without gaps between launches."
    return (
        f"Medians, and how many times ours the others take; p20 to p80 spans at most "
        f"{spread:.0%} of one. Floor: {row['floor']}. Copies "
        f"{row['copy_bandwidth'] / 1e9:.0f} GB/s, a large bf16 product "
        f"{_operations_per_s(row['matrix_rate'])}. fp32 products of plain torch: {row['product']}. "
        f"Timed by {timed_by}.{device if busy else ''}"
    )
