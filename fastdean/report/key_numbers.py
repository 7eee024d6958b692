"""The strip of key numbers at the top of the page."""

from __future__ import annotations

from collections.abc import Iterator

from fastdean.report.coupled import coupling_totals
from fastdean.report.details import seconds_of
from fastdean.report.edit import Edit
from fastdean.report.effects import margin_estimates, perplexity_estimates
from fastdean.report.estimates import Estimate
from fastdean.report.markup import Html, terms
from fastdean.report.quantities import count, duration, measured, memory, percent
from fastdean.report.results import perplexities

# What a number is of, the number, and a note.
_KeyNumber = tuple[str, str, str]


def key_numbers(results: dict) -> Html | None:
    """Each with a note, as far as the results have them."""
    edit = Edit.of(results.get("options"))
    numbers = [
        *_of_coupling(results.get("coupling"), edit),
        *_of_coverage(results.get("coverage")),
        *_of_effects(results, edit),
        *_of_cost(results.get("cost")),
    ]
    return terms(numbers, "strip") if numbers else None


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
    tables = perplexities(results)
    for name, perplexity in tables.items():
        heading = "Perplexity ratio" + (f", {name}" if len(tables) > 1 else "")
        yield from _of_mask(heading, perplexity_estimates(perplexity), 1, edit)


def _of_mask(
    heading: str, masks: list[tuple[Estimate, dict]], no_effect: float, edit: Edit
) -> Iterator[_KeyNumber]:
    """The mask of the run's rule, or the first one where none has that name."""
    rows = [row for row, _ in masks]
    for row in [row for row in rows if row.name == edit.rule] or rows[:1]:
        yield heading, row.written(no_effect)[0], f"{row.name}: {row.reading(no_effect)}"


def _of_cost(cost: list | None) -> Iterator[_KeyNumber]:
    if cost:
        peaks = [step["peak_bytes"] for step in cost if measured(step.get("peak_bytes"))]
        note = f"peak memory {memory(max(peaks))}" if peaks else "all steps"
        yield "Time", duration(seconds_of(cost)), note
