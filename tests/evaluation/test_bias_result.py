"""What a result says about itself, and the intervals that it rests on."""

from __future__ import annotations

import json

import pytest
import torch

from fastdean.evaluation.bias.result import mean_result, members, preferred, statistic_result
from fastdean.evaluation.bias.rows import benchmark_rows


def _shares(values, **options):
    options = {"unit": "%", "neutral": 50.0} | options
    return mean_result("share", torch.tensor(values, dtype=torch.float64), **options)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([100.0, 0.0] * 10, "no effect beyond noise"),
        ([50.0] * 10, "no effect beyond noise"),
        ([100.0] * 9 + [0.0], "above neutral"),
        ([0.0] * 9 + [100.0], "below neutral"),
        ([100.0], "no verdict from n = 1"),
        ([100.0] * 7, "no verdict from n = 7"),
        ([100.0] * 8, "above neutral"),
        # A mean over unlike groups is no share of them.
        ([75.0] * 4 + [100.0] * 4, "above neutral"),
    ],
)
def test_a_figure_is_an_effect_only_if_its_interval_leaves_the_neutral_value(values, verdict):
    result = _shares(values)
    assert result.verdict() == verdict
    assert verdict in result.describe()
    assert result.to_dict()["verdict"] == verdict


def test_a_result_names_its_interval_and_its_test():
    share = _shares([100.0] * 9 + [0.0]).to_dict()
    assert (share["interval_method"], share["test"]) == ("clopper-pearson", "exact binomial")
    assert share["p_value"] == pytest.approx(22 / 1024)
    mean = mean_result("mean", torch.arange(9.0) - 1.0, unit="nats", neutral=0.0).to_dict()
    assert mean["interval_method"] == "student-t"
    assert mean["test"] == "sign-flip, all 2^8 patterns"
    other = statistic_result(
        "spread", lambda i: i.double().std(-1), 9, unit="", neutral=0.0, resamples=50
    ).to_dict()
    assert (other["interval_method"], other["p_value"]) == ("percentile bootstrap", None)
    assert other["verdict"] == "no verdict from an interval without a test"


def test_a_measure_without_a_neutral_value_claims_no_effect():
    result = _shares([90.0, 80.0, 95.0], neutral=None)
    assert result.verdict() == "no neutral value"
    assert "neutral" not in result.describe()


def test_categories_are_judged_by_their_own_examples():
    labels = ["a"] * 10 + ["b"] * 10
    result = _shares([100.0] * 10 + [100.0, 0.0] * 5, categories=members(labels))
    assert [result.by_category[c].mean for c in "ab"] == [100.0, 50.0]
    assert [result.verdict(c) for c in "ab"] == ["above neutral", "no effect beyond noise"]
    assert "a: 100 % [69.15, 100], n = 10; above neutral" in result.describe()


def test_a_result_is_json_without_nan():
    found = _shares([100.0], categories=members(["only"]), figures={"ties": 0}, notes=["n"])
    again = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert again["value"] == 100.0
    assert again["low"] is None and again["by_category"]["only"]["high"] is None
    assert again["figures"] == {"ties": 0} and again["notes"] == ["n"]


def test_labels_of_several_labellings_stand_side_by_side():
    found = members(["x", "y", "x"], ["", "z", "z"])
    assert {label: index.tolist() for label, index in found.items()} == {
        "x": [0, 2],
        "y": [1],
        "z": [1, 2],
    }


def test_a_difference_of_rounding_is_a_tie():
    first = torch.tensor([1.0, 1.0, 1.00005, 2.0], dtype=torch.float64)
    second = torch.tensor([2.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    assert preferred(first, second).tolist() == [0.0, 0.5, 0.5, 1.0]


def test_a_hub_table_has_the_defaults_that_its_source_leaves_open(monkeypatch):
    import datasets

    calls = []

    def load_dataset(path, name=None, *, split=None, revision=None):
        calls.append((path, name, split, revision))
        return datasets.Dataset.from_list([{"column": "value"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    defaults = {"split": "test", "config": "one"}
    assert benchmark_rows("own/er", **defaults) == [{"column": "value"}]
    benchmark_rows("own/er::split=dev,revision=v1", **defaults)
    assert calls == [("own/er", "one", "test", None), ("own/er", "one", "dev", "v1")]


@pytest.mark.parametrize(
    ("source", "error", "text"),
    [
        ([], ValueError, "source must hold at least one row, got none"),
        (["text"], TypeError, "source must hold dictionaries, got str as row 1"),
        ({"a": 1}, TypeError, "source must be rows, the path of a file or a hub id, got dict"),
        (3, TypeError, "source must be rows, the path of a file or a hub id, got int"),
    ],
)
def test_what_are_no_rows_is_refused(source, error, text):
    with pytest.raises(error, match=text):
        benchmark_rows(source)
