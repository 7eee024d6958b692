"""From rows to batches: where rows come from, how they become tokens, which go together."""

from __future__ import annotations

from fastdean.data.examples import Example, encode, read_examples
from fastdean.data.sources import load_rows, load_table, sample_rows

__all__ = ["Example", "encode", "load_rows", "load_table", "read_examples", "sample_rows"]
