"""`couple()`: from scores to the mask of coupled weights.

Take each matrix's top entries on every data set, apply the rule, and put what it selects into the
mask. The sets stay on the device where they were selected; the mask's entries go to the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import prod

from torch import Tensor, nn

from fastdean.coupling.results.score_entry import ScoreEntry
from fastdean.coupling.results.scores import Scores
from fastdean.coupling.selection.agreement import Agreement, require_signs
from fastdean.coupling.selection.mask_entries import (
    entries_in_front,
    mask_entry,
    require_scored_model,
)
from fastdean.coupling.selection.rules import RULES, TopSets
from fastdean.coupling.selection.top_entries import (
    count,
    is_ratio,
    nothing_selected_error,
    three_ratios,
    top_entries,
)
from fastdean.data.rendering import differing_rendering_cautions
from fastdean.default_device import cpu_by_default
from fastdean.masks import MaskEntry, NeuronMask
from fastdean.masks.summary import SIGN_COLUMNS, place_of
from fastdean.models.model_state import unwrap
from fastdean.models.ranks.sharded import resharded
from fastdean.wording.log import logger
from fastdean.wording.mendable import InputTypeError
from fastdean.wording.numbers import require_whole

__all__ = ["couple", "overlap"]

DEFAULT_RATIO = {"weight": 5e-7, "unit": 1e-3}
SCOPES = ("matrix", "model")
UNIT_WEIGHTS = ("down", "all")
# Marks warnings about data sets: who makes several masks of the same ones tells them once.
ABOUT_DATA = {"about": "data"}


@cpu_by_default
def couple(
    first: Scores,
    second: Scores,
    *,
    general: Scores | Sequence[Scores] | None = None,
    ratio: float | Sequence[float] | None = None,
    rule: str = "paper",
    min_k: int = 0,
    scope: str = "matrix",
    expert_scope: str | None = None,
    seed: int = 0,
    signs: str = "any",
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
        expert_scope: with scope "matrix", whether each expert's part of a matrix of fused experts
            has a top set of its own ("expert") or the whole of it has one ("tensor"). None: as the
            scores were made, which sparse ones cannot do without.
        seed: for "random".
        signs: "any"; "same": only coupled entries on which both sets agree, whose zeroing lowers
            both losses or raises both, to first order; "opposite": only the others. With the rules
            "paper" and "random", of scores made with signs.
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
            scores do not hold what is asked for, the scores have no signs to choose by, or
            `unit_weights="all"` and the model is missing or leaves open which weights these are.
        RuntimeError: the model's weights have changed since they were scored.
    Source:
        DEAN (arXiv 2410.16672), coupled-neuron selection; "released" from the authors' code.
    """
    general = _as_list(general)
    _require_scores([first, second, *general])
    if expert_scope is not None:
        first, second, *general = (s.scoped(expert_scope) for s in (first, second, *general))
    everyone = [first, second, *general]
    _require_same_weights(everyone)
    for scores in everyone:
        scores.require_unchanged_weights()
    _warn_about_data(first, second, general)
    if model is not None:
        model = unwrap(model)
        resharded(model)
        require_scored_model(first, model)
    _require_options(rule, scope, min_k, seed)
    min_k, seed = int(min_k), int(seed)
    require_signs(signs, rule, first, second)
    _require_unit_weights(unit_weights, first.granularity, model)
    ratios = three_ratios(DEFAULT_RATIO[first.granularity] if ratio is None else ratio)

    of_first = top_entries(first, ratios[0], min_k, scope)
    of_second = top_entries(second, ratios[1], min_k, scope)
    of_general = [top_entries(scores, ratios[2], min_k, scope) for scores in general]
    _require_candidates(first, ratios, (of_first, of_second), scope)

    has_signs = first.has_signs and second.has_signs
    entries, table = {}, []
    for position, (name, entry) in enumerate(first.entries.items()):
        spared = [top[name] for top in of_general]
        agreement = None
        if has_signs:
            agreement = Agreement.of(name, first, second, (of_first[name], of_second[name]))
        sets = TopSets.of(
            of_first[name],
            of_second[name],
            spared,
            entry.numel,
            seed=f"{seed}/{position}",
            matrices=entry.matrices,
            wanted=None if agreement is None else agreement.wanted(signs),
        )
        try:
            selected = RULES[rule](sets)
        except ValueError as error:
            raise ValueError(f"rule {rule!r} in {name}: {error}") from None
        table.append(_table_row(name, sets, selected, entry, agreement))
        if selected.numel():
            entries[name] = mask_entry(name, selected, everyone, model)
        if selected.numel() and unit_weights == "all":
            assert model is not None  # `_require_unit_weights` refused the other.
            in_front = entries_in_front(name, selected, model)
            entries |= in_front
            table += [_row_in_front(name, entry, has_signs) for name, entry in in_front.items()]
    _warn_about_empty([row for row in table if row["numel"]], scope)
    return NeuronMask(
        entries,
        manifest={
            "rule": rule,
            "ratio": ratios[0] if len(set(ratios)) == 1 else list(ratios),
            "scope": scope,
            "min_k": min_k,
            "granularity": first.granularity,
            **({"expert_scope": first.expert_scope} if _has_experts(first) else {}),
            **({"unit_weights": unit_weights} if unit_weights != "down" else {}),
            **({"seed": seed} if rule == "random" else {}),
            **({"signs": signs} if signs != "any" else {}),
            "first": first.manifest,
            "second": second.manifest,
            "general": [scores.manifest for scores in general],
        },
        table=table,
    )


@cpu_by_default
def overlap(
    first: Scores,
    second: Scores,
    *,
    general: Scores | Sequence[Scores] | None = None,
    ratios: Sequence[float],
) -> list[dict]:
    """Count how much the top sets overlap, matrix by matrix, at each ratio.

    Args:
        general: as `couple` takes it: none, one, or several.
    Returns:
        One row per ratio: k (candidates of `first`), coupled, expected_by_chance (of two
        independent sets of these sizes), removed by general, kept by the rule "paper"; each summed
        over matrices.
    Raises:
        ValueError: a ratio out of range, or scores that do not belong together.
    """
    everyone = [first, second, *_as_list(general)]
    _require_scores(everyone)
    _require_same_weights(everyone)
    rows = []
    for ratio in ratios:
        if not is_ratio(ratio):
            raise ValueError(
                f"ratios must be numbers above 0 and at most 1, got {ratio!r}; leave it out"
            )
        row = {"ratio": ratio, "k": 0, "coupled": 0, "expected_by_chance": 0.0}
        row |= {"removed": 0, "kept": 0}
        for name, entry in first.entries.items():
            k = count(entry.competing, ratio, 0)
            a, b, *spared = (scores.select(name, k) for scores in everyone)
            sets = TopSets.of(a, b, spared, entry.numel, matrices=entry.matrices)
            coupled, removed = sets.coupled_and_removed()
            row["k"] += sets.first.numel()
            row["coupled"] += coupled
            row["expected_by_chance"] += sets.expected_by_chance()
            row["removed"] += removed
            row["kept"] += coupled - removed
        rows.append(row)
    return rows


def _as_list(general: Scores | Sequence[Scores] | None) -> list[Scores]:
    return [] if general is None else [general] if isinstance(general, Scores) else list(general)


def _warn_about_data(first: Scores, second: Scores, general: Sequence[Scores]) -> None:
    names = ("general", *(f"general {n}" for n in range(2, len(general) + 1)))
    sets = {"first": first, "second": second, **dict(zip(names, general, strict=False))}
    data = {name: scores.manifest.get("data") or {} for name, scores in sets.items()}
    for caution in differing_rendering_cautions(data):
        logger.warning("%s", caution, extra=ABOUT_DATA)
    for one, other in combinations(sets, 2):
        digests = [data[name].get("sha256") for name in (one, other)]
        if digests[0] is not None and digests[0] == digests[1]:
            logger.warning(
                "%s and %s were scored on the same examples: what is coupled there is one set "
                "with itself",
                one,
                other,
                extra=ABOUT_DATA,
            )


def _require_scores(everyone: Sequence[Scores]) -> None:
    for scores in everyone:
        if not isinstance(scores, Scores):
            raise InputTypeError(
                f"couple takes Scores, got {type(scores).__name__}; make them with fastdean.score()"
            )


def _has_experts(scores: Scores) -> bool:
    return any(entry.num_experts for entry in scores.entries.values())


def _require_same_weights(everyone: Sequence[Scores]) -> None:
    for other in everyone[1:]:
        everyone[0].require_same_weights(other)


def _require_options(rule: str, scope: str, min_k: int, seed: int) -> None:
    if rule not in RULES:
        raise ValueError(
            f"rule must be one of {', '.join(RULES)}, got {rule!r}; leave it out for 'paper'"
        )
    if scope not in SCOPES:
        raise ValueError(f"scope must be 'matrix' or 'model', got {scope!r}")
    require_whole("min_k", min_k)
    require_whole("seed", seed)
    if min_k < 0:
        raise ValueError(f"min_k must be at least 0, got {min_k}")


def _require_unit_weights(unit_weights: str, granularity: str, model: nn.Module | None) -> None:
    if unit_weights not in UNIT_WEIGHTS:
        raise ValueError(f"unit_weights must be 'down' or 'all', got {unit_weights!r}")
    if unit_weights == "all" and granularity != "unit":
        raise ValueError(
            "unit_weights must be 'down' for scores of weights, got 'all'; "
            "score with granularity='unit'"
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
        if scope == "matrix":
            widest = max(first.entries.values(), key=lambda entry: entry.competing)
            largest, of_experts = widest.competing, widest.matrices > 1
        else:
            largest, of_experts = sum(entry.numel for entry in first.entries.values()), False
        r = ratios[0] if which == "first" else ratios[1]
        if int(r * largest) > 0:
            raise ValueError(
                f"{which} scores must hold a positive importance, got only zeros; "
                "score other examples"
            )
        raise nothing_selected_error(r, largest, scope, of_experts=of_experts)


def _warn_about_empty(table: Sequence[Mapping], scope: str) -> None:
    empty = [row["name"] for row in table if row["k"] == 0]
    if empty and scope == "matrix":
        logger.warning(
            "the ratio selects nothing from %d of %d matrices (the first is %s); min_k lifts it",
            len(empty),
            len(table),
            empty[0],
        )


def _table_row(
    name: str, sets: TopSets, selected: Tensor, entry: ScoreEntry, agreement: Agreement | None
) -> dict:
    coupled, removed = sets.coupled_and_removed()
    return {
        "name": name,
        **place_of(name),
        "numel": sets.numel,
        "k": max(sets.first.numel(), sets.second.numel()),
        "first": sets.first.numel(),
        "second": sets.second.numel(),
        "coupled": coupled,
        "removed": removed,
        "kept": selected.numel(),
        "weights": selected.numel() * (prod(entry.shape) // entry.numel),
        **({} if agreement is None else agreement.counts()),
    }


def _row_in_front(name: str, entry: MaskEntry, has_signs: bool) -> dict:
    """A row without candidates of its own: the units are counted where they were scored."""
    columns = ("numel", "k", "first", "second", "coupled", "removed", "kept")
    counted = dict.fromkeys((*columns, *(SIGN_COLUMNS if has_signs else ())), 0)
    return {"name": name, **place_of(name), **counted, "weights": len(entry)}
