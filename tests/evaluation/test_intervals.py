"""Intervals of means and shares, their tests, and what it takes to earn a verdict."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from fastdean.evaluation.statistics.bootstrap import bootstrap_interval
from fastdean.evaluation.statistics.changes import change_between, change_of_distance
from fastdean.evaluation.statistics.intervals import (
    Interval,
    by_unit,
    mean_interval,
    share_change_interval,
    share_interval,
    student_quantile,
)
from fastdean.evaluation.statistics.sign_flips import DRAWS, _group_sums, sign_flip_test
from fastdean.wording.verdicts import direction, is_withheld, judge

NO_EFFECT = "no effect beyond noise"


def normal(n, mean=0.0, seed=0):
    return np.random.default_rng(seed).normal(mean, 1.0, n)


# Means


@pytest.mark.parametrize("n", [2, 5, 40])
def test_a_mean_has_students_interval(n):
    values = normal(n)
    found = mean_interval(values, confidence=0.9)
    low, high = stats.t.interval(0.9, n - 1, values.mean(), stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
    assert found.mean == pytest.approx(values.mean()) and found.method == "student-t"


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (30, 2.0423)])
def test_students_quantiles_are_those_of_the_tables(freedom, quantile):
    assert student_quantile(freedom) == pytest.approx(quantile, abs=1e-4)


def test_groups_of_one_size_are_a_mean_of_their_means():
    values = normal(24)
    sums, counts = by_unit(torch.tensor(values), [i % 8 for i in range(24)])
    grouped = mean_interval(sums, weights=counts)
    means = mean_interval(values.reshape(3, 8).mean(0))
    for name in ("mean", "low", "high", "p_value", "n"):
        assert getattr(grouped, name) == pytest.approx(getattr(means, name))
    assert grouped.n == 8


def test_a_row_repeated_within_its_group_makes_nothing_more_certain():
    values = torch.tensor(normal(10, 0.5))
    once = mean_interval(values)
    sums, counts = by_unit(values.repeat(20), list(range(10)) * 20)
    repeated = mean_interval(sums, weights=counts)
    assert (repeated.low, repeated.high, repeated.p_value) == pytest.approx(
        (once.low, once.high, once.p_value)
    )
    assert mean_interval(values.repeat(20)).high - once.mean < 0.3 * (once.high - once.mean)


def test_weights_make_a_ratio_of_sums_with_its_linearised_spread():
    sums, sizes = np.array([10.0, 3.0, -4.0, 8.0]), np.array([5.0, 1.0, 2.0, 4.0])
    found = mean_interval(sums, weights=sizes)
    ratio = 17 / 12
    spread = np.std((sums - ratio * sizes) / 3.0, ddof=1)
    assert found.mean == pytest.approx(ratio)
    assert found.high - ratio == pytest.approx(3.182446 * spread / 2, rel=1e-6)


def test_a_ratio_is_judged_by_its_log():
    logs = normal(12, 1.0)
    plain, ratio = mean_interval(logs), mean_interval(logs, logs=True, no_effect=1.0)
    assert (ratio.mean, ratio.low, ratio.high) == pytest.approx(
        tuple(math.exp(v) for v in (plain.mean, plain.low, plain.high))
    )
    assert (ratio.p_value, ratio.verdict()) == (plain.p_value, "higher")
    assert ratio.method == "student-t of logs"


def test_an_infinite_ratio_is_refused_and_an_infinite_bound_is_not():
    with pytest.raises(
        ValueError, match="ratio must be finite, got inf; the mean of its logs is 800"
    ):
        mean_interval([800.0] * 9, logs=True, no_effect=1.0)
    wide = mean_interval([1e3, -1e3, 1.0], logs=True, no_effect=1.0)
    assert math.isinf(wide.high) and wide.low == 0.0


# The sign-flip test


@pytest.mark.parametrize("seed", range(3))
def test_up_to_16_changes_every_pattern_is_counted(seed):
    values = np.round(normal(7, 0.4, seed), 1)
    sums = [np.dot(signs, values) for signs in itertools.product((1, -1), repeat=7)]
    share = np.mean(np.abs(sums) >= abs(values.sum()) - 1e-9)
    with_zeros = np.concatenate([values, np.zeros(30)])
    for differences in (values, with_zeros):
        found = sign_flip_test(differences)
        assert found.p_value == pytest.approx(share)
        assert found.method == f"sign-flip, all 2^{np.count_nonzero(values)} patterns"


def test_beyond_16_patterns_are_drawn_by_the_seed_and_p_is_never_zero():
    values = normal(17, 0.3)
    found = sign_flip_test(values, seed=3)
    assert found.method == "sign-flip, 100,000 draws" and DRAWS == 100_000
    assert sign_flip_test(values, seed=3) == found
    assert sign_flip_test(values, seed=4).p_value != found.p_value
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=16)))
    sums = np.abs(np.concatenate([values[0] + signs @ values[1:]]))
    exact = np.mean(sums >= abs(values.sum()) - 1e-9)
    assert found.p_value == pytest.approx(exact, abs=0.005)
    far = sign_flip_test(np.arange(100.0, 140.0))
    assert far.p_value == far.least_p == 1 / (1 + DRAWS)


def test_a_group_holds_the_product_of_every_choice_of_its_generators():
    values = normal(9, 0.3)
    codes = np.random.default_rng(5).integers(0, 8, size=9, dtype=np.int32)
    generators = [np.where(codes >> bit & 1, -1.0, 1.0) for bit in range(3)]
    patterns = [
        np.prod(
            [g for g, chosen in zip(generators, choice, strict=True) if chosen] or [np.ones(9)],
            axis=0,
        )
        for choice in itertools.product((0, 1), repeat=3)
    ]
    found = _group_sums(values, seed=5, generators=3)
    assert sorted(found) == pytest.approx(sorted(pattern @ values for pattern in patterns))
    assert found[0] == pytest.approx(values.sum())


@pytest.mark.parametrize("z", [0.5, 2.0, 2.5])
def test_any_number_of_differences_is_tested_at_once_and_as_exactly(z, monkeypatch):
    # By the draws it would take a minute, and this many signs no memory holds.
    monkeypatch.setattr("fastdean.evaluation.statistics.sign_flips._extreme_draws", None)
    values = normal(200_000)
    values -= values.mean()
    values += z * np.sqrt((values**2).mean() / (len(values) - z**2))
    found = sign_flip_test(values, seed=1)
    assert found.method == "sign-flip, a random group of 131,072 patterns"
    # So many signed differences sum to a normal number.
    expected = 2 * stats.norm.sf(z)
    deviation = np.sqrt(expected * (1 - expected) / 2**17)
    assert found.p_value == pytest.approx(expected, abs=4 * deviation)
    assert sign_flip_test(values, seed=1) == found != sign_flip_test(values, seed=2)
    far = sign_flip_test(values + 1.0)
    assert far.p_value == far.least_p == 2.0**-17


def test_a_group_rejects_no_more_often_than_its_level_says(monkeypatch):
    monkeypatch.setattr("fastdean.evaluation.statistics.sign_flips.GROUP_FROM", 17)
    monkeypatch.setattr("fastdean.evaluation.statistics.sign_flips._GENERATORS", 8)
    sizes = np.random.default_rng(0).exponential(size=(2000, 24)) ** 2
    signs = np.random.default_rng(1).choice([-1.0, 1.0], size=sizes.shape)
    found = [sign_flip_test(values, seed=n) for n, values in enumerate(sizes * signs)]
    assert np.mean([each.p_value <= 0.1 for each in found]) == pytest.approx(0.1, abs=0.025)


def test_the_test_leaves_the_global_random_state_alone():
    np.random.seed(0)
    expected = np.random.rand()
    np.random.seed(0)
    sign_flip_test(normal(20))
    assert np.random.rand() == expected


def test_changes_of_one_size_are_counted_exactly_at_any_n():
    differences = np.array([1.0] * 30 + [-1.0] * 12 + [0.0] * 100)
    found = sign_flip_test(differences)
    assert found.p_value == pytest.approx(stats.binomtest(30, 42).pvalue, rel=1e-9)
    assert found.method == "exact binomial"


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_no_size_of_values_overflows_the_test(scale):
    values = normal(9, 0.5)
    assert sign_flip_test(values * scale).p_value == sign_flip_test(values).p_value


# Verdicts


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([1.0, 1.1, 0.9, 1.2, 0.8, 1.0, 1.1, 0.9], "higher"),
        ([-1.0, -1.1, -0.9, -1.2, -0.8, -1.0, -1.1, -0.9], "lower"),
        ([-1.0, 1.1, -0.9, 1.2, -0.3, 1.0, -0.7, 0.4], NO_EFFECT),
        # Eight equal differences: no width, and p = 2 / 2^8.
        ([0.25] * 8, "higher"),
        ([0.0] * 8, NO_EFFECT),
        # One change among many is one coin thrown.
        ([0.0] * 99 + [1.0], NO_EFFECT),
        ([1.0, 1.1, 0.9, 1.2, 0.8, 1.0, 1.1], "no verdict from n = 7"),
        ([0.0] * 5, "no verdict from n = 5"),
        ([5.0], "no verdict from n = 1"),
        ([], "no verdict from n = 0"),
    ],
)
def test_verdict(differences, verdict):
    found = mean_interval(differences)
    assert found.verdict() == verdict
    assert is_withheld(verdict) == (len(differences) < 8)


def test_interval_and_test_must_agree():
    # One far value keeps the interval over zero while every sign is the same.
    all_up = mean_interval([1.0] * 9 + [40.0])
    assert all_up.p_value < 0.01 and all_up.low < 0
    assert all_up.verdict() == NO_EFFECT
    options = {"n": 20, "confidence": 0.95, "least_p": 1e-5}
    assert judge(0.1, 0.3, 0.0, p_value=0.05, **options) == "higher"
    assert judge(0.1, 0.3, 0.0, p_value=0.0501, **options) == NO_EFFECT
    assert judge(0.0, 0.3, 0.0, p_value=0.001, **options) == NO_EFFECT
    assert judge(0.1, 0.3, None, p_value=0.001, **options) == "no neutral value"


def test_a_level_that_the_test_cannot_reach_has_no_verdict():
    values = [1.0, 1.1, 0.9, 1.2, 0.8, 1.0, 1.1, 0.9]
    assert mean_interval(values, confidence=0.99).verdict() == "higher"
    assert mean_interval(values, confidence=0.999).verdict() == "no verdict from n = 8"
    many = mean_interval(normal(50, 9.0), confidence=1 - 1e-6)
    assert many.verdict() == "no verdict from n = 50"


def test_no_confidence_is_so_low_that_a_change_at_a_higher_p_than_the_level_is_claimed():
    values = [1.0] * 6 + [-0.9, -0.8]
    assert 0.05 < mean_interval(values).p_value < 0.5
    assert mean_interval(values, confidence=0.5).low > 0.0
    assert mean_interval(values, confidence=0.5).verdict() == "no effect beyond noise"


@pytest.mark.parametrize(
    "call",
    [
        lambda: mean_interval(torch.ones(9, dtype=torch.complex64)),
        lambda: mean_interval(np.ones(9, dtype=complex)),
        lambda: mean_interval(normal(20), seed="1"),
        lambda: mean_interval(normal(20), seed=0.5),
    ],
)
def test_what_is_no_real_number_is_refused(call):
    with pytest.raises(TypeError, match="must be .*, got"):
        call()


def test_directions_are_those_of_known_words():
    words = (
        "higher",
        "below neutral",
        "closer to neutral",
        NO_EFFECT,
        "no verdict from n = 3",
        "up",
    )
    assert [direction(word) for word in words] == [1, -1, -1, 0, None, None]
    assert direction(None) is None


def test_too_few_examples_have_no_bounds_and_no_test():
    for found in (mean_interval([5.0]), share_interval([1.0], no_effect=0.5)):
        assert found.n == 1 and found.mean > 0
        assert math.isnan(found.low) and math.isnan(found.high) and found.p_value is None
    assert math.isnan(mean_interval([]).mean) and math.isnan(share_interval([]).mean)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([0.0, math.nan]), "values must be finite, got nan at index 1"),
        (lambda: mean_interval([math.inf, 0.0]), "values must be finite, got inf at index 0"),
        (lambda: mean_interval([[0.0, 1.0]]), r"values must be of shape \[n\], got \[1, 2\]"),
        (lambda: mean_interval(normal(20), seed=-1), r"seed must be from 0 to 2\*\*63 - 1, got -1"),
        (lambda: mean_interval([0.0], confidence=95), "confidence must be between 0 and 1, got 95"),
        (lambda: share_interval([0.0], confidence=0), "confidence must be between 0 and 1, got 0"),
        (lambda: mean_interval([0.0, 1.0], weights=[1, 0]), "weights must be positive and as many"),
        (lambda: mean_interval([0.0, 1.0], weights=[1]), r"as many as values \(2\), got 1"),
        (lambda: share_interval([0.0, 0.3]), "values must be 0, 0.5 or 1, got 0.3"),
        (lambda: share_interval([math.nan]), "values must be finite, got nan"),
        (lambda: mean_interval([1e308] * 9), "values must have a mean .* hold, got up to 1e.308"),
        (lambda: mean_interval([1e300, -1e300]), "values must have a mean and a spread that"),
        (lambda: mean_interval([1.0, 2.0], no_effect=math.nan), "no_effect must be a finite numb"),
        (lambda: mean_interval([1.0, 2.0], no_effect=0, logs=True), "no_effect must be .* above 0"),
    ],
)
def test_errors_name_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Shares


@pytest.mark.parametrize(("yes", "n"), [(7, 10), (0, 12), (12, 12), (60, 100)])
def test_a_share_has_the_exact_interval_and_test(yes, n):
    found = share_interval([100.0] * yes + [0.0] * (n - yes), 100.0, no_effect=50.0)
    exact = stats.binomtest(yes, n)
    ends = exact.proportion_ci(method="exact")
    assert (found.low, found.high) == pytest.approx((100 * ends.low, 100 * ends.high))
    assert found.p_value == pytest.approx(exact.pvalue)
    assert (found.method, found.test) == ("clopper-pearson", "exact binomial")


def test_ties_count_as_half_and_decide_nothing():
    found = share_interval([100.0] * 9 + [50.0] * 4 + [0.0] * 2, 100.0, no_effect=50.0)
    assert found.mean == pytest.approx(1100 / 15)
    assert found.p_value == pytest.approx(stats.binomtest(9, 11).pvalue)
    assert found.low < found.mean < found.high
    all_tied = share_interval([50.0] * 20, 100.0, no_effect=50.0)
    assert all_tied.low < 50 < all_tied.high and all_tied.verdict() == NO_EFFECT


def test_a_paired_change_of_a_share_has_mcnemars_test():
    changes = [1.0] * 12 + [-1.0] * 2 + [0.0] * 36
    found = share_change_interval(changes)
    assert found.mean == pytest.approx(0.2)
    assert found.p_value == pytest.approx(stats.binomtest(12, 14).pvalue)
    assert found.test == "exact McNemar" and found.verdict() == "higher"
    # Newcombe's method 10 by hand, on exact intervals.
    won, lost = (stats.binomtest(k, 50).proportion_ci(method="exact") for k in (12, 2))
    r = -math.sqrt(12 * 2 / (38 * 48))
    a, b = 0.24 - won.low, lost.high - 0.04
    assert found.low == pytest.approx(0.2 - math.sqrt(a * a - 2 * r * a * b + b * b))


def test_no_share_changes_by_more_than_all_of_it():
    # As means over seeds are: thirds of a change.
    thirds = [1.0, 1.0, -1.0, 1 / 3]
    cut, free = share_change_interval(thirds, confidence=0.999), mean_interval(thirds)
    assert free.low < -1.0 and free.high > 1.0
    assert (cut.low, cut.high, cut.p_value) == (-1.0, 1.0, free.p_value)


def test_no_change_of_a_share_still_has_a_width():
    found = share_change_interval([0.0] * 50)
    assert found.low == pytest.approx(-0.0711, abs=1e-4) and found.high == -found.low
    assert found.verdict() == NO_EFFECT


# Changes between two estimates


def test_a_change_of_means_is_that_of_paired_differences():
    before, after = normal(30, 0.0, 1), normal(30, 0.0, 2)
    found = change_between(mean_interval(before), mean_interval(after))
    assert found == mean_interval(after - before)


def test_a_change_of_shares_is_that_of_won_and_lost_examples():
    before = share_interval([0.0] * 10 + [100.0] * 5, 100.0)
    after = share_interval([100.0] * 9 + [0.0] + [100.0] * 5, 100.0)
    found = change_between(before, after)
    assert found.test == "exact McNemar" and found.p_value == pytest.approx(2 / 2**9)
    assert found.mean == pytest.approx(60.0) and found.verdict() == "higher"


def test_a_change_of_a_bootstrapped_statistic_has_an_interval_and_no_verdict():
    values = torch.tensor(normal(20))
    before, after = (
        bootstrap_interval(lambda index, s=s: (s * values[index]).std(1), 20, resamples=99)
        for s in (1.0, 3.0)
    )
    found = change_between(before, after)
    assert found.low > 0 and found.mean == pytest.approx(2 * float(values.std()))
    assert found.verdict() == "no verdict from an interval without a test"
    nearer = change_of_distance(before, after, before.mean)
    assert nearer.mean == pytest.approx(after.mean - before.mean)


def test_far_from_neutral_the_change_of_distance_is_the_change():
    before, after = normal(12, 50.0, 1), normal(12, 48.0, 2)
    moved = mean_interval(after - before)
    found = change_of_distance(mean_interval(before), mean_interval(after), 0.0)
    assert (found.mean, found.low, found.high) == pytest.approx((moved.mean, moved.low, moved.high))
    assert found.verdict() == "lower"
    below = change_of_distance(mean_interval(before), mean_interval(after), 100.0)
    assert (below.low, below.high) == pytest.approx((-moved.high, -moved.low))
    assert below.verdict() == "higher"


def test_from_one_side_of_neutral_to_the_other_is_not_closer():
    values = 0.1 * normal(20)
    over, under = mean_interval(values + 1.0), mean_interval(-values[::-1] - 1.0)
    assert change_between(over, under).verdict() == "lower"
    found = change_of_distance(over, under, 0.0)
    assert found.verdict() == NO_EFFECT and found.low < 0 < found.high


def test_near_neutral_the_side_must_be_known_too():
    spread = normal(40)
    before, after = mean_interval(spread + 0.05), mean_interval(spread - 0.05 + 0.01 * spread[::-1])
    assert change_between(before, after).verdict() == "lower"
    assert change_of_distance(before, after, 0.0).verdict() == NO_EFFECT


def test_changes_between_other_examples_are_refused():
    of = mean_interval
    with pytest.raises(ValueError, match="must have the same n, got 5 and 6"):
        change_between(of(normal(5)), of(normal(6)))
    with pytest.raises(ValueError, match="must have the same confidence, got 0.9 and 0.95"):
        change_between(of(normal(5), confidence=0.9), of(normal(5)))
    with pytest.raises(ValueError, match="must have the same weights, got others"):
        change_between(of(normal(3), weights=[1, 2, 3]), of(normal(3)))

    def drawn(n, resamples=10):
        return bootstrap_interval(lambda i: i.double().mean(1), n, resamples=resamples)

    with pytest.raises(ValueError, match="must have intervals of one kind, got 'student-t' and 'p"):
        change_between(of(normal(1)), replace(drawn(1), resamples=0))
    with pytest.raises(ValueError, match="must have the same resamples, got 10 and 20"):
        change_between(drawn(5), drawn(5, 20))
    assert math.isnan(change_between(drawn(1), drawn(1)).low)
    assert math.isnan(change_of_distance(of([1.0]), of([2.0]), 0.0).low)


# What is promised, simulated

SHAPES = {
    "normal": lambda random, size: random.normal(size=size),
    "t3": lambda random, size: random.standard_t(3, size=size),
    "exponential": lambda random, size: random.exponential(size=size) - 1.0,
    "lognormal": lambda random, size: random.lognormal(size=size) - math.exp(0.5),
}
SAMPLES = 2000


@pytest.mark.slow
@pytest.mark.parametrize("n", [4, 8, 16, 32, 64])
@pytest.mark.parametrize(
    ("shape", "covered", "wrong"),
    # At least so much of 95 %, and at most so many verdicts of 5 %; skew keeps neither at small n.
    [
        ("normal", {4: 0.94, 8: 0.94, 16: 0.94, 32: 0.94, 64: 0.94}, 0.06),
        ("t3", {4: 0.94, 8: 0.94, 16: 0.94, 32: 0.94, 64: 0.94}, 0.06),
        ("exponential", {4: 0.86, 8: 0.88, 16: 0.90, 32: 0.91, 64: 0.92}, 0.11),
        ("lognormal", {4: 0.81, 8: 0.82, 16: 0.85, 32: 0.87, 64: 0.89}, 0.16),
    ],
)
def test_intervals_cover_and_verdicts_err_as_the_documents_say(
    shape, covered, wrong, n, monkeypatch
):
    # As honest with fewer draws, and less to wait for.
    monkeypatch.setattr("fastdean.evaluation.statistics.sign_flips.DRAWS", 1999)
    samples = SHAPES[shape](np.random.default_rng(0), (SAMPLES, n))
    found = [mean_interval(sample) for sample in samples]
    assert np.mean([each.low <= 0 <= each.high for each in found]) >= covered[n]
    verdicts = [each.verdict() for each in found]
    if n < 8:
        assert all(map(is_withheld, verdicts))
    assert np.mean([bool(direction(verdict)) for verdict in verdicts]) <= wrong


@pytest.mark.slow
@pytest.mark.parametrize(("n", "least", "most"), [(8, 0.16, 0.24), (32, 0.73, 0.81)])
def test_half_a_standard_deviation_is_found_as_often_as_the_documents_say(
    n, least, most, monkeypatch
):
    monkeypatch.setattr("fastdean.evaluation.statistics.sign_flips.DRAWS", 1999)
    samples = np.random.default_rng(0).normal(0.5, 1.0, (SAMPLES, n))
    found = [mean_interval(sample).verdict() == "higher" for sample in samples]
    assert least <= np.mean(found) <= most


@pytest.mark.slow
@pytest.mark.parametrize("n", [8, 16, 32, 64])
def test_shares_and_changes_of_distance_keep_their_level(n, monkeypatch):
    monkeypatch.setattr("fastdean.evaluation.statistics.sign_flips.DRAWS", 1999)
    random = np.random.default_rng(n)
    for share in (0.5, 0.7, 0.95):
        found = [share_interval(row) for row in (random.random((SAMPLES, n)) < share).astype(float)]
        assert np.mean([each.low <= share <= each.high for each in found]) >= 0.95
    for won, lost in ((0.05, 0.05), (0.2, 0.05), (0.45, 0.45), (0.7, 0.25)):
        chance = random.random((SAMPLES, n))
        changes = (chance < won).astype(float) - (chance > 1 - lost)
        found = [share_change_interval(row) for row in changes]
        assert np.mean([each.low <= won - lost <= each.high for each in found]) >= 0.945
        if won == lost:
            assert np.mean([bool(direction(each.verdict())) for each in found]) <= 0.05
    # Before and after about a neutral value of 0; in the last two the distance does not change.
    for start, end in ((0.5, 0.0), (0.3, 0.2), (0.5, 0.5), (0.5, -0.5)):
        rows = random.normal(size=(3, SAMPLES // 4, n)) * np.array([1.0, 0.5, 0.5])[:, None, None]
        before, after = rows[0] + rows[1] + start, rows[0] + rows[2] + end
        found = [
            change_of_distance(
                mean_interval(b, no_effect=None), mean_interval(a, no_effect=None), 0
            )
            for b, a in zip(before, after, strict=True)
        ]
        truth = abs(end) - abs(start)
        assert np.mean([each.low <= truth <= each.high for each in found]) >= 0.93
        if truth == 0:
            assert np.mean([bool(direction(each.verdict())) for each in found]) <= 0.065


def test_an_interval_as_json_values():
    found = mean_interval([0.5, 1.5, 2.5]).to_dict()
    assert list(found) == [
        "mean", "low", "high", "interval_method", "p_value", "test", "verdict"
    ]  # fmt: skip
    assert found["mean"] == 1.5 and found["low"] < 1.5 < found["high"]
    one = mean_interval([1.0]).to_dict()
    # JSON has no NaN.
    assert one["low"] is None and one["high"] is None
    none = mean_interval([]).to_dict()
    assert none["mean"] is None and json.loads(json.dumps(none, allow_nan=False)) == none
    endless = Interval(1.0, 0.5, math.inf, 9, 0.95, "student-t of logs", 1.0).to_dict()
    assert (endless["low"], endless["high"]) == (0.5, None)
