"""Neural collapse in numbers: NC1 to NC4 of some classes, from their moments and weights."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastdean.collapse.moments import ClassMoments
from fastdean.collapse.pairs import (
    ROUNDING,
    Statistics,
    above_diagonal,
    pair_blocks,
    squared_distances,
)
from fastdean.models.ranks.distributed import Ranks

# Elements of the largest temporary of `count_nearest`, in fp64.
_BLOCK = 2**22


@dataclass(frozen=True)
class Metric:
    """One number of a measurement.

    Attributes:
        value: None where it is not defined, infinite where two classes coincide.
        definition: the formula, with its exponent, its centring and its statistic.
        note: a caution about this value, such as why it is None; else empty.
    """

    value: float | None
    definition: str
    note: str = ""


@dataclass(frozen=True)
class NearestMean:
    """Count of held-out tokens on which classifier and nearest class mean agree (NC4).

    Counts of several texts add if they are against the same class means.

    Attributes:
        agreeing: tokens with argmax_c w_c.h = argmin_c ||h - mu_c||.
        tokens: tokens of classes that have a mean.
        left_out: tokens of classes that have none.
        teams: as of `ClassMoments`; no part of `counts`.
    """

    agreeing: int
    tokens: int
    left_out: int
    teams: tuple[tuple[int, ...], ...] = field(default=(), repr=False, compare=False, kw_only=True)

    @property
    def counts(self) -> dict[str, int]:
        """The three counts by name."""
        return {"agreeing": self.agreeing, "tokens": self.tokens, "left_out": self.left_out}

    def __add__(self, other: NearestMean) -> NearestMean:
        if not isinstance(other, NearestMean):
            return NotImplemented
        counts = map(operator.add, self.counts.values(), other.counts.values())
        return NearestMean(*counts, teams=self.teams or other.teams)

    def across_ranks(self) -> NearestMean:
        """Sum the counts over all ranks. All must call it, with the same class means.

        What the ranks of a team counted, counts once.
        """
        ranks = replace(Ranks.current(), teams=self.teams)
        counts = torch.tensor([*self.counts.values()], device="cpu") * (ranks.rank == ranks.team[0])
        ranks.sum_([counts])
        return NearestMean(*counts.tolist(), teams=self.teams)


class CollapseMetrics:
    """NC1 to NC4 and (U)NC3 of some classes, with the moments and weights they come from.

    With h the last representation of a token, C the number of classes seen, mu_c the mean of h over
    the tokens of class c, s2_c the mean of ||h - mu_c||^2 (over n_c), mu_bar the unweighted mean of
    mu_c over the classes seen, m_c = mu_c - mu_bar, w_c the row of the output embedding, hat: of
    norm 1. All statistics are over the classes seen, or over their pairs c < c', in fp64; "std" is
    unbiased, "cv" is std / |mean|. `Metric.definition` has each formula.

    - nc1_k1, nc1_k2: class-distance normalised variance (CDNV), distances to the power 2 and 4.
    - nc1_w_k1, nc1_w_k2, gnc2_w_mean, gnc2_w_cv: with distances of w_c in the place of mu_c's. The
      literature names these weight-calibrated forms; the formula here is this package's reading of
      the names, not confirmed against a published one.
    - nc2_equinorm_cv: evenness of the lengths of m_c, 0 when collapsed.
    - nc2_interference_mean, _std, _target: cosines between the m_c. Collapsed: the mean is the
      target -1 / (C - 1), the std 0.
    - gnc2_uncentred_mean, _cv, gnc2_centred_mean, _cv: spread of the directions of mu_c and of m_c
      on the sphere. The cv is 0 when all pairs are equally far apart.
    - nc3_mean: alignment of w_c with m_c, 1 when collapsed; unc3_std and unc3_cv: its evenness,
      (U)NC3, 0 when all classes are equally aligned.
    - nc4_agreement: on held-out text; None without.

    Args:
        moments: of the K classes.
        weight: [K, D], floating point, the classes' rows of the output embedding.
        nearest: counts on held-out text against the means of `moments`, or None.
    Attributes:
        values: name -> Metric, in the order above; computed on first use.
    Raises:
        ValueError: shapes that do not fit, or a mean or weight that is not finite.
    Source:
        Collapsed language models promote fairness (arXiv 2410.04472); Linguistic collapse (arXiv
        2405.17767); CDNV: On the role of neural collapse in transfer learning (arXiv 2112.15121).
    """

    def __init__(
        self, moments: ClassMoments, weight: Tensor, nearest: NearestMean | None = None
    ) -> None:
        if weight.shape != moments.means.shape:
            raise ValueError(
                f"weight must be of the moments' shape [K, D], {list(moments.means.shape)}, got "
                f"{list(weight.shape)}; give one row of the output embedding for each class"
            )
        _require_finite(moments.means, "features", "mean")
        _require_finite(weight, "weight", "row")
        self.moments = moments
        self.weight = weight.detach()
        self.nearest = nearest

    def __repr__(self) -> str:
        found = {name: metric.value for name, metric in self.values.items()}
        return f"CollapseMetrics({found})"

    @cached_property
    def values(self) -> dict[str, Metric]:
        measured = _measured(self.moments, self.weight, self.nearest)
        return {
            name: Metric(found.value, DEFINITIONS[name], "; ".join(found.notes))
            for name, found in measured.items()
        }

    @cached_property
    def alignments(self) -> list[float | None]:
        """cos(w_c, m_c) of each of the K classes, as `nc3_mean` takes it; None where not seen."""
        seen = self.moments.counts > 0
        found: list[float | None] = [None] * seen.numel()
        if int(seen.sum()) < 2:
            return found
        weight = self.weight.to(self.moments.means.device)[seen].double()
        cosines, _ = _cosines(self.moments.means[seen], weight)
        for place, value in zip(seen.nonzero().flatten().tolist(), cosines.tolist(), strict=True):
            found[place] = value
        return found

    def among(self, classes: Sequence[int]) -> CollapseMetrics:
        """The metrics of some of the classes by themselves, without NC4.

        Their means are centred on their own mean, not on that of all classes.
        """
        index = torch.tensor(list(classes), dtype=torch.int64, device=self.moments.means.device)
        weight = self.weight[index.to(self.weight.device)]
        return CollapseMetrics(self.moments.of(index), weight)

    def with_nearest(self, nearest: NearestMean | None) -> CollapseMetrics:
        """Return a copy with NC4, from counts on held-out text against these class means."""
        return CollapseMetrics(self.moments, self.weight, nearest)

    def __add__(self, other: CollapseMetrics) -> CollapseMetrics:
        """The metrics of both texts together, without NC4, which is against the means of one.

        Raises: ValueError for other classes or another output embedding.
        """
        if not isinstance(other, CollapseMetrics):
            return NotImplemented
        moments = self.moments + other.moments
        weight = other.weight.to(self.weight.device)
        if weight.dtype != self.weight.dtype or not torch.equal(weight, self.weight):
            raise ValueError(
                "the other metrics must be of the same output embedding, got another one; "
                "measurements of two models do not add"
            )
        return CollapseMetrics(moments, self.weight)

    def across_ranks(self) -> CollapseMetrics:
        """Compute the metrics over all ranks' text, the same on each. All ranks must call it.

        Without NC4: count it against the merged means with `nearest_mean_agreement`.
        """
        return CollapseMetrics(self.moments.across_ranks(), self.weight)

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics as JSON values; an infinite one is null, and its note says so."""
        values = {name: asdict(metric) for name, metric in self.values.items()}
        for value in values.values():
            if value["value"] is not None and not math.isfinite(value["value"]):
                value["value"] = None
        return {
            "values": values,
            "counts": [int(count) for count in self.moments.counts.tolist()],
            "nearest": None if self.nearest is None else self.nearest.counts,
        }


_PAIRS = "mean over pairs c < c' of"
_CV = "std / |mean| over"
_LOG = "log(1 / ||hat a_c - hat a_c'||)"
_COSINE = "cos(w_c, m_c): means centred, weights not"
_CALIBRATED = "; form not confirmed in the literature"


def _cdnv(point: str, k: int, more: str = "") -> str:
    distance = f"||{point}_c - {point}_c'||^{2 * k}"
    return f"{_PAIRS} (s2_c + s2_c') / (2 {distance}): exponent {2 * k} (k = {k}){more}"


DEFINITIONS = {
    "nc1_k1": _cdnv("mu", 1),
    "nc1_k2": _cdnv("mu", 2),
    "nc1_w_k1": _cdnv("w", 1, f", uncentred weights{_CALIBRATED}"),
    "nc1_w_k2": _cdnv("w", 2, f", uncentred weights{_CALIBRATED}"),
    "nc2_equinorm_cv": f"{_CV} classes of log ||m_c||: centred, std unbiased",
    "nc2_interference_mean": f"{_PAIRS} hat m_c . hat m_c': centred",
    "nc2_interference_std": "std (unbiased) over pairs c < c' of hat m_c . hat m_c': centred",
    "nc2_interference_target": "-1 / (C - 1): the cosine of every pair when collapsed",
    "gnc2_uncentred_mean": f"{_PAIRS} {_LOG} with a = mu: uncentred",
    "gnc2_uncentred_cv": f"{_CV} pairs c < c' of {_LOG} with a = mu: uncentred, std unbiased",
    "gnc2_centred_mean": f"{_PAIRS} {_LOG} with a = m: centred",
    "gnc2_centred_cv": f"{_CV} pairs c < c' of {_LOG} with a = m: centred, std unbiased",
    "gnc2_w_mean": f"{_PAIRS} {_LOG} with a = w: uncentred{_CALIBRATED}",
    "gnc2_w_cv": f"{_CV} pairs c < c' of {_LOG} with a = w: uncentred, std unbiased{_CALIBRATED}",
    "nc3_mean": f"mean over classes of {_COSINE}",
    "unc3_std": f"std (unbiased) over classes of {_COSINE}",
    "unc3_cv": f"{_CV} classes of {_COSINE}, std unbiased",
    "nc4_agreement": (
        "share of the held-out tokens of classes that have a mean with "
        "argmax_c w_c.h = argmin_c ||h - mu_c||: uncentred, without biases; classes whose means "
        "coincide count as one"
    ),
}


@dataclass
class _Found:
    """A metric's value and notes."""

    value: float | None
    notes: list[str] = field(default_factory=list)


def _measured(
    moments: ClassMoments, weight: Tensor, nearest: NearestMean | None
) -> dict[str, _Found]:
    """name -> value of every metric of `DEFINITIONS`."""
    seen = moments.counts > 0
    total, count = seen.numel(), int(seen.sum())
    if count < 2:
        why = f"needs at least two classes that were seen, got {count} of {total}"
        return {name: _Found(None, [why]) for name in DEFINITIONS}

    means, variances = moments.means[seen], moments.variances[seen]
    weight = weight.to(moments.means.device)[seen]
    precision = torch.finfo(weight.dtype).eps
    weight = weight.double()
    found = {
        **_variability(means, variances, weight, precision),
        **_simplex(means),
        **_sphere(means, weight),
        **_alignment(means, weight),
        "nc4_agreement": _agreement(nearest),
    }
    if count < total:
        _note(found.values(), f"{total - count} of {total} classes were not seen and are left out")
    if single := int((moments.counts == 1).sum()):
        nc1 = [found[name] for name in ("nc1_k1", "nc1_k2", "nc1_w_k1", "nc1_w_k2")]
        _note(nc1, f"{single} of {count} classes were seen once: their variance counts as 0")
    return found


def _note(found: Iterable[_Found], *notes: str) -> None:
    for each in found:
        each.notes.extend(notes)


def _variability(
    means: Tensor, variances: Tensor, weight: Tensor, precision: float
) -> dict[str, _Found]:
    """NC1 with means and with weights in the denominator."""
    found = {}
    for name, points, kind in (("nc1", means, "means"), ("nc1_w", weight, "weights")):
        by_power = {1: Statistics(), 2: Statistics()}
        unresolved = 0
        for rows, columns in pair_blocks(len(points)):
            squared, unsure = squared_distances(points[rows], points[columns], precision)
            pairs = above_diagonal(squared)
            unresolved += int((unsure & pairs).sum())
            spread = (variances[rows].unsqueeze(1) + variances[columns]) / 2
            for power, statistics in by_power.items():
                ratios = (spread / squared.pow(power))[pairs]
                # 0 / 0 where two classes of no variance coincide.
                statistics.add_(ratios.masked_fill_(squared[pairs] == 0, math.inf))
        for power, statistics in by_power.items():
            notes = _coincidence_notes(statistics, f"have identical {kind}") + _dominance_notes(
                statistics
            )
            if unresolved and kind == "means":
                notes.append(
                    f"{unresolved} pairs of means are closer than one representation is rounded "
                    f"({precision:.1e} of its norm) and hang on that rounding"
                )
            found[f"{name}_k{power}"] = _Found(statistics.value, notes)
    return found


def _simplex(means: Tensor) -> dict[str, _Found]:
    """NC2: lengths of the centred means, and the angles between them."""
    centred, on_centre = _centred(means)
    norms = centred.norm(dim=1)[~on_centre]
    units = centred[~on_centre] / norms.unsqueeze(1)
    lengths, cosines = Statistics(), Statistics()
    lengths.add_(norms.log())
    for rows, columns in pair_blocks(len(units)):
        block = units[rows] @ units[columns].T
        cosines.add_(block[above_diagonal(block)])
    found = {
        "nc2_equinorm_cv": _cv(lengths, "classes"),
        "nc2_interference_mean": _mean(cosines),
        "nc2_interference_std": _std(cosines, "pairs of classes"),
        "nc2_interference_target": _Found(-1 / (len(means) - 1)),
    }
    of_directions = [each for name, each in found.items() if name != "nc2_interference_target"]
    _note(of_directions, *_direction_notes(on_centre, "a mean on the centre"))
    return found


def _sphere(means: Tensor, weight: Tensor) -> dict[str, _Found]:
    """GNC2: how evenly directions are spread on the sphere."""
    centred, on_centre = _centred(means)
    found: dict[str, _Found] = {}
    for name, points, without, why in (
        ("gnc2_uncentred", means, _zero_rows(means), "a mean of 0"),
        ("gnc2_centred", centred, on_centre, "a mean on the centre"),
        ("gnc2_w", weight, _zero_rows(weight), "a weight of 0"),
    ):
        kept = points[~without]
        units = kept / kept.norm(dim=1, keepdim=True)
        statistics = Statistics()
        for rows, columns in pair_blocks(len(units)):
            squared, _ = squared_distances(units[rows], units[columns])
            statistics.add_(squared[above_diagonal(squared)].log() / -2)
        mean, cv = _mean(statistics), _cv(statistics, "pairs of classes")
        _note([mean], *_coincidence_notes(statistics, "have the same direction"))
        _note([mean, cv], *_direction_notes(without, why))
        found |= {f"{name}_mean": mean, f"{name}_cv": cv}
    return found


def _alignment(means: Tensor, weight: Tensor) -> dict[str, _Found]:
    """NC3 and (U)NC3. A cosine without a direction is 0, as in the collapse-alignment loss."""
    cosines, without = _cosines(means, weight)
    statistics = Statistics()
    statistics.add_(cosines)
    found = {
        "nc3_mean": _mean(statistics),
        "unc3_std": _std(statistics, "classes"),
        "unc3_cv": _cv(statistics, "classes"),
    }
    if count := int(without.sum()):
        why = "a mean on the centre or a weight of 0"
        _note(found.values(), f"the cosine of {count} classes with {why} counts as 0")
    return found


def _cosines(means: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """cos(w_c, m_c) of each class, 0 where one has no direction; and where that is."""
    centred, on_centre = _centred(means)
    without = on_centre | _zero_rows(weight)
    norms = (centred.norm(dim=1) * weight.norm(dim=1)).masked_fill(without, 1)
    return ((weight * centred).sum(1) / norms).masked_fill(without, 0), without


def _agreement(nearest: NearestMean | None) -> _Found:
    if nearest is None:
        return _Found(None, ["needs held-out text, counted against these class means"])
    notes = []
    if nearest.left_out:
        notes.append(f"{nearest.left_out} tokens of classes without a mean are left out")
    if not nearest.tokens:
        return _Found(None, ["the held-out text has no token of a class with a mean", *notes])
    return _Found(nearest.agreeing / nearest.tokens, notes)


def count_nearest(features: Tensor, means: Tensor, weight: Tensor) -> Tensor:
    """How many rows have the same class by classifier and by nearest mean: int64 scalar.

    Args:
        features: [N, D] floating point.
        means, weight: fp64 [C, D] on the device of `features`.
    """
    centre = means.mean(0)
    # From the common centre: distances of far points would be differences of large numbers.
    centred = means - centre
    norms = centred.square().sum(1)
    agreeing = torch.zeros((), dtype=torch.int64, device=means.device)
    for block in features.split(max(1, _BLOCK // len(means))):
        rows = block.double()
        chosen = (rows @ weight.T).argmax(1, keepdim=True)
        rows = rows - centre
        distances = norms - 2 * rows @ centred.T
        rounding = ROUNDING * (rows.square().sum(1, keepdim=True) + norms.max())
        nearest = distances.amin(1, keepdim=True) + rounding
        agreeing += (distances.gather(1, chosen) <= nearest).sum()
    return agreeing


def _mean(statistics: Statistics) -> _Found:
    if statistics.value is None:
        return _Found(None, ["there is no pair of classes with directions"])
    return _Found(statistics.value)


def _std(statistics: Statistics, what: str) -> _Found:
    if statistics.infinite:
        return _Found(None, [f"{statistics.infinite} {what} have an infinite value"])
    if statistics.std is None:
        return _Found(None, [f"needs at least two {what}, got {statistics.count}"])
    return _Found(statistics.std)


def _cv(statistics: Statistics, what: str) -> _Found:
    std = _std(statistics, what)
    if std.value is None:
        return std
    if statistics.mean == 0:
        return _Found(None, [f"the mean over {what} is 0"])
    return _Found(std.value / abs(statistics.mean))


def _coincidence_notes(statistics: Statistics, how: str) -> list[str]:
    if not statistics.infinite:
        return []
    total = statistics.count + statistics.infinite
    others = f"; the mean of the others is {statistics.mean:.6g}" if statistics.count else ""
    return [f"infinite: {statistics.infinite} of {total} pairs {how}{others}"]


def _dominance_notes(statistics: Statistics) -> list[str]:
    """A note where one pair makes up most of a mean of positive values."""
    total = statistics.mean * statistics.count
    if statistics.infinite or statistics.count < 3 or statistics.largest <= total / 2:
        return []
    share = statistics.largest / total
    return [f"one of {statistics.count} pairs makes up {share:.0%} of the sum"]


def _centred(means: Tensor) -> tuple[Tensor, Tensor]:
    """Means less their mean, and which of them equal the centre up to rounding."""
    centre = means.mean(0)
    centred = means - centre
    return centred, centred.norm(dim=1) <= ROUNDING * centre.norm()


def _zero_rows(points: Tensor) -> Tensor:
    return points.norm(dim=1) == 0


def _direction_notes(without: Tensor, why: str) -> list[str]:
    count = int(without.sum())
    return [f"{count} classes with {why} have no direction and are left out"] if count else []


def _require_finite(rows: Tensor, name: str, what: str) -> None:
    bad = ~rows.isfinite().all(dim=1)
    if bad.any():
        raise ValueError(
            f"{name} must be finite, got NaN or infinity in the {what} of class "
            f"{int(bad.nonzero()[0])}; look for overflow in the model's forward pass"
        )
