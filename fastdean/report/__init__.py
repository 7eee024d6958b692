"""One HTML page of a run's results: plain dictionaries in, one self-contained file out."""

from __future__ import annotations

from fastdean.report.page import is_report, render_report, write_report
from fastdean.report.results import read_results

__all__ = ["is_report", "read_results", "render_report", "write_report"]
