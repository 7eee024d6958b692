"""A pytest plugin that notes each test as it starts and as it ends, one JSON object a line.

What was noted stays true when the run is cut. FASTDEAN_WATCHED_TESTS names the file.
"""

from __future__ import annotations

import json
import os

import pytest

_FILE = os.environ.get("FASTDEAN_WATCHED_TESTS")


def _note(test: str, outcome: str, why: str = "") -> None:
    # The processes of pytest-xdist report to the first one, which notes.
    if _FILE and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps({"test": test, "outcome": outcome, "why": why}) + "\n")


def pytest_runtest_logstart(nodeid: str) -> None:
    _note(nodeid, "started")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # A test that fails in its teardown has passed before, and failed all the same.
    if report.when == "call" or report.outcome != "passed":
        _note(report.nodeid, report.outcome, _why(report))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _note(report.nodeid, "failed", _why(report))


def _why(report: pytest.TestReport | pytest.CollectReport) -> str:
    """What went wrong, in one line; "" where nothing did."""
    if report.outcome == "passed":
        return ""
    if isinstance(report.longrepr, tuple):  # skipped: file, line, reason
        return report.longrepr[2]
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        return crash.message.partition("\n")[0]
    lines = [line for line in str(report.longrepr).splitlines() if line.strip()]
    return lines[-1] if lines else ""
