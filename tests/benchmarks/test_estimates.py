"""The guide's tables of what jobs need are those that `fastdean estimate` computes."""

from __future__ import annotations

from pathlib import Path

from benchmarks.estimates import tables
from benchmarks.harness.tables import replace_between_markers

ROOT = Path(__file__).resolve().parents[2]


def test_the_guide_shows_what_is_computed():
    page = (ROOT / "docs" / "guide" / "large-jobs.md").read_text("utf-8")
    computed = tables.tables()
    assert replace_between_markers(page, tables.MARKER, computed) == page
    for name, shape in tables.SHAPES.items():
        split = [each for each in tables.SPLIT if each[0] == name]
        assert computed.count(f"| {shape} |") == 1 + len(tables.GPUS) + len(split)
