"""One HTML page of a run's results: plain dictionaries in, one self-contained file out.

Beside it a Markdown card, and the verdict of both as one line.
"""

from __future__ import annotations

from fastdean.report.card import render_card, write_card
from fastdean.report.page import is_report, render_report, write_report
from fastdean.report.results import read_results
from fastdean.report.verdict import verdict_line

__all__ = [
    "is_report",
    "read_results",
    "render_card",
    "render_report",
    "verdict_line",
    "write_card",
    "write_report",
]
