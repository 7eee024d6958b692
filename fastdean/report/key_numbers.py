"""The strip of key numbers at the top of the page."""

from __future__ import annotations

from collections.abc import Iterator

from fastdean.report.coupled import coupling_totals
from fastdean.report.details import seconds_of
from fastdean.report.edit import Edit
from fastdean.report.effects import margin_estimates, perplexity_estimates
from fastdean.report.estimates import Estimate
from fastdean.report.figure_names import short_names
from fastdean.report.markup import Html, terms
from fastdean.report.quantities import count, decimal, duration, measured, memory, percent
from fastdean.report.results import perplexities
from fastdean.report.summary import change_of, reading_of

# What a number is of, the number, and a note.
_KeyNumber = tuple[str, str, str]
# Tiles of measures, or of judges.
_MOST = 6


def key_numbers(results: dict) -> Html | None:
    """Each with a note, as far as the results have them."""
    edit = Edit.of(results.get("options"))
    numbers = [
        *_of_effects(results, edit),
        *_of_collapse(results.get("collapse")),
        *_of_coupling(results.get("coupling"), edit),
        *_of_coverage(results.get("coverage")),
        *_of_judges(results.get("judged")),
        *_of_cost(results.get("cost")),
    ]
    return terms(numbers, "strip") if numbers else None


def _of_judges(judged: list | None) -> Iterator[_KeyNumber]:
    for row in (judged or [])[:_MOST]:
        aware = row.get("awareness") or {}
        if measured(aware.get("share")):
            heading = f"Awareness of {row.get('variant')}"
            yield heading, decimal(aware["share"], 3), f"by {row.get('judge')}, safe share"


def _of_coupling(coupling: dict | None, edit: Edit) -> Iterator[_KeyNumber]:
    if coupling:
        total = coupling_totals(coupling)
        heading = f"{edit.weights.capitalize()} {edit.done}"
        yield heading, count(total.get("kept")), f"of {count(total.get('numel'))} scored"
        yield "Coupled", count(total.get("coupled")), f"of {count(total.get('k'))} in each top set"


def _of_coverage(coverage: dict | None) -> Iterator[_KeyNumber]:
    if coverage:
        note = f"{count(coverage.get('scored_parameters'))} parameters"
        if measured(coverage.get("targets")):
            note += f" in {count(coverage['targets'])} matrices"
        left_out = [
            name
            for name, group in (coverage.get("groups") or {}).items()
            if group["modules"] > group["scored"] or group["unscorable"]
        ]
        if left_out:
            note += f"; left out, wholly or in part: {', '.join(left_out)}"
        yield "Share of the model scored", percent(coverage.get("share")), note


def _of_effects(results: dict, edit: Edit) -> Iterator[_KeyNumber]:
    for name, margin in (results.get("margins") or {}).items():
        unit = margin and margin.get("unit")
        heading = ", ".join(filter(None, [f"Margin of {name}", unit]))
        yield from _of_mask(heading, margin_estimates(margin), 0, edit)
    price = results.get("price") or {}
    short = short_names(price)
    for name, figure in price.items():
        heading = ", ".join(filter(None, [short[name], (figure or {}).get("unit")]))
        rows = [
            (Estimate.of(n, m, "mean"), m or {})
            for n, m in ((figure or {}).get("masks") or {}).items()
        ]
        yield from _of_mask(heading, rows, 0, edit)
    measures = results.get("bias") or results.get("measures") or {}
    short = short_names(measures)
    for name, row in list(measures.items())[:_MOST]:
        if (change := change_of(name, row or {})) is not None:
            heading = ", ".join(filter(None, [short[name], (row or {}).get("unit")]))
            yield heading, change.written(0)[0], reading_of(row)
    tables = perplexities(results)
    for name, perplexity in tables.items():
        heading = "Perplexity ratio" + (f", {name}" if len(tables) > 1 else "")
        yield from _of_mask(heading, perplexity_estimates(perplexity), 1, edit)


def _of_collapse(collapse: dict | None) -> Iterator[_KeyNumber]:
    """The paper's two figures, in the last state of the model, and how many words they are of."""
    metrics = (collapse or {}).get("metrics") or {}
    for name, heading in (("unc3_std", "(U)NC3, std"), ("nc3_mean", "NC3, mean")):
        values = list(((metrics.get(name) or {}).get("values") or {}).values())
        if values and measured(values[-1]):
            alone = {"unc3_std": "0: all aligned alike", "nc3_mean": "1: collapsed"}[name]
            note = f"it was {decimal(values[0])}" if len(values) > 1 else alone
            yield heading, decimal(values[-1]), note
    kept = ((collapse or {}).get("classes") or {}).get("kept")
    if measured(kept):
        yield "Classes", count(kept), "each one form of a word"


def _of_mask(
    heading: str, masks: list[tuple[Estimate, dict]], no_effect: float, edit: Edit
) -> Iterator[_KeyNumber]:
    """The mask of the run's rule, or the first one where none has that name."""
    rows = [row for row, _ in masks]
    for row in [row for row in rows if row.name == edit.rule] or rows[:1]:
        yield heading, row.written(no_effect)[0], f"{row.name}: {row.told(no_effect)}"


def _of_cost(cost: list | None) -> Iterator[_KeyNumber]:
    if cost:
        peaks = [step["peak_bytes"] for step in cost if measured(step.get("peak_bytes"))]
        note = f"peak memory {memory(max(peaks))}" if peaks else "all steps"
        yield "Time", duration(seconds_of(cost)), note
