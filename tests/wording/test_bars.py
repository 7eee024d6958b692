"""Whose progress bars are drawn where."""

from __future__ import annotations

import pytest
import tqdm.auto

from fastdean.coupling.scoring import _progress_bar
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
def test_a_log_has_our_bars_alone(monkeypatch, terminal, shown, ours, theirs):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(bars, "_can_redraw", lambda: terminal)
    with bars.bars(shown):
        assert (not _progress_bar(1, "ex", "score", True).disable) is ours
        for kind in (tqdm.tqdm, tqdm.auto.tqdm, Kind):
            assert (not kind(total=1, disable=False).disable) is theirs
    assert not Kind(total=1, disable=False).disable
