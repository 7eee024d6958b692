"""Which records tables and pictures are made of."""

from __future__ import annotations

from pathlib import Path

import records
from operations.catalogue import OPERATIONS
from records import Record


def rows_to_show(results: Path, op: str) -> list[Record]:
    """All records of an op but those of toy runs, whose numbers say nothing; at least one.

    Raises:
        ValueError: there is none, or a file is broken.
    """
    rows = list(records.read(results, op))
    chosen = [row for row in rows if not row.get("toy")]
    if chosen:
        return chosen
    found = "only records of toy runs" if rows else f"no record in {op}.jsonl of any device"
    command = f"kernels --op {op}" if op in OPERATIONS else op
    raise ValueError(
        f"{results} must hold measurements of {op}, got {found}; "
        f"run `python benchmarks/run.py {command}`"
    )
