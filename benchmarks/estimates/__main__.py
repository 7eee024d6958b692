"""Print the tables of estimates, or put them into a page: `python -m benchmarks.estimates`.

python -m benchmarks.estimates --into docs/guide/large-jobs.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.estimates.tables import MARKER, tables
from benchmarks.harness.tables import replace_between_markers


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimates")
    parser.add_argument("--into", type=Path, help="a page with the marker of the tables")
    page = parser.parse_args().into
    if page is None:
        print(tables())
    elif not page.is_file():
        parser.error(f"--into must be a page with the marker, got {str(page)!r}, which is no file")
    else:
        page.write_text(replace_between_markers(page.read_text("utf-8"), MARKER, tables()), "utf-8")


if __name__ == "__main__":
    main()
