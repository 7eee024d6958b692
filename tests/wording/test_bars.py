"""Whose progress bars are drawn where."""

from __future__ import annotations

import pytest
import tqdm.auto

from fastdean.coupling.scoring_job import _progress_bar
from fastdean.wording import bars


class Kind(tqdm.auto.tqdm):
    """As libraries make kinds of their own."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)


@pytest.mark.parametrize(
    ("terminal", "shown", "ours", "theirs"),
    [
        (True, True, True, True),
        (False, True, True, False),
        (True, False, False, False),
        (False, False, False, False),
    ],
)
def test_libraries_draw_none_in_a_log(monkeypatch, terminal, shown, ours, theirs):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(bars, "_can_redraw", lambda: terminal)
    with bars.bars(shown):
        assert (not _progress_bar(1, "ex", "score", True).disable) is ours
        for kind in (tqdm.tqdm, tqdm.auto.tqdm, Kind):
            assert (not kind(total=1, disable=False).disable) is theirs
    assert not Kind(total=1, disable=False).disable


@pytest.mark.parametrize("seconds", [0.0, 3600.0])
def test_in_a_log_ours_are_lines_and_none_where_nothing_takes_long(monkeypatch, capsys, seconds):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(bars, "_can_redraw", lambda: False)
    often = {name: seconds for name in ("delay", "mininterval", "maxinterval")}
    monkeypatch.setattr(bars, "_LINES", bars._LINES | often)
    with bars.bars(True), _progress_bar(3, "ex", "score privacy", True) as bar:
        for _ in range(3):
            bar.update()
    told = capsys.readouterr().err
    if seconds:
        assert told == ""
        return
    lines = told.splitlines()
    assert "\r" not in told and "|" not in told and len(lines) >= 3
    assert all(line.startswith("fastdean: score privacy: ") for line in lines)
    assert " 3 of 3 ex, " in lines[-1]
