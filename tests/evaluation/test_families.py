"""Tests that are read together, paired yes and no, and what a design can find."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
from scipy import stats

from fastdean.evaluation.statistics.bootstrap import bootstrap_interval
from fastdean.evaluation.statistics.changes import of_confidence
from fastdean.evaluation.statistics.families import Family, holm, judged_together
from fastdean.evaluation.statistics.intervals import (
    mean_interval,
    share_change_interval,
    share_interval,
    student_quantile,
)
from fastdean.evaluation.statistics.mcnemar import compare_yes_no
from fastdean.evaluation.statistics.power import POWER, detectable_change, detectable_share_change


def normal(n, mean=0.0, seed=0):
    return np.random.default_rng(seed).normal(mean, 1.0, n)


# Holm


def test_holms_p_values_are_those_of_the_closed_test():
    """A hypothesis falls where Bonferroni refuses every set of hypotheses that it is in."""
    for p in np.random.default_rng(0).uniform(0, 0.3, (30, 5)):
        sets = [c for size in range(1, 6) for c in itertools.combinations(range(5), size)]
        closed = [
            max(min(1.0, len(each) * min(p[i] for i in each)) for each in sets if one in each)
            for one in range(5)
        ]
        assert holm(list(p)) == pytest.approx(closed)


def test_holms_p_values_of_a_case_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.01, 0.04], tests=4) == pytest.approx([0.04, 0.12])
    assert holm([0.02, 0.02]) == [0.04, 0.04] and holm([]) == [] and holm([0.9, 0.9]) == [1.0, 1.0]


def test_what_is_no_family_is_refused():
    with pytest.raises(ValueError, match=r"tests must be at least the 2 p-values, got 1; count"):
        holm([0.1, 0.2], tests=1)
    with pytest.raises(ValueError, match=r"p_values must lie in 0..1, got nan; leave out"):
        holm([math.nan])
    with pytest.raises(ValueError, match=r"changes must have intervals of confidence 0.975, got"):
        Family(2).judged({"a": mean_interval(normal(9))})


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: holm([None]), "p_values must be a number, got None"),
        (lambda: holm([0.1], math.nan), "tests must be an integer, got nan"),
        (lambda: Family(1.5), "tests must be an integer, got 1.5"),
        (lambda: Family(2, "0.95"), "confidence must be a number, got '0.95'"),
        (lambda: mean_interval(["a"]), "values must be numbers that float64 can hold, got others"),
        (lambda: mean_interval([None]), "values must be numbers that float64 can hold, got others"),
        (lambda: mean_interval([10**400]), "values must be numbers that float64 can hold, got"),
        (lambda: share_interval([-1.0, 0.0], -1), "whole must be a number above 0, got -1"),
        (lambda: share_change_interval([0.0], math.nan), "whole must be a number above 0, got nan"),
        (lambda: detectable_share_change(-1, 0.5), "n must be at least 0, got -1"),
        (lambda: detectable_share_change(9.5, 0.5), "n must be an integer, got 9.5"),
        (lambda: detectable_share_change(9, math.nan), "discordant must lie in 0..1, got nan"),
        (lambda: detectable_share_change(9, 2), "discordant must lie in 0..1, got 2"),
        (lambda: detectable_share_change(9, 0.5, 0), "level must be between 0 and 1, got 0"),
        (lambda: detectable_share_change(9, 0.5, power=1), "power must be between 0 and 1, got 1"),
        (lambda: detectable_change(mean_interval(normal(9)), math.nan), "power must be between 0"),
    ],
)
def test_numbers_that_are_none_give_no_figure(call, text):
    with pytest.raises((TypeError, ValueError), match=re.escape(text)):
        call()


def test_of_many_changes_of_nothing_hardly_one_family_claims_any():
    """20 tests each: alone, most families would hold a verdict."""
    alone = together = 0
    for seed in range(40):
        differences = {i: normal(12, seed=1000 * seed + i) for i in range(20)}
        family = Family(20)
        confidence = family.confidence_of_each
        found = family.judged(
            {i: mean_interval(v, confidence=confidence) for i, v in differences.items()}
        )
        together += any(each["verdict"] in ("higher", "lower") for each in found.values())
        alone += any(each["p_value"] <= 0.05 for each in found.values())
    assert together <= 6 and alone >= 20


def test_a_verdict_takes_the_adjusted_p_value_and_the_wider_interval():
    family = Family(3)
    confidence = family.confidence_of_each
    assert confidence == pytest.approx(1 - 0.05 / 3)
    centred = normal(40) - normal(40).mean()
    strong, weak = centred + 1.0, centred + 2.25 * stats.sem(centred)
    assert mean_interval(weak).verdict() == "higher"
    found = family.judged(
        {
            "strong": mean_interval(strong, confidence=confidence),
            "weak": mean_interval(weak, confidence=confidence),
        }
    )
    assert found["strong"]["verdict"] == "higher"
    assert found["weak"]["p_value"] <= 0.05 < found["weak"]["p_holm"]
    assert found["weak"]["verdict"] == "no effect beyond noise"
    error = stats.sem(strong)
    half = stats.t.ppf(1 - 0.05 / 6, 39) * error
    assert found["strong"]["high"] - strong.mean() == pytest.approx(half)


def test_a_family_too_large_for_its_samples_says_so():
    eight = {0: np.arange(1.0, 9.0)}
    for tests, said in ((1, "higher"), (6, "higher"), (7, "no verdict from n = 8 in 7 tests")):
        family = Family(tests)
        changes = {
            i: mean_interval(v, confidence=family.confidence_of_each) for i, v in eight.items()
        }
        assert family.judged(changes)[0]["verdict"] == said


# McNemar


@pytest.mark.parametrize(("won", "lost", "same"), [(12, 3, 40), (1, 9, 0), (5, 5, 7), (0, 0, 9)])
def test_yes_and_no_before_and_after_are_mcnemars_exact_test(won, lost, same):
    before = [False] * won + [True] * lost + [True] * same + [None, True]
    after = [True] * won + [False] * lost + [True] * same + [True, None]
    found = compare_yes_no(before, after)
    expected = stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert found.p_value == pytest.approx(expected) and found.test == "exact McNemar"
    assert found.n == won + lost + same
    assert found.mean == pytest.approx((won - lost) / found.n)


def test_answers_that_are_not_paired_or_no_answers_are_refused():
    with pytest.raises(
        ValueError, match=r"same questions as before \(1\), got 2; pair the answers"
    ):
        compare_yes_no([True], [True, False])
    with pytest.raises(TypeError, match=r"answers must be True, False or None, got 1; compare"):
        compare_yes_no([True], [1])


# Power


@pytest.mark.parametrize(("n", "confidence"), [(8, 0.95), (20, 0.99), (200, 0.95)])
def test_the_detectable_mean_is_found_by_the_t_test_with_the_power_that_is_stated(n, confidence):
    interval = mean_interval(normal(n), confidence=confidence)
    error = (interval.high - interval.low) / 2 / student_quantile(n - 1, confidence)
    found, quantile = detectable_change(interval), student_quantile(n - 1, confidence)
    far = stats.nct(n - 1, found / error)
    assert far.sf(quantile) + far.cdf(-quantile) == pytest.approx(POWER, abs=1e-4)


def test_a_ratio_s_detectable_change_is_a_ratio():
    logs = normal(30)
    ratio = mean_interval(logs, logs=True, no_effect=1.0)
    assert detectable_change(ratio) == pytest.approx(
        math.exp(detectable_change(mean_interval(logs)))
    )


@pytest.mark.parametrize(("n", "discordant"), [(40, 0.3), (25, 0.05), (60, 0.9)])
def test_the_detectable_change_of_a_share_is_found_by_mcnemars_test(n, discordant):
    """Every outcome of n questions, with scipy's binomial test."""
    change = detectable_share_change(n, discordant)
    share = max(discordant, change)
    won = (share + change) / 2
    power = 0.0
    for changed in range(n + 1):
        refused = (
            [k for k in range(changed + 1) if stats.binomtest(k, changed).pvalue <= 0.05]
            if changed
            else []
        )
        power += stats.binom.pmf(changed, n, share) * sum(
            stats.binom.pmf(refused, changed, min(1.0, won / share))
        )
    assert power == pytest.approx(POWER, abs=1e-6)


def test_of_a_million_questions_only_the_likely_counts_are_looked_at(monkeypatch):
    """A million counts in each of 60 steps would take half a minute."""
    looked_at = []
    plain = np.arange
    monkeypatch.setattr("fastdean.evaluation.statistics.power.np.arange",
                        lambda *a, **k: looked_at.append(a) or plain(*a, **k))  # fmt: skip
    found = detectable_share_change(10**6, 0.3)
    counts = sum(last - first for first, last in looked_at)
    assert counts < 60 * 20_000
    # With so many it is that of a normal distribution.
    needed = (stats.norm.isf(0.025) + stats.norm.ppf(POWER)) * math.sqrt(0.3 / 10**6)
    assert found == pytest.approx(needed, rel=0.02)


def test_where_nothing_can_be_found_no_figure_is_given():
    assert detectable_share_change(5, 0.5) is None and detectable_share_change(8, 1.0) < 1.0
    assert detectable_change(mean_interval(normal(7))) is None
    assert detectable_change(mean_interval([1.0] * 9)) is None
    changes = share_change_interval([1.0, -1.0, *[0.0] * 98], 1.0)
    assert detectable_change(changes) == pytest.approx(detectable_share_change(100, 0.02))


def test_changes_are_judged_together_and_those_without_a_test_stand_apart():
    """The same as a family made by hand; a bootstrap counts as no test."""
    draw = np.random.default_rng(3)
    values = {name: draw.normal(shift, 1.0, 40) for name, shift in (("a", 0.9), ("b", 0.1))}
    untested = bootstrap_interval(lambda index: index.double().mean(1), 9, resamples=50)
    taken = {
        name: (lambda confidence, found=found: mean_interval(found, confidence=confidence))
        for name, found in values.items()
    } | {"c": untested}
    judged, family = judged_together(taken)
    assert family == Family(2)
    by_hand = {name: mean_interval(found, confidence=0.975) for name, found in values.items()}
    assert judged == Family(2).judged({**by_hand, "c": untested})
    assert judged["a"]["verdict"] == "higher" and judged["c"]["p_holm"] is None


def test_an_interval_of_another_confidence_is_made_of_the_same_values():
    draw = np.random.default_rng(1)
    values = draw.normal(size=30)
    weights = draw.uniform(1, 2, 30)
    wins = [100.0, 0.0, 100.0, 100.0, 50.0, 100.0, 100.0, 100.0, 100.0, 100.0]
    resampled = {"resamples": 200, "seed": 4}

    def boot(confidence):
        return bootstrap_interval(
            lambda index: index.double().mean(1), 9, confidence=confidence, **resampled
        )

    for take in (
        lambda c: mean_interval(values, confidence=c),
        lambda c: mean_interval(values, weights=weights, no_effect=0.5, confidence=c),
        lambda c: share_interval(wins, 100.0, no_effect=50.0, confidence=c),
        boot,
    ):
        found, expected = of_confidence(take(0.95), 0.99), take(0.99)
        assert found == expected and found.to_dict() == expected.to_dict()
        assert found.high - found.low > take(0.95).high - take(0.95).low
