"""Measurements that came back from a GPU, put where the tables are made from.

python3 -m benchmarks.gpu.results OUT RESULTS    # append OUT's records to RESULTS
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.gpu.first import measurements
from benchmarks.harness import store


def main(out: Path, results: Path) -> int:
    rows = measurements(out)
    if any(row.toy or "rehearsal" in row["device"] for row in rows):
        print(f"error: {out / 'results'} must come from a GPU, got a rehearsal's", file=sys.stderr)
        return 2
    for row in rows:
        store.append(results, row)
    print(f"{len(rows)} records appended to {results}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python3 -m benchmarks.gpu.results OUT RESULTS")
    sys.exit(main(*map(Path, sys.argv[1:])))
