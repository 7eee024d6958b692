"""The words of a verdict are the same wherever it is shown, and claim no more than it does."""

from __future__ import annotations

import math

import pytest

from fastdean.debias.card import Effect
from fastdean.report.estimates import Estimate
from fastdean.wording.verdicts import NO_INTERVAL, reading, verb


@pytest.mark.parametrize(
    ("low", "high", "verdict", "said", "moved"),
    [
        (0.1, 0.3, "higher", "higher", "rose"),
        (-0.3, -0.1, "lower", "lower", "fell"),
        (-0.3, -0.1, "closer to neutral", "closer to neutral", "fell"),
        (0.0, 0.3, "higher", "no effect beyond noise", "did not change beyond noise"),
        (0.1, 0.3, None, "not judged", "was not judged"),
        (0.1, 0.3, "", "not judged", "was not judged"),
        (0.1, 0.3, 3, "not judged", "was not judged"),
        (0.1, 0.3, "no neutral value", "no neutral value", "has no neutral value"),
        (-0.1, 0.3, "no verdict from n = 5", "no verdict from n = 5", "has no verdict from n = 5"),
        (None, None, "no verdict from n = 1", "no verdict from n = 1", "has no verdict from n = 1"),
        (None, None, "higher", NO_INTERVAL, f"has {NO_INTERVAL}"),
        (0.1, math.nan, "higher", NO_INTERVAL, f"has {NO_INTERVAL}"),
        (0.1, math.inf, "higher", NO_INTERVAL, f"has {NO_INTERVAL}"),
    ],
)
def test_a_page_a_card_and_a_sentence_read_a_verdict_alike(low, high, verdict, said, moved):
    assert reading(low, high, 0.0, verdict) == said
    assert verb(said) == moved
    row = Estimate("row", 0.2, low, high, verdict)
    assert row.reading(0.0) == said
    assert row.is_effect(0.0) == (moved in ("rose", "fell"))
    assert Effect("metric", 1.0, 1.2, low, high, verdict).reading() == said


def test_a_card_claims_no_distance_from_neutral_without_an_interval():
    assert Effect("SS", 60.0, 55.0, from_neutral="closer to neutral").reading() == NO_INTERVAL


def test_an_adjusted_p_value_above_five_per_cent_claims_nothing_anywhere():
    for p_holm, said in ((0.05, "higher"), (0.051, "no effect beyond noise"), (None, "higher")):
        assert reading(0.1, 0.3, 0.0, "higher", p_holm) == said
    assert reading(0.1, 0.3, 0.0, "no verdict from n = 5", 0.9) == "no verdict from n = 5"
