"""`couple()`: from scores to the mask of coupled weights.

Per matrix, with N_f, N_p, N_g the top-r entries on fairness, privacy and general examples:

    paper:     (N_f & N_p) - N_g
    released:  { A_j : A_j not in N_g and B_j not in N_g },  A, B the ascending lists of N_f and N_p

`released` is what DEAN's published code computes: it compares the two lists position by position
and is no intersection. The controls show what a part of the rule does by itself, after the same
subtraction.

The sets of a matrix stay on the device where they were selected; what goes to the CPU is the entry
of the mask.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_UP, Context, Decimal
from itertools import combinations
from math import prod

import torch
from torch import Tensor, nn

from fastdean.coupling.scores import ScoreEntry, Scores, fingerprint
from fastdean.coupling.units import unit_layers
from fastdean.data.rendering import differing_renderings
from fastdean.masks import MaskEntry, NeuronMask
from fastdean.masks.summary import place_of
from fastdean.models.adapters import plain_parameter, plain_submodule
from fastdean.models.model_state import materialised_weight, unwrap
from fastdean.ops.reference import importance
from fastdean.ops.selection import select_top
from fastdean.wording.log import logger
from fastdean.wording.mendable import InputTypeError

__all__ = ["couple", "overlap"]

DEFAULT_RATIO = {"weight": 5e-7, "neuron": 1e-3}
SCOPES = ("matrix", "model")
UNIT_WEIGHTS = ("down", "all")


@dataclass(frozen=True)
class _Sets:
    """The selected entries of one matrix, int64 ascending without repetition, on one device."""

    first: Tensor
    second: Tensor
    general: Tensor
    numel: int

    @classmethod
    def together(
        cls, first: Tensor, second: Tensor, general: Sequence[Tensor], numel: int
    ) -> _Sets:
        """Sets from anywhere, brought to where `first` is: scores may be on several devices."""
        spared = [first[:0], *(index.to(first.device) for index in general)]
        return cls(first, second.to(first.device), _union(*spared), numel)


def couple(
    first: Scores,
    second: Scores,
    *,
    general: Scores | Sequence[Scores] | None = None,
    ratio: float | Sequence[float] | None = None,
    rule: str = "paper",
    min_k: int = 0,
    scope: str = "matrix",
    seed: int = 0,
    model: nn.Module | None = None,
    unit_weights: str = "down",
) -> NeuronMask:
    """Select the coupled entries and return them as a mask.

    Args:
        first, second: scores on the two awareness data sets, of one model. For "released" the order
            matters: the entries come from the first list (the published README: privacy first).
        general: scores whose top entries are spared: none, one, or several (their union is spared).
        ratio: share r of a matrix's entries in each top set, k = int(r * numel); one number, or one
            each for first, second and general. Default 5e-7 for weights, 1e-3 for units.
        rule: "paper" or "released", or a control after the same subtraction: "first", "second",
            "union", "random" (as many per matrix as "paper" selects, drawn from the entries outside
            general).
        min_k: at least this many candidates in every matrix, whatever the ratio.
        scope: "matrix": the top r of each matrix; "model": the top r of all matrices together.
        seed: for "random".
        model: needed only where the scores lack the values of the selected weights: unit scores or
            the rule "random" with scores that were read from files or made with keep_top, and
            unit_weights="all".
        unit_weights: for unit scores, which weights of a unit the mask holds. "down": its column of
            the down projection, which takes the unit out of the function the model computes. "all":
            also its row of gate and up and its entry of their biases. With scale 0 the two compute
            the same, and "all" leaves no weight of the unit; with another scale they do not, as
            "all" then scales every factor of the unit.
    Returns:
        NeuronMask with scale 0.
    Raises:
        ValueError: the scores do not belong together, the ratio selects nothing anywhere, sparse
            scores do not hold what is asked for, or `unit_weights="all"` and the model is missing
            or leaves open which weights these are.
        RuntimeError: the model's weights have changed since they were scored.
    Source:
        DEAN (arXiv 2410.16672), coupled-neuron selection; "released" from the authors' code.
    """
    general = [] if general is None else [general] if isinstance(general, Scores) else list(general)
    everyone = [first, second, *general]
    _require_scores(everyone)
    for other in everyone[1:]:
        first.require_same_weights(other)
    for scores in everyone:
        scores.require_unchanged_weights()
    _warn_about_renderings(first, second, general)
    if model is not None:
        model = unwrap(model)
        _require_scored_model(first, model)
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if scope not in SCOPES:
        raise ValueError(f"scope must be 'matrix' or 'model', got {scope!r}")
    if isinstance(min_k, bool) or not isinstance(min_k, int):
        raise InputTypeError(f"min_k must be an integer, got {type(min_k).__name__}; give a count")
    if min_k < 0:
        raise ValueError(f"min_k must be at least 0, got {min_k}")
    _require_unit_weights(unit_weights, first.granularity, model)
    ratios = _three_ratios(DEFAULT_RATIO[first.granularity] if ratio is None else ratio)

    top = _top_of_matrices if scope == "matrix" else _top_of_model
    chosen = [top(scores, r, min_k) for scores, r in zip((first, second), ratios[:2], strict=True)]
    spared = [top(scores, ratios[2], min_k) for scores in general]
    _require_candidates(first, ratios, chosen, scope)

    entries, table = {}, []
    for position, (name, entry) in enumerate(first.entries.items()):
        sets = _Sets.together(
            chosen[0][name], chosen[1][name], [tops[name] for tops in spared], entry.numel
        )
        try:
            kept = RULES[rule](sets, seed, position)
        except ValueError as error:
            raise ValueError(f"rule {rule!r} in {name}: {error}") from None
        table.append(_table_row(name, sets, kept, entry))
        if kept.numel():
            entries[name] = _mask_entry(name, kept, everyone, model)
        if kept.numel() and unit_weights == "all":
            in_front = _entries_in_front(name, kept, model)
            entries |= in_front
            table += [_row_in_front(name, entry) for name, entry in in_front.items()]
    _report_empty([row for row in table if row["numel"]], scope)
    return NeuronMask(
        entries,
        manifest={
            "rule": rule,
            "ratio": ratios[0] if len(set(ratios)) == 1 else list(ratios),
            "scope": scope,
            "min_k": min_k,
            "granularity": first.granularity,
            **({"unit_weights": unit_weights} if unit_weights != "down" else {}),
            **({"seed": seed} if rule == "random" else {}),
            "first": first.manifest,
            "second": second.manifest,
            "general": [scores.manifest for scores in general],
        },
        table=table,
    )


def _warn_about_renderings(first: Scores, second: Scores, general: Sequence[Scores]) -> None:
    names = ("general", *(f"general {n}" for n in range(2, len(general) + 1)))
    sets = {"first": first, "second": second, **dict(zip(names, general, strict=False))}
    data = {name: scores.manifest.get("data") or {} for name, scores in sets.items()}
    for caution in differing_renderings(data):
        logger.warning("%s", caution)
    for one, other in combinations(sets, 2):
        digests = [(data[name] or {}).get("sha256") for name in (one, other)]
        if digests[0] is not None and digests[0] == digests[1]:
            logger.warning(
                "%s and %s were scored on the same examples: what is coupled there is one set "
                "with itself",
                one,
                other,
            )


def overlap(
    first: Scores,
    second: Scores,
    *,
    general: Scores | None = None,
    ratios: Sequence[float],
) -> list[dict]:
    """How much the top sets overlap, matrix by matrix, at each ratio.

    Returns:
        One row per ratio: k (candidates of `first`), coupled, expected_by_chance (of two
        independent sets of these sizes), removed by general, kept by the rule "paper"; each summed
        over matrices.
    Raises:
        ValueError: a ratio out of range, or scores that do not belong together.
    """
    everyone = [first, second, *([] if general is None else [general])]
    _require_scores(everyone)
    for other in everyone[1:]:
        first.require_same_weights(other)
    rows = []
    for ratio in ratios:
        if not _is_ratio(ratio):
            raise ValueError(
                f"ratios must be numbers above 0 and at most 1, got {ratio!r}; leave it out"
            )
        row = {
            "ratio": ratio,
            "k": 0,
            "coupled": 0,
            "expected_by_chance": 0.0,
            "removed": 0,
            "kept": 0,
        }
        for name, entry in first.entries.items():
            k = count(entry.numel, ratio, 0)
            a, b, *spared = (scores.select(name, k) for scores in everyone)
            sets = _Sets.together(a, b, spared, entry.numel)
            coupled, removed = _coupled_and_removed(sets)
            row["k"] += sets.first.numel()
            row["coupled"] += coupled
            row["expected_by_chance"] += sets.first.numel() * sets.second.numel() / sets.numel
            row["removed"] += removed
            row["kept"] += coupled - removed
        rows.append(row)
    return rows


def _paper(sets: _Sets, seed: int, position: int) -> Tensor:
    return sets.first[_is_in(sets.first, sets.second) & ~_is_in(sets.first, sets.general)]


def _released(sets: _Sets, seed: int, position: int) -> Tensor:
    if sets.first.numel() != sets.second.numel():
        raise ValueError(
            "first and second must select equally many entries, as they are compared by position, "
            f"got {sets.first.numel()} and {sets.second.numel()}; use one ratio for both"
        )
    spared = _is_in(sets.first, sets.general) | _is_in(sets.second, sets.general)
    return sets.first[~spared]


def _first(sets: _Sets, seed: int, position: int) -> Tensor:
    return _difference(sets.first, sets.general)


def _second(sets: _Sets, seed: int, position: int) -> Tensor:
    return _difference(sets.second, sets.general)


def _either(sets: _Sets, seed: int, position: int) -> Tensor:
    return _difference(_union(sets.first, sets.second), sets.general)


def _random(sets: _Sets, seed: int, position: int) -> Tensor:
    """Uniform without replacement outside `general`: ranks among the others, then their places."""
    size = _paper(sets, seed, position).numel()
    generator = random.Random(f"{seed}/{position}")
    device = sets.general.device
    ranks = sorted(generator.sample(range(sets.numel - sets.general.numel()), size))
    below = sets.general - torch.arange(sets.general.numel(), device=device)
    ranks = torch.tensor(ranks, dtype=torch.int64, device=device)
    return ranks + torch.searchsorted(below, ranks, right=True)


RULES: dict[str, Callable[[_Sets, int, int], Tensor]] = {
    "paper": _paper,
    "released": _released,
    "first": _first,
    "second": _second,
    "union": _either,
    "random": _random,
}


def _is_in(a: Tensor, b: Tensor) -> Tensor:
    """Which entries of `a` are in `b`, both ascending without repetition: bool, shape of `a`."""
    if b.numel() == 0:
        return torch.zeros_like(a, dtype=torch.bool)
    return b[torch.searchsorted(b, a).clamp_max(b.numel() - 1)] == a


def _difference(a: Tensor, b: Tensor) -> Tensor:
    return a[~_is_in(a, b)]


def _union(*sets: Tensor) -> Tensor:
    return torch.cat(sets).unique()


def _coupled_and_removed(sets: _Sets) -> tuple[int, int]:
    """How many entries are in first and second, and how many of these are in general too."""
    coupled = _is_in(sets.first, sets.second)
    removed = coupled & _is_in(sets.first, sets.general)
    return tuple(torch.stack([coupled.sum(), removed.sum()]).tolist())


def _top_of_matrices(scores: Scores, ratio: float, min_k: int) -> dict[str, Tensor]:
    return {
        name: scores.select(name, count(entry.numel, ratio, min_k))
        for name, entry in scores.entries.items()
    }


def _top_of_model(scores: Scores, ratio: float, min_k: int) -> dict[str, Tensor]:
    """The top r of all matrices together; ties go to the earlier matrix, then the lower index."""
    if scores.is_sparse:
        raise ValueError(
            "scope='model' must have dense scores, got scores made with keep_top; the model's top "
            "entries may all lie in one matrix, so score without keep_top"
        )
    if min_k:
        raise ValueError(
            "min_k must be 0 with scope='model', where no matrix has a share of its own"
        )
    k = int(ratio * sum(entry.numel for entry in scores.entries.values()))
    # A matrix can hold no more of the top k than its own top k.
    candidates = {name: scores.select(name, min(k, e.numel)) for name, e in scores.entries.items()}
    values = [_importance_at(scores, name, index) for name, index in candidates.items()]
    everything = torch.cat([part.to(values[0].device) for part in values])
    taken = torch.zeros_like(everything, dtype=torch.bool)
    taken[select_top(everything, None, 1, k)] = True
    parts = taken.split([index.numel() for index in candidates.values()])
    return {
        name: index[part.to(index.device)]
        for (name, index), part in zip(candidates.items(), parts, strict=True)
    }


def _importance_at(scores: Scores, name: str, index: Tensor) -> Tensor:
    """Importance of some entries of a dense score, fp32 [M]."""
    entry = scores.entries[name]
    factor = entry.factor
    if factor is not None:
        factor = factor.flatten()[index.to(factor.device)]
    return importance(entry.sums.flatten()[index], factor, scores.num_examples)


def count(numel: int, ratio: float, min_k: int) -> int:
    """k, how many of a matrix's `numel` entries a top set takes."""
    return min(numel, max(int(ratio * numel), min_k))


def smallest_ratio(largest: int) -> float:
    """The smallest ratio of two significant digits that selects one of `largest` entries."""
    return float(Context(prec=2, rounding=ROUND_UP).divide(Decimal(1), Decimal(largest)))


def nothing_selected(ratio: float, largest: int, scope: str) -> ValueError:
    """What to raise for a ratio that selects none of the `largest` entries compared at once."""
    where, otherwise = (
        ("the largest matrix", ", or set min_k=1") if scope == "matrix" else ("all matrices", "")
    )
    return ValueError(
        f"ratio must select at least one entry, got {ratio:g}, which selects none of the "
        f"{largest:,} of {where}; the smallest that would is {smallest_ratio(largest):g}{otherwise}"
    )


def _three_ratios(ratio: float | Sequence[float]) -> tuple[float, float, float]:
    ratios = tuple(ratio) if isinstance(ratio, list | tuple) else (ratio,) * 3
    if len(ratios) != 3 or not all(_is_ratio(r) for r in ratios):
        raise ValueError(
            "ratio must be one number above 0 and at most 1, or three (first, second, general), "
            f"got {ratio!r}; give it as a number"
        )
    return ratios


def _is_ratio(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def _require_scores(everyone: Sequence[Scores]) -> None:
    for scores in everyone:
        if not isinstance(scores, Scores):
            raise InputTypeError(
                f"couple takes Scores, got {type(scores).__name__}; make them with fastdean.score()"
            )


def _require_scored_model(scores: Scores, model: nn.Module) -> None:
    for name, entry in scores.entries.items():
        if fingerprint(_weight_of(model, name)) != entry.fingerprint:
            raise ValueError(
                f"model must be the one that was scored, got other values in {name}; restore its "
                "mask or pass the model the scores were made on"
            )


def _require_unit_weights(unit_weights: str, granularity: str, model: nn.Module | None) -> None:
    if unit_weights not in UNIT_WEIGHTS:
        raise ValueError(f"unit_weights must be 'down' or 'all', got {unit_weights!r}")
    if unit_weights == "all" and granularity != "neuron":
        raise ValueError(
            "unit_weights must be 'down' for scores of weights, got 'all'; "
            "score with granularity='neuron'"
        )
    if unit_weights == "all" and model is None:
        raise ValueError(
            "model must be given with unit_weights='all', got None; the scores know the down "
            "projections only, pass model="
        )


def _require_candidates(
    first: Scores, ratios: Sequence[float], chosen: Sequence[Mapping[str, Tensor]], scope: str
) -> None:
    for which, sets in zip(("first", "second"), chosen, strict=True):
        if any(index.numel() for index in sets.values()):
            continue
        sizes = [entry.numel for entry in first.entries.values()]
        largest = max(sizes) if scope == "matrix" else sum(sizes)
        r = ratios[0] if which == "first" else ratios[1]
        if int(r * largest) > 0:
            raise ValueError(
                f"{which} scores must hold a positive importance, got only zeros; "
                "score other examples"
            )
        raise nothing_selected(r, largest, scope)


def _report_empty(table: Sequence[Mapping], scope: str) -> None:
    empty = [row["name"] for row in table if row["k"] == 0]
    if empty and scope == "matrix":
        logger.warning(
            "the ratio selects nothing from %d of %d matrices (the first is %s); min_k lifts it",
            len(empty),
            len(table),
            empty[0],
        )


def _table_row(name: str, sets: _Sets, kept: Tensor, entry: ScoreEntry) -> dict:
    coupled, removed = _coupled_and_removed(sets)
    return {
        "name": name,
        **place_of(name),
        "numel": sets.numel,
        "k": max(sets.first.numel(), sets.second.numel()),
        "first": sets.first.numel(),
        "second": sets.second.numel(),
        "coupled": coupled,
        "removed": removed,
        "kept": kept.numel(),
        "weights": kept.numel() * (prod(entry.shape) // entry.numel),
    }


def _mask_entry(
    name: str, kept: Tensor, everyone: Sequence[Scores], model: nn.Module | None
) -> MaskEntry:
    entry = everyone[0].entries[name]
    index = kept if entry.unit_axis is None else _unit_places(kept, entry)
    weight = _whole_weight(name, everyone, model)
    if weight is not None:
        original = weight.flatten()[index.to(weight.device)].cpu()
    else:
        original = _stored_values(name, index, everyone).cpu()
    return MaskEntry(index=index.cpu(), original=original, shape=entry.shape)


def _entries_in_front(down: str, units: Tensor, model: nn.Module) -> dict[str, MaskEntry]:
    """What makes up these units in the layers in front of their down projection."""
    entries = {}
    for name, index in unit_layers(model, down).places(units.cpu()).items():
        values = plain_parameter(model, name).detach()
        original = values.flatten()[index.to(values.device)].cpu()
        entries[name] = MaskEntry(index=index, original=original, shape=tuple(values.shape))
    return entries


def _row_in_front(name: str, entry: MaskEntry) -> dict:
    """A row without candidates of its own: the units are counted where they were scored."""
    counted = dict.fromkeys(("numel", "k", "first", "second", "coupled", "removed", "kept"), 0)
    return {"name": name, **place_of(name), **counted, "weights": len(entry)}


def _unit_places(units: Tensor, entry: ScoreEntry) -> Tensor:
    """Flat indices, ascending, of every weight that multiplies one of the units."""
    rows, columns = entry.shape
    if entry.unit_axis == 1:
        starts = torch.arange(0, rows * columns, columns, device=units.device)
        return (starts[:, None] + units[None, :]).flatten()
    places = torch.arange(columns, device=units.device)
    return (units[:, None] * columns + places[None, :]).flatten()


def _whole_weight(name: str, everyone: Sequence[Scores], model: nn.Module | None) -> Tensor | None:
    if model is not None:
        return _weight_of(model, name)
    for scores in everyone:
        weight = scores.entries[name].weight
        if weight is not None and tuple(weight.shape) == scores.entries[name].shape:
            return weight
    return None


def _weight_of(model: nn.Module, name: str) -> Tensor:
    """A weight of the model, detached; an offloaded one is copied to the CPU."""
    try:
        weight = plain_parameter(model, name)
    except AttributeError:
        raise ValueError(
            f"model must be the one that was scored, got one without {name}; pass the model the "
            "scores were made on"
        ) from None
    if weight.device.type == "meta":
        weight = materialised_weight(plain_submodule(model, name.removesuffix(".weight")))
    return weight.detach()


def _stored_values(name: str, index: Tensor, everyone: Sequence[Scores]) -> Tensor:
    """The original values at `index`, put together from what sparse scores hold."""
    values, found = None, torch.zeros_like(index, dtype=torch.bool)
    for scores in everyone:
        entry = scores.entries[name]
        if entry.index is None or entry.weight is None or not entry.index.numel():
            continue
        stored, held = (part.to(index.device) for part in (entry.index, entry.weight))
        if values is None:
            values = torch.zeros_like(index, dtype=held.dtype)
        places = torch.searchsorted(stored, index).clamp_max(stored.numel() - 1)
        here = stored[places] == index
        values = torch.where(here, held[places], values)
        found |= here
    if values is None or not found.all():
        raise ValueError(
            f"model must be given to couple these scores, got scores that do not hold the weights "
            f"of {name} at the selected entries; pass model="
        )
    return values
