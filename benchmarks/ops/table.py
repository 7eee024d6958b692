"""The table of one operation: a row for each case, a column for each contender."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import records
from records import Record

# Ours first, whatever was measured first.
_OURS = ("triton", "native", "reference")


def operations_table(rows: Iterable[Record]) -> str:
    """One markdown table per device; `rows` as `rows_to_show` gives them, of one op."""
    # A resumed run has several dates: the latest of each contender, not of each run.
    chosen = records.latest(rows, ("device", "case", "dtype", "impl"))
    return "\n\n".join(_device(run) for run in records.grouped(chosen, ("device",)))


def _device(rows: Sequence[Record]) -> str:
    floors = {row["impl"] for row in rows if row["impl"] == row["floor"]}
    found = dict.fromkeys(row["impl"] for row in rows if row["impl"] not in floors)
    names = sorted(found, key=lambda name: _OURS.index(name) if name in _OURS else len(_OURS))
    ours = names[0]
    header = ["case", "floor", *names, f"{ours} / floor", f"rate of {ours}"]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for case in records.grouped(rows, ("case", "dtype")):
        lines.append(f"| {' | '.join(_cells(case, names, ours))} |")
    made = dict.fromkeys(records.provenance_line(row) for row in rows)
    return "\n".join([*lines, "", _reading(rows), *made])


def _cells(case: Sequence[Record], names: Sequence[str], ours: str) -> list[str]:
    by_name = {row["impl"]: row for row in case}
    measured = by_name.get(ours)
    floor = (measured or case[0])["floor_s"]
    times = [_time(by_name.get(name), measured) for name in names]
    ratio = "" if measured is None else f"{measured['median_s'] / floor:.2f}x"
    rate = "" if measured is None else _rate(measured)
    name = f"{case[0]['case']}, {case[0]['dtype']}"
    return [name, _milliseconds(floor), *times, ratio, rate]


def _time(row: Record | None, ours: Record | None) -> str:
    """Milliseconds, how many times ours that is, and for how many the device is busy."""
    if row is None:
        return ""
    notes = []
    if ours is not None and row is not ours:
        notes.append(f"{row['median_s'] / ours['median_s']:.1f}x")
    if row.get("device_s") is not None:
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
        name: sorted({row["impl"] for row in rows if row["timed_by"] == name})
        for name in dict.fromkeys(row["timed_by"] for row in rows)
    }
    timed_by = "; ".join(f"{name}: {', '.join(impls)}" for name, impls in clocks.items())
    row = rows[0]
    busy = any(each.get("device_s") is not None for each in rows)
    device = " Device: what it is busy for, by torch's profiler, without gaps between launches."
    return (
        f"Medians, and how many times ours the others take; p20 to p80 spans at most "
        f"{spread:.0%} of one. Floor: {row['floor']}. Copies "
        f"{row['copy_bandwidth'] / 1e9:.0f} GB/s, a large bf16 product "
        f"{_operations_per_s(row['matrix_rate'])}. fp32 products of plain torch: {row['product']}. "
        f"Timed by {timed_by}.{device if busy else ''}"
    )
