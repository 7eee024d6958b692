"""The bootstrap of what is no mean: its quantiles, its draws, and that it earns no verdict."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from fastdean.evaluation.statistics import bootstrap
from fastdean.evaluation.statistics.bootstrap import bootstrap_interval


def _of_mean(values, **options):
    found = torch.tensor(values, dtype=torch.float64)
    return bootstrap_interval(lambda index: found[index].mean(1), len(found), **options)


def test_resamples_without_width_give_no_interval():
    found = bootstrap_interval(lambda index: torch.ones(len(index)), 20, resamples=50)
    assert found.mean == 1.0 and math.isnan(found.low) and math.isnan(found.high)
    assert found.to_dict()["low"] is None and found.verdict().startswith("no verdict")


def test_interval_is_the_quantiles_of_every_possible_resample():
    values = [0.0, 1.0, 4.0, 10.0]
    every_mean = [np.mean(draw) for draw in itertools.product(values, repeat=4)]
    interval = _of_mean(values, confidence=0.8, resamples=40_000)
    assert interval.mean == 3.75
    # The 256 equally likely means are multiples of 1/4, the drawn quantiles fall on or beside one.
    assert interval.low == pytest.approx(np.quantile(every_mean, 0.1), abs=0.25)
    assert interval.high == pytest.approx(np.quantile(every_mean, 0.9), abs=0.25)


def test_seed_decides_the_interval():
    values = [float(i * i) for i in range(20)]
    first = _of_mean(values, seed=1, resamples=500)
    assert _of_mean(values, seed=1, resamples=500) == first
    other = _of_mean(values, seed=2, resamples=500)
    assert (other.low, other.high) != (first.low, first.high)


def test_global_random_state_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    _of_mean([0.0, 1.0, 2.0], resamples=10)
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


def test_it_is_named_and_has_no_verdict():
    interval = _of_mean([5.0 + i for i in range(30)], resamples=200)
    assert interval.low > 0 and interval.method == "percentile bootstrap"
    assert (interval.p_value, interval.test) == (None, None)
    assert interval.verdict() == "no verdict from an interval without a test"


def test_too_few_examples_have_no_bounds():
    single = _of_mean([5.0])
    assert (single.mean, single.n) == (5.0, 1)
    assert math.isnan(single.low) and math.isnan(single.high)
    assert math.isnan(_of_mean([]).mean)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([0.0, math.nan], {}, "statistic must be finite over all examples, got nan"),
        ([0.0, 1.0], {"confidence": 95}, "confidence must be between 0 and 1, got 95"),
        ([0.0, 1.0], {"seed": -1}, "seed must be from 0 to 2"),
        ([0.0, 1.0], {"resamples": 0}, "resamples must be at least 1, got 0"),
    ],
)
def test_errors_name_what_was_expected(values, options, message):
    with pytest.raises(ValueError, match=message):
        _of_mean(values, **options)


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


@pytest.mark.parametrize("options", [{"seed": "1"}, {"seed": None}, {"resamples": 1.5}])
def test_what_is_no_whole_number_is_refused(options):
    with pytest.raises(TypeError, match=f"{next(iter(options))} must be an integer, got"):
        _of_mean([0.0, 1.0], **options)
