"""NC1 to NC4 from moments and weights: their definitions, and what they say where there is none."""

from __future__ import annotations

import json
import math

import pytest
import torch
from collapse_oracle import assert_values, brute_force, nearest_agreement

from fastdean.collapse import ClassMoments, CollapseMetrics, NearestMean, metrics, pairs

K, D = 7, 6


def sample(seed=0, offset=0.0, counts=(5, 3, 9, 2, 6, 4, 8)):
    """({class: [features]}, weight [K, D])"""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    centres = 2 * torch.randn(K, D, **draw) + offset
    rows = {
        c: list(centres[c] + 0.3 * torch.randn(count, D, **draw))
        for c, count in enumerate(counts)
        if count
    }
    return rows, torch.randn(K, D, **draw)


def moments_of(rows_of, num_classes=K):
    moments = ClassMoments(num_classes, D)
    for c, rows in rows_of.items():
        moments.add_(torch.stack(rows), torch.full((len(rows),), c))
    return moments


def metrics_of(rows_of, weight):
    return CollapseMetrics(moments_of(rows_of, len(weight)), weight)


def simplex(norm=3.0):
    """K points at equal distances, in K dimensions cut to the D = K - 1 they span."""
    points = torch.eye(K, dtype=torch.float64) - 1 / K
    basis = torch.linalg.svd(points)[2][:D]
    return norm * (points @ basis.T) / (points @ basis.T).norm(dim=1, keepdim=True)


@pytest.mark.parametrize("block", [2**22, 2 * K, 1])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_every_value_is_its_definition(block, offset, monkeypatch):
    monkeypatch.setattr(pairs, "_BLOCK", block)
    rows, weight = sample(offset=offset)
    assert_values(metrics_of(rows, weight), brute_force(rows, weight))


def test_a_common_mean_costs_no_digits():
    rows, weight = sample()
    expected = brute_force(rows, weight)
    far = {c: [row + 2.0**20 for row in each] for c, each in rows.items()}
    # Exact in fp64 up to 2^-32; uncentred directions are of the far points.
    found = metrics_of(far, weight)
    for name in ("nc1_k1", "nc1_k2", "nc2_interference_mean", "nc3_mean", "unc3_std"):
        assert math.isclose(found.values[name].value, expected[name], rel_tol=1e-7), name
    uncentred = brute_force(far, weight)["gnc2_uncentred_mean"]
    assert math.isclose(found.values["gnc2_uncentred_mean"].value, uncentred, rel_tol=1e-9)


def test_collapsed_classes_have_the_values_of_collapse():
    points = simplex()
    rows = {c: [point, point.clone()] for c, point in enumerate(points + 5)}
    found = {n: m.value for n, m in metrics_of(rows, 0.5 * points).values.items()}
    assert found["nc1_k1"] == pytest.approx(0, abs=1e-20)
    assert found["nc2_interference_target"] == -1 / (K - 1)
    assert found["nc2_interference_mean"] == pytest.approx(-1 / (K - 1))
    assert found["nc3_mean"] == pytest.approx(1)
    for name in ("nc2_equinorm_cv", "nc2_interference_std", "gnc2_centred_cv", "unc3_std"):
        assert found[name] == pytest.approx(0, abs=1e-7), name


def test_classes_that_were_not_seen_are_left_out_and_said_so():
    rows, weight = sample(counts=(5, 0, 9, 2, 6, 0, 8))
    weight[1] = 0
    found = metrics_of(rows, weight)
    assert_values(found, brute_force(rows, weight))
    for metric in found.values.values():
        assert "2 of 7 classes were not seen and are left out" in metric.note


def test_classes_seen_once_are_pointed_out_where_it_matters():
    rows, weight = sample(counts=(5, 1, 9, 2, 1, 4, 8))
    found = metrics_of(rows, weight)
    assert_values(found, brute_force(rows, weight))
    note = "2 of 7 classes were seen once: their variance counts as 0"
    assert {n for n, m in found.values.items() if note in m.note} == {
        "nc1_k1",
        "nc1_k2",
        "nc1_w_k1",
        "nc1_w_k2",
    }


@pytest.mark.parametrize("counts", [(0,) * K, (3, *(0,) * (K - 1))])
def test_fewer_than_two_classes_have_no_values(counts):
    rows, weight = sample(counts=counts)
    found = metrics_of(rows, weight).values
    seen = sum(count > 0 for count in counts)
    for metric in found.values():
        assert metric.value is None
        assert metric.note == f"needs at least two classes that were seen, got {seen} of 7"


def test_two_classes_have_no_spread_over_pairs():
    rows, weight = sample(counts=(4, 5, 0, 0, 0, 0, 0))
    found = metrics_of(rows, weight).values
    assert found["nc2_interference_mean"].value == pytest.approx(-1)
    assert found["nc2_interference_std"].value is None
    assert "needs at least two pairs of classes, got 1" in found["nc2_interference_std"].note
    assert found["unc3_std"].value is not None


@pytest.mark.parametrize("variance", [True, False])
def test_identical_means_are_infinitely_variable_and_said_so(variance):
    rows, weight = sample()
    if not variance:
        rows = {c: [each[0]] * 3 for c, each in rows.items()}
    rows[4] = [row.clone() for row in rows[2]]
    found = metrics_of(rows, weight).values
    others = {c: each for c, each in rows.items() if c != 4}
    for name in ("nc1_k1", "nc1_k2"):
        assert found[name].value == math.inf
        assert "infinite: 1 of 21 pairs have identical means; the mean of the others is" in (
            found[name].note
        )
    for name in ("gnc2_uncentred", "gnc2_centred"):
        assert found[f"{name}_mean"].value == math.inf
        assert "1 of 21 pairs have the same direction" in found[f"{name}_mean"].note
        assert found[f"{name}_cv"].value is None
        assert "1 pairs of classes have an infinite value" in found[f"{name}_cv"].note
    for name in ("nc1_w_k1", "nc3_mean", "unc3_std"):
        assert math.isfinite(found[name].value)
    assert found["nc1_w_k1"].value != brute_force(others, weight)["nc1_w_k1"]


def test_means_that_differ_by_the_rounding_of_sums_are_identical():
    rows, weight = sample(offset=10.0)
    # The same tokens, three times as often and in other sums.
    rows[4] = rows[2][::-1] * 3
    moments = moments_of(rows)
    assert not torch.equal(moments.means[4], moments.means[2])
    assert CollapseMetrics(moments, weight).values["nc1_k1"].value == math.inf


def test_means_closer_than_the_model_rounds_are_pointed_out():
    rows, weight = sample()
    rows[4] = [row + 1e-9 for row in rows[2]]
    note = "1 pairs of means are closer than one representation is rounded (1.2e-07 of its norm)"
    assert note in metrics_of(rows, weight.float()).values["nc1_k1"].note
    assert "closer than" not in metrics_of(rows, weight).values["nc1_k1"].note


def test_a_pair_that_makes_up_most_of_a_mean_is_pointed_out():
    rows, weight = sample()
    assert "of the sum" not in metrics_of(rows, weight).values["nc1_k1"].note
    rows[4] = [row + 1e-3 for row in rows[2]]
    assert "one of 21 pairs makes up 100% of the sum" in (
        metrics_of(rows, weight).values["nc1_k1"].note
    )


def test_all_classes_in_one_point_give_notes_and_no_nan():
    point = torch.ones(D, dtype=torch.float64)
    found = metrics_of({c: [point, point] for c in range(K)}, sample()[1]).values
    assert found["nc1_k1"].value == math.inf
    assert "infinite: 21 of 21 pairs" in found["nc1_k1"].note
    assert found["nc2_equinorm_cv"].value is found["nc2_interference_mean"].value is None
    assert "7 classes with a mean on the centre have no direction" in (
        found["nc2_interference_mean"].note
    )
    assert found["nc3_mean"].value == 0 and found["unc3_std"].value == 0
    assert found["unc3_cv"].value is None and "the mean over classes is 0" in found["unc3_cv"].note
    for metric in found.values():
        assert metric.value is None or not math.isnan(metric.value)
        assert metric.value is not None or metric.note


def test_a_class_on_the_centre_has_no_direction():
    points = simplex()
    rows = {c: [point + 5, point + 5] for c, point in enumerate(points[:3])}
    rows[3] = [sum(points[:3]) / 3 + 5] * 2
    found = metrics_of(rows, points).values
    others = {c: rows[c] for c in range(3)}
    assert found["nc2_interference_mean"].value == pytest.approx(-1 / 2)
    assert "1 classes with a mean on the centre" in found["nc2_interference_mean"].note
    # As in the loss, its cosine is 0.
    expected = 3 / 4 * brute_force(others, points)["nc3_mean"]
    assert found["nc3_mean"].value == pytest.approx(expected)
    assert "the cosine of 1 classes" in found["nc3_mean"].note


def test_a_weight_of_zero_and_identical_weights():
    rows, weight = sample()
    weight[5] = 0
    weight[1] = weight[2]
    found = metrics_of(rows, weight).values
    assert found["nc1_w_k1"].value == math.inf
    assert "1 of 21 pairs have identical weights" in found["nc1_w_k1"].note
    assert "1 classes with a weight of 0 have no direction" in found["gnc2_w_mean"].note
    assert "the cosine of 1 classes" in found["unc3_std"].note
    assert math.isfinite(found["nc1_k1"].value)


def test_definitions_name_exponent_centring_and_statistic():
    found = metrics_of(*sample()).values
    assert "exponent 2" in found["nc1_k1"].definition and "^2)" in found["nc1_k1"].definition
    assert "exponent 4" in found["nc1_k2"].definition and "^4)" in found["nc1_k2"].definition
    for name in ("nc1_w_k1", "nc1_w_k2", "gnc2_w_mean", "gnc2_w_cv"):
        assert "not confirmed in the literature" in found[name].definition
    assert "uncentred" in found["gnc2_uncentred_mean"].definition
    assert "uncentred" not in found["gnc2_centred_mean"].definition
    assert "std (unbiased)" in found["unc3_std"].definition
    assert "std / |mean|" in found["unc3_cv"].definition
    assert list(found) == list(metrics.DEFINITIONS)


def test_halves_add_to_the_whole():
    rows, weight = sample()
    halves = [{c: each[part] for c, each in rows.items()} for part in (slice(2), slice(2, None))]
    halves[1] = {c: each for c, each in halves[1].items() if each}
    first, second = (metrics_of(half, weight) for half in halves)
    assert_values(first + second, brute_force(rows, weight))
    counted = first.with_nearest(NearestMean(1, 2, 0)) + second
    assert counted.values["nc4_agreement"].value is None
    assert "needs held-out text" in counted.values["nc4_agreement"].note


def test_measurements_of_two_models_do_not_add():
    rows, weight = sample()
    with pytest.raises(ValueError, match="of the same output embedding, got another one"):
        metrics_of(rows, weight) + metrics_of(rows, 2 * weight)
    with pytest.raises(ValueError, match="of the same output embedding, got another one"):
        metrics_of(rows, weight) + metrics_of(rows, weight.float())


@pytest.mark.parametrize("block", [2**22, 1])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_nearest_means_and_classifier_are_counted(block, offset, monkeypatch):
    monkeypatch.setattr(metrics, "_BLOCK", block)
    rows, weight = sample(offset=offset)
    weight = weight - weight.mean(1, keepdim=True)
    held_out, _ = sample(seed=1, offset=offset)
    means = moments_of(rows).means
    features = torch.cat([torch.stack(each) for each in held_out.values()])
    agreeing, tokens, _ = nearest_agreement(rows, held_out, weight)
    assert 0 < agreeing < tokens
    assert int(metrics.count_nearest(features, means, weight)) == agreeing
    # A classifier of the means themselves, with their biases, agrees always.
    centred = means - means.mean(0)
    lifted = torch.cat([centred, -centred.square().sum(1, keepdim=True) / 2], 1)
    ones = torch.ones(len(features), 1, dtype=torch.float64)
    states = torch.cat([features - means.mean(0), ones], 1)
    points = torch.cat([centred, torch.zeros(K, 1, dtype=torch.float64)], 1)
    assert int(metrics.count_nearest(states, points, lifted)) == tokens


def test_of_coinciding_means_either_counts_as_nearest():
    means = torch.zeros(3, D, dtype=torch.float64)
    means[2] = 5
    weight = torch.zeros(3, D, dtype=torch.float64)
    for chosen, agreeing in ((0, 4), (1, 4), (2, 0)):
        weight.zero_()[chosen] = 1
        found = metrics.count_nearest(torch.rand(4, D).double(), means, weight)
        assert int(found) == agreeing


def test_counts_on_held_out_text_add_and_show():
    rows, weight = sample()
    nearest = NearestMean(3, 4, 1) + NearestMean(1, 4, 1)
    assert nearest == NearestMean(4, 8, 2) == nearest.across_ranks()
    found = metrics_of(rows, weight).with_nearest(nearest)
    assert found.values["nc4_agreement"].value == 0.5
    assert "2 tokens of classes without a mean are left out" in found.values["nc4_agreement"].note
    empty = metrics_of(rows, weight).with_nearest(NearestMean(0, 0, 3)).values["nc4_agreement"]
    assert empty.value is None and "no token of a class with a mean" in empty.note


def test_results_are_plain_json():
    rows, weight = sample(counts=(5, 3, 0, 2, 6, 4, 8))
    rows[4] = rows[3]
    found = metrics_of(rows, weight).with_nearest(NearestMean(1, 2, 0)).to_dict()
    read = json.loads(json.dumps(found, allow_nan=False))
    assert read["counts"] == [5, 3, 0, 2, 2, 4, 8]
    assert read["nearest"] == {"agreeing": 1, "tokens": 2, "left_out": 0}
    assert read["values"]["nc1_k1"]["value"] is None
    assert "infinite" in read["values"]["nc1_k1"]["note"]
    assert isinstance(read["values"]["nc3_mean"]["value"], float)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad):
    rows, weight = sample()
    moments = moments_of(rows)
    weight[3, 1] = bad
    with pytest.raises(ValueError, match="weight must be finite, got NaN .* row of class 3"):
        CollapseMetrics(moments, weight)
    rows[2][0][0] = bad
    with pytest.raises(ValueError, match="features must be finite, got NaN .* mean of class 2"):
        metrics_of(rows, sample()[1])


def test_a_weight_of_other_classes_is_refused():
    with pytest.raises(ValueError, match=r"shape \[K, D\], \[7, 6\], got \[6, 6\]"):
        CollapseMetrics(ClassMoments(K, D), torch.zeros(K - 1, D))


@pytest.mark.parametrize("apart", [1.0, 1e-3, 1e-7, 1e-10])
@pytest.mark.parametrize("block", [2**22, 1])
def test_distances_of_close_points_keep_their_digits(apart, block, monkeypatch):
    monkeypatch.setattr(pairs, "_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(K, D, generator=generator, dtype=torch.float64)
    points[3] = points[1]
    points[3, 2] += apart
    squared, _ = pairs.squared_distances(points, points)
    expected = torch.stack([(points - point).square().sum(1) for point in points])
    assert torch.allclose(squared, expected, rtol=1e-11, atol=0)
    assert squared[1, 3] > 0 and not squared.diagonal().any()
