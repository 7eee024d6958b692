"""Print the tables of estimates, or put them into a page: `python -m benchmarks.estimates`.

python -m benchmarks.estimates --into docs/guide/large-jobs.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.estimates.tables import MARKER, tables
from benchmarks.harness.command import show


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimates")
    parser.add_argument("--into", type=Path, help="a page with the marker of the tables")
    page = parser.parse_args().into
    try:
        show(tables(), MARKER, page)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
