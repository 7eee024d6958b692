"""Bootstrap intervals: coverage, determinism, and the words drawn from them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from fastdean.evaluation import bootstrap
from fastdean.evaluation.bootstrap import (
    Interval,
    bootstrap_interval,
    change_between,
    paired_bootstrap,
)


def test_interval_is_the_quantiles_of_every_possible_resample():
    differences = [0.0, 1.0, 4.0, 10.0]
    every_mean = [np.mean(draw) for draw in itertools.product(differences, repeat=4)]
    interval = paired_bootstrap(differences, confidence=0.8, resamples=40_000)
    assert interval.mean == 3.75
    # The 256 equally likely means are multiples of 1/4, the drawn quantiles fall on or beside one.
    assert interval.low == pytest.approx(np.quantile(every_mean, 0.1), abs=0.25)
    assert interval.high == pytest.approx(np.quantile(every_mean, 0.9), abs=0.25)


def test_interval_is_as_wide_as_the_standard_error_says():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    interval = paired_bootstrap(values)
    half_width = 1.96 * float(values.std()) / math.sqrt(400)
    assert interval.high - interval.low == pytest.approx(2 * half_width, rel=0.06)
    assert interval.mean == pytest.approx(float(values.mean()))


def test_intervals_cover_the_true_mean_about_as_often_as_they_say():
    samples = np.random.default_rng(0).normal(0.3, 1.0, size=(300, 40))
    intervals = [paired_bootstrap(row, resamples=300, confidence=0.9) for row in samples]
    covered = np.mean([interval.low <= 0.3 <= interval.high for interval in intervals])
    assert 0.83 < covered < 0.95


def test_seed_decides_the_interval():
    values = torch.arange(20.0).square()
    first = paired_bootstrap(values, seed=1, resamples=500)
    assert paired_bootstrap(values, seed=1, resamples=500) == first
    other = paired_bootstrap(values, seed=2, resamples=500)
    assert (other.low, other.high) != (first.low, first.high)


def test_global_random_state_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    paired_bootstrap([0.0, 1.0, 2.0], resamples=10)
    assert torch.equal(torch.rand(1), expected)


def test_drawing_in_chunks_gives_as_many_resamples(monkeypatch):
    monkeypatch.setattr(bootstrap, "_DRAWS_PER_CHUNK", 35)
    rows_seen = []

    def statistic(index):
        rows_seen.append(len(index))
        return index.double().mean(dim=1)

    bootstrap_interval(statistic, 10, resamples=11)
    # One row for the estimate itself, then 11 resamples, three at a time.
    assert rows_seen == [1, 3, 3, 3, 2]


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([1.0, 1.1, 0.9, 1.2, 0.8], "higher"),
        ([-1.0, -1.1, -0.9, -1.2, -0.8], "lower"),
        ([-1.0, 1.1, -0.9, 1.2, -0.3], "no effect beyond noise"),
        ([0.0, 0.0, 0.0], "no effect beyond noise"),
        ([5.0], "too few examples"),
        ([], "too few examples"),
    ],
)
def test_verdict(differences, verdict):
    assert paired_bootstrap(differences, resamples=200).verdict() == verdict


def test_ratio_is_compared_with_one():
    def interval(low, high):
        return Interval(1.0, low, high, n=9, confidence=0.95, resamples=10, no_effect=1.0)

    assert interval(0.9, 1.1).verdict() == "no effect beyond noise"
    assert interval(1.0, 1.1).verdict() == "no effect beyond noise"
    assert interval(1.01, 1.1).verdict() == "higher"
    assert interval(0.5, 0.99).verdict() == "lower"


def test_a_change_is_that_of_paired_differences():
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, 30, generator=generator, dtype=torch.float64)
    before, after = (
        bootstrap_interval(lambda index, v=v: v[index].mean(1), 30, resamples=500, seed=4)
        for v in (first, second)
    )
    paired = paired_bootstrap(second - first, resamples=500, seed=4)
    found = change_between(before, after)
    for name in ("mean", "low", "high"):
        assert getattr(found, name) == pytest.approx(getattr(paired, name), abs=1e-12)


def test_a_change_of_the_distance_to_a_neutral_value():
    values = torch.tensor([1.0, 3.0, 5.0, 7.0], dtype=torch.float64)
    before = bootstrap_interval(lambda index: values[index].mean(1), 4, resamples=99)
    after = bootstrap_interval(lambda index: -values[index].mean(1), 4, resamples=99)
    found = change_between(before, after, of=abs)
    assert (found.mean, found.low, found.high) == (0.0, 0.0, 0.0)
    assert change_between(before, after).high < 0


def test_changes_between_other_examples_are_refused():
    def of(n, **options):
        return bootstrap_interval(lambda index: index.double().mean(1), n, **options)

    with pytest.raises(ValueError, match="must have the same n, got 5 and 6"):
        change_between(of(5), of(6))
    with pytest.raises(ValueError, match="must have the same resamples, got 10 and 20"):
        change_between(of(5, resamples=10), of(5, resamples=20))
    with pytest.raises(ValueError, match="must carry their 10 replicates, got 0 and 10"):
        change_between(Interval(1.0, 0.0, 2.0, 5, 0.95, 10), of(5, resamples=10))
    assert math.isnan(change_between(of(1), of(1)).low)


def test_too_few_examples_have_no_bounds():
    single = paired_bootstrap([5.0])
    assert single.mean == 5.0
    assert single.n == 1
    assert math.isnan(single.low)
    assert math.isnan(single.high)
    empty = paired_bootstrap([])
    assert empty.n == 0
    assert math.isnan(empty.mean)


@pytest.mark.parametrize(
    ("differences", "options", "message"),
    [
        ([0.0, math.nan], {}, "differences must be finite, got nan at index 1"),
        ([[0.0, 1.0]], {}, r"differences must be of shape \[n\], got \[1, 2\]"),
        ([0.0, 1.0], {"confidence": 95}, "confidence must be between 0 and 1, got 95"),
        ([0.0, 1.0], {"resamples": 0}, "resamples must be at least 1, got 0"),
    ],
)
def test_errors_name_what_was_expected(differences, options, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(differences, **options)


def test_groups_are_resampled_within_themselves():
    seen = []

    def statistic(index):
        seen.append(index)
        return index.double().mean(-1)

    bootstrap_interval(statistic, 7, strata=[3, 4], resamples=500)
    drawn = seen[-1]
    assert drawn.shape == (500, 7)
    assert set(drawn[:, :3].flatten().tolist()) == {0, 1, 2}
    assert set(drawn[:, 3:].flatten().tolist()) == {3, 4, 5, 6}


def test_one_group_of_all_is_the_plain_bootstrap():
    values = torch.randn(9, dtype=torch.float64)
    plain, one = (
        bootstrap_interval(lambda index: values[index].mean(-1), 9, resamples=200, strata=strata)
        for strata in (None, [9])
    )
    assert plain == one


def test_groups_must_be_all_of_the_examples():
    with pytest.raises(ValueError, match=r"strata must be sizes that sum to n = 5, got \[2, 2\]"):
        bootstrap_interval(lambda index: index.double().mean(-1), 5, strata=[2, 2])
