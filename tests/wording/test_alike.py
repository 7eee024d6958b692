"""Reasons that several things share are told once."""

from __future__ import annotations

import pytest

from fastdean.wording.alike import told_together

OFFLINE = "source '{0}' must be a file, got: Couldn't reach '{0}' on the Hub; check the id"


@pytest.mark.parametrize(
    ("reasons", "told"),
    [
        ({}, ""),
        ({"a": "no row"}, "a (no row)"),
        ({"a": "no row", "b": "no row"}, "a, b (no row)"),
        ({"a": "no 'x'", "b": "no row"}, "a (no 'x'); b (no row)"),
        (
            {"a": OFFLINE.format("me/a"), "s": "no id", "b": OFFLINE.format("me/b")},
            "a 'me/a', b 'me/b' (source SRC must be a file, got: Couldn't reach SRC on the Hub; "
            "check the id); s (no id)",
        ),
        # An apostrophe begins no quotation.
        ({"a": "can't read 'x'", "b": "can't read 'y'"}, "a 'x', b 'y' (can't read SRC)"),
    ],
)
def test_a_reason_stands_once_with_all_that_have_it(reasons, told):
    assert told_together(reasons) == told
