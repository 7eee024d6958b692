"""A plugin of pytest that notes each test as it starts and as it ends, one JSON object a line.

What was noted stays true when the run is cut: which tests have passed, which one was running. The
file is named by FASTDEAN_WATCHED_TESTS.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    path = os.environ.get("FASTDEAN_WATCHED_TESTS")
    # The processes of pytest-xdist report to the first one, which notes.
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Notes(Path(path)))


class _Notes:
    def __init__(self, path: Path) -> None:
        self._path = path

    def _note(self, test: str, outcome: str, why: str = "") -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"test": test, "outcome": outcome, "why": why}) + "\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._note(nodeid, "started")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test that fails in its teardown has passed before, and failed all the same.
        if report.when == "call" or report.outcome != "passed":
            self._note(report.nodeid, report.outcome, _why(report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._note(report.nodeid, "failed", _why(report))


def _why(report: pytest.TestReport | pytest.CollectReport) -> str:
    """What went wrong, in one line; "" where nothing did."""
    if report.outcome == "passed":
        return ""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        return crash.message.splitlines()[0] if crash.message else ""
    if isinstance(report.longrepr, tuple):  # skipped: file, line, reason
        return report.longrepr[2]
    lines = [line for line in str(report.longrepr).splitlines() if line.strip()]
    return lines[-1] if lines else ""
