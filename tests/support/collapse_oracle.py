"""Neural collapse by its definitions, in float64, one pair of classes at a time."""

from __future__ import annotations

import math
from itertools import combinations
from statistics import fmean, stdev

import torch


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def cv(values):
    return stdev(values) / abs(fmean(values))


def brute_force(rows_of, weights):
    """name -> value, of {class: [features [D], ...]} and {class: w_c [D]}; no class is empty."""
    rows_of = {c: [row.double() for row in rows] for c, rows in rows_of.items()}
    w = {c: weights[c].double() for c in rows_of}
    mu = {c: sum(rows) / len(rows) for c, rows in rows_of.items()}
    s2 = {
        c: fmean(float((row - mu[c]) @ (row - mu[c])) for row in rows)
        for c, rows in rows_of.items()
    }
    centre = sum(mu.values()) / len(mu)
    m = {c: mean - centre for c, mean in mu.items()}
    pairs = list(combinations(sorted(rows_of), 2))

    def cdnv(points, exponent):
        return fmean(
            (s2[a] + s2[b]) / (2 * float((points[a] - points[b]).norm()) ** exponent)
            for a, b in pairs
        )

    def inverse_log_distances(points):
        hat = {c: point / point.norm() for c, point in points.items()}
        return [math.log(1 / float((hat[a] - hat[b]).norm())) for a, b in pairs]

    interference = [cosine(m[a], m[b]) for a, b in pairs]
    alignment = [cosine(w[c], m[c]) for c in rows_of]
    spheres = {"uncentred": mu, "centred": m, "w": w}
    return {
        "nc1_k1": cdnv(mu, 2),
        "nc1_k2": cdnv(mu, 4),
        "nc1_w_k1": cdnv(w, 2),
        "nc1_w_k2": cdnv(w, 4),
        "nc2_equinorm_cv": cv([math.log(point.norm()) for point in m.values()]),
        "nc2_interference_mean": fmean(interference),
        "nc2_interference_std": stdev(interference),
        "nc2_interference_target": -1 / (len(rows_of) - 1),
        **{f"gnc2_{k}_mean": fmean(inverse_log_distances(v)) for k, v in spheres.items()},
        **{f"gnc2_{k}_cv": cv(inverse_log_distances(v)) for k, v in spheres.items()},
        "nc3_mean": fmean(alignment),
        "unc3_std": stdev(alignment),
        "unc3_cv": cv(alignment),
    }


def nearest_agreement(rows_of, held_out, weights):
    """(agreeing, tokens, left out) of held-out {class: [features]} against the means of rows_of."""
    mu = {c: torch.stack(rows).double().mean(0) for c, rows in rows_of.items()}
    agreeing = tokens = left_out = 0
    for c, rows in held_out.items():
        if c not in mu:
            left_out += len(rows)
            continue
        for row in rows:
            h = row.double()
            chosen = max(mu, key=lambda other: float(weights[other].double() @ h))
            nearest = min(mu, key=lambda other: float((h - mu[other]).norm()))
            agreeing += chosen == nearest
            tokens += 1
    return agreeing, tokens, left_out


def assert_values(metrics, expected, rtol=1e-9):
    """Every value of the oracle, and no other but NC4."""
    found = {name: metric.value for name, metric in metrics.values.items()}
    assert found.keys() == {*expected, "nc4_agreement"}
    for name, value in expected.items():
        assert found[name] is not None, (name, metrics.values[name].note)
        assert math.isclose(found[name], value, rel_tol=rtol, abs_tol=rtol), (
            f"{name}: {found[name]!r} and not {value!r}"
        )
