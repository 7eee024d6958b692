"""The sections on what an edit changed: margins, perplexity, dependence of representations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastdean.report.edit import Edit
from fastdean.report.estimates import TESTED, Estimate, family_words, tested
from fastdean.report.markup import Html, element, figure, folded, join, table, terms
from fastdean.report.plots import dependence_lines, legend, responsive
from fastdean.report.quantities import count, decimal, estimate, measured, signed


def margin_estimates(margin: dict | None) -> list[tuple[Estimate, dict]]:
    """Each mask of one set of pairs, as an estimate of its difference to the origin."""
    return _estimates(margin, "mean")


def perplexity_estimates(perplexity: dict | None) -> list[tuple[Estimate, dict]]:
    """Each mask, as an estimate of its ratio to the origin's perplexity."""
    return _estimates(perplexity, "ratio")


def _estimates(measure: dict | None, key: str) -> list[tuple[Estimate, dict]]:
    """The masks of one measure; one whose figures could not be taken has None for each."""
    masks = (measure or {}).get("masks") or {}
    return [(Estimate.of(name, mask, key), mask or {}) for name, mask in masks.items()]


def margins_section(margins: dict, edit: Edit, tests: dict | None = None) -> Html:
    """What a margin is, and the numbers of every mask; the top of the page draws them."""
    said = (
        "A margin is how much likelier the model finds the safe answer of a pair than the unsafe "
        "one. Each mask is compared with the unedited model on the same pairs. An effect is "
        "claimed where the interval leaves zero out, a test agrees, and there were enough pairs."
    )
    margins = {name: margin or {} for name, margin in margins.items()}
    names = dict.fromkeys(row.name for m in margins.values() for row, _ in margin_estimates(m))
    return join(
        [
            element("p", said),
            _family_note(tests),
            *(_margin_table(name, margin, bool(tests)) for name, margin in margins.items()),
            _mask_notes(names, edit),
        ]
    )


def _family_note(tests: dict | None) -> Html | None:
    said = family_words(tests)
    return None if said is None else element("p", said, class_="note")


def _margin_table(name: str, margin: dict, together: bool) -> Html:
    origin, confidence = margin.get("origin") or {}, margin.get("confidence")
    _, origin_interval = estimate(None, origin.get("low"), origin.get("high"))
    rows = [
        [
            "origin",
            f"the unedited model; interval of its margin{' alone' if together else ''}",
            "0",
            decimal(origin.get("mean")),
            "",
            origin_interval,
            *(["", ""] if together else []),
        ]
    ]
    for row, mask in margin_estimates(margin):
        known = measured(origin.get("mean")) and measured(row.value)
        edited = origin["mean"] + row.value if known else None
        weights = count(mask.get("weights"))
        cells = tested(mask, 0) if together else []
        rows += [[row.name, row.reading(0), weights, decimal(edited), *row.written(0), *cells]]
    caption = f"Margins of {name} before and after, {margin.get('unit') or 'no unit'}"
    if measured(margin.get("pairs")):
        caption += f", {count(margin['pairs'])} pairs"
    interval = f"{100 * confidence:g} % interval" if measured(confidence) else "Interval"
    interval = f"Simultaneous {interval}" if together else interval
    columns = ["Mask", "Reading", "Weights", "Margin", "Difference", interval]
    columns += TESTED if together else []
    return table(caption, columns, rows, words=("Mask", "Reading"))


def _mask_notes(names: Iterable[str], edit: Edit) -> Html | None:
    """What the known masks are; a mask of the user's own is not explained."""
    known = [(name, edit.selection(name)) for name in names if edit.selection(name)]
    return terms(known, "notes") if known else None


def perplexity_section(
    perplexity: dict, tests: dict | None = None, edited: str = "Mask", where: str = ""
) -> Html:
    """Perplexity of every mask as a ratio to the origin, and its divergence from it.

    Args:
        edited: what heads the rows.
    """
    estimates, origin = perplexity_estimates(perplexity), decimal(perplexity.get("origin"))
    said = f"The unedited model has a perplexity of {origin}"
    if perplexity.get("text"):
        said += f" on {perplexity['text']}"
    if measured(perplexity.get("tokens")):
        said += f" ({count(perplexity['tokens'])} tokens)"
    said += ". A ratio above one is a model that predicts this text less well."
    moved = any(mask.get("kl") for _, mask in estimates)
    added = 2 * (bool(tests) + moved)
    rows = [["origin", "the unedited model", origin, "1", "", *[""] * added]]
    rows += [
        [
            row.name,
            row.reading(1),
            decimal(mask.get("value")),
            *row.written(1),
            *(tested(mask, 1) if tests else []),
            *(Estimate.of(row.name, mask.get("kl"), "mean").written(1) if moved else []),
        ]
        for row, mask in estimates
    ]
    columns = [edited, "Reading", "Perplexity", "Ratio to origin", "Interval of the ratio"]
    columns += TESTED if tests else []
    columns += ["KL, nats per token", "Interval of KL"] if moved else []
    if moved:
        said += (
            " KL is how far the edited model's predictions of each token lie from the unedited "
            "model's, in whatever direction; its intervals hold together over the masks."
        )
    listed = table(f"Perplexity{where} before and after", columns, rows, words=(edited, "Reading"))
    return join([element("p", said), _family_note(tests), listed])


def perplexities_section(tables: dict, tests: dict | None = None) -> Html:
    """Perplexity on each of several sets."""
    return join(
        part
        for name, table in tables.items()
        if table
        for part in (element("h3", name), perplexity_section(table, tests, where=f" on {name}"))
    )


def dependence_section(hsic: dict, edit: Edit) -> Html:
    """HSIC of both sets' representations per layer, with its permutation null."""
    layers = hsic.get("layers") or []
    said = _dependence_words(layers)
    method = [hsic.get("estimator") and f"{hsic['estimator']} estimator"]
    method += [hsic.get("kernel") and f"{hsic['kernel']} kernel"]
    method += [hsic.get("bandwidth") and f"bandwidth {hsic['bandwidth']}"]
    method += [measured(hsic.get("n")) and f"{count(hsic['n'])} pairs of representations"]
    method += [hsic.get("pairing") and f"pairing: {hsic['pairing']}"]
    note = element("p", "; ".join(filter(None, method)), class_="note")
    if not layers:
        return join([note, element("p", "No layer was measured.")])
    samples = [
        (("second", "ring"), "before"),
        (("first", "square"), "after"),
        (("band", None), "band of pairings drawn at random (permutation null)"),
    ]
    plot = figure(
        f"HSIC of {edit.names.first} and {edit.names.second} representations per layer",
        legend(samples),
        responsive(lambda width: dependence_lines(layers, f"HSIC per layer. {said}", width)),
    )
    rows = [
        [
            str(layer.get("layer")),
            decimal(layer.get("before")),
            decimal(layer.get("after")),
            signed(_difference(layer)),
            estimate(None, layer.get("null_low"), layer.get("null_high"))[1],
        ]
        for layer in layers
    ]
    columns = ["Layer", "Before", "After", "Difference", "Null band"]
    listed = folded(
        f"Every layer in numbers ({count(len(layers))})",
        table("HSIC per layer before and after the edit", columns, rows, words=("Layer",)),
    )
    return join([element("p", said), note, plot, listed])


def _dependence_words(layers: Sequence[dict]) -> str:
    """How far the edit moved HSIC, against the width of the null band in the same layer."""
    moved = [(layer, by) for layer in layers if (by := _difference(layer)) is not None]
    if not moved:
        return "No layer was measured both before and after the edit."
    largest, by = max(moved, key=lambda each: abs(each[1]))
    said = f"The edit moves HSIC most in layer {largest.get('layer')}: {signed(by)}"
    low, high = largest.get("null_low"), largest.get("null_high")
    if measured(low) and measured(high):
        said += f", where the null band is {decimal(high - low, 3)} wide"
        if abs(by) <= high - low:
            said += ", so that this is not to be read as an effect"
    said += "."
    judged = [layer for layer, _ in moved if measured(layer.get("null_high"))]
    if judged:
        inside = sum(layer["after"] <= layer["null_high"] for layer in judged)
        said += (
            f" After the edit {count(inside)} of {count(len(judged))} layers lie no higher than "
            "the null band, where dependence cannot be told from chance."
        )
    return said


def _difference(layer: dict) -> float | None:
    before, after = layer.get("before"), layer.get("after")
    return after - before if measured(before) and measured(after) else None
