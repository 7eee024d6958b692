"""The sections on what an edit changed: margins, perplexity, dependence of representations."""

from __future__ import annotations

from collections.abc import Sequence

from fastdean.report.markup import Column, Html, element, folded, join, table
from fastdean.report.plots import Interval, dependence_lines, interval_rows, legend, responsive
from fastdean.report.quantities import (
    count,
    decimal,
    estimate,
    measured,
    signed,
)
from fastdean.report.wording import Edit
from fastdean.wording import verdicts


def reading(row: Interval, reference: float) -> str:
    """In words what was found about `reference`, the value of no effect.

    The verdict that came with the results, see `fastdean.wording.verdicts`; without an interval
    none.
    """
    if not row.is_known:
        return "no interval: not to be judged" if measured(row.value) else "not measured"
    return verdicts.reading(row.low, row.high, reference, row.verdict)


def margin_intervals(margin: dict | None) -> list[tuple[Interval, dict]]:
    """The masks of one set of pairs as intervals of the difference to the origin."""
    return _intervals(margin, "mean")


def _intervals(measure: dict | None, value: str) -> list[tuple[Interval, dict]]:
    """The masks of one measure; one whose figures could not be taken has None for each."""
    masks = (measure or {}).get("masks") or {}
    return [
        (
            Interval(name, mask.get(value), mask.get("low"), mask.get("high"), mask.get("verdict")),
            mask,
        )
        for name, mask in ((name, mask or {}) for name, mask in masks.items())
    ]


def margins_section(margins: dict, edit: Edit) -> Html:
    """Differences of every mask to the origin with a line at zero, and the numbers."""
    said = (
        "A margin is how much likelier the model finds the safe answer of a pair than the unsafe "
        "one. Each mask is compared with the unedited model on the same pairs. A filled dot marks "
        "an effect: the interval leaves zero out, a test agrees, and there were enough pairs."
    )
    margins = {name: margin or {} for name, margin in margins.items()}
    units = {margin.get("unit") for margin in margins.values()}
    everything = [row for margin in margins.values() for row, _ in margin_intervals(margin)]
    span = []
    if len(units) == 1:
        span = [end for row in everything for end in (row.value, row.low, row.high)]
    plots = [
        _margin_figure(name, margin, span)
        for name, margin in margins.items()
        if margin.get("masks")
    ]
    tables = [_margin_table(name, margin) for name, margin in margins.items()]
    names = dict.fromkeys(row.name for row in everything)
    return join(
        [
            element("p", said),
            element("div", *plots, class_="pair"),
            *tables,
            _mask_notes(names, edit),
        ]
    )


def _margin_figure(name: str, margin: dict, span: Sequence[object]) -> Html:
    unit = str(margin.get("unit") or "unit not given")
    rows = margin_intervals(margin)
    label = f"Change of the {name} margin against the unedited model, {unit}. " + " ".join(
        f"{row.name}: {' '.join(row.written(0))}, {reading(row, 0)}." for row, _ in rows
    )
    return element(
        "figure",
        element("figcaption", element("strong", name.capitalize()), ": change of the margin"),
        interval_rows(
            [row for row, _ in rows],
            label,
            reference=0,
            axis_name=f"difference to the origin, {unit}",
            span=span,
        ),
    )


def _margin_table(name: str, margin: dict) -> Html:
    origin = margin.get("origin") or {}
    columns = [
        Column("Mask", words=True),
        Column("Reading", words=True),
        Column("Weights"),
        Column("Margin"),
        Column("Difference"),
        Column(_interval_heading(margin)),
    ]
    _, origin_interval = estimate(None, origin.get("low"), origin.get("high"))
    first = [
        "origin",
        "the unedited model; interval of its margin",
        "0",
        decimal(origin.get("mean")),
        "",
        origin_interval,
    ]
    rows = [
        [
            row.name,
            reading(row, 0),
            count(mask.get("weights")),
            decimal(_sum(origin.get("mean"), row.value)),
            *row.written(0),
        ]
        for row, mask in margin_intervals(margin)
    ]
    caption = f"{name.capitalize()} margins before and after, {margin.get('unit') or 'no unit'}"
    if measured(margin.get("pairs")):
        caption += f", {count(margin['pairs'])} pairs"
    return table(caption, columns, [first, *rows])


def _interval_heading(margin: dict) -> str:
    confidence = margin.get("confidence")
    return f"{100 * confidence:g} % interval" if measured(confidence) else "Interval"


def _sum(first: object, second: object) -> float | None:
    return first + second if measured(first) and measured(second) else None


def _mask_notes(names: Sequence[str], edit: Edit) -> Html | None:
    """What the known masks are; a mask of the user's own is not explained."""
    known = [(name, edit.selection(name)) for name in names if edit.selection(name)]
    if not known:
        return None
    notes = [element("div", element("dt", name), element("dd", words)) for name, words in known]
    return element("dl", *notes, class_="notes")


def perplexity_intervals(perplexity: dict) -> list[tuple[Interval, dict]]:
    """The masks as intervals of the ratio to the origin's perplexity."""
    return _intervals(perplexity, "ratio")


def perplexity_section(perplexity: dict) -> Html:
    """Perplexity of every mask as a ratio to the origin."""
    rows = perplexity_intervals(perplexity)
    said = f"The unedited model has a perplexity of {decimal(perplexity.get('origin'))}"
    if perplexity.get("text"):
        said += f" on {perplexity['text']}"
    if measured(perplexity.get("tokens")):
        said += f" ({count(perplexity['tokens'])} tokens)"
    said += ". A ratio above one is a model that predicts this text less well."
    label = "Perplexity as a ratio to the unedited model. " + " ".join(
        f"{row.name}: {' '.join(row.written(1))}, {reading(row, 1)}." for row, _ in rows
    )
    columns = [
        Column("Mask", words=True),
        Column("Reading", words=True),
        Column("Perplexity"),
        Column("Ratio to origin"),
        Column("Interval of the ratio"),
    ]
    cells = [
        [
            row.name,
            reading(row, 1),
            decimal(mask.get("value")),
            *row.written(1),
        ]
        for row, mask in rows
    ]
    first = ["origin", "the unedited model", decimal(perplexity.get("origin")), "1", ""]
    figure = None
    if rows:
        figure = element(
            "figure",
            element("figcaption", "Perplexity of each mask, as a ratio to the origin"),
            interval_rows(
                [row for row, _ in rows], label, reference=1, axis_name="ratio to the origin"
            ),
        )
    listed = table("Perplexity before and after", columns, [first, *cells])
    return join([element("p", said), figure, listed])


def dependence_section(hsic: dict) -> Html:
    """HSIC of fairness and privacy representations per layer, with its permutation null."""
    layers = hsic.get("layers") or []
    said = _dependence_words(layers)
    kernel = [hsic.get("estimator") and f"{hsic['estimator']} estimator"]
    kernel += [hsic.get("kernel") and f"{hsic['kernel']} kernel"]
    kernel += [hsic.get("bandwidth") and f"bandwidth {hsic['bandwidth']}"]
    kernel += [measured(hsic.get("n")) and f"{count(hsic['n'])} pairs of representations"]
    kernel += [hsic.get("pairing") and f"pairing: {hsic['pairing']}"]
    method = element("p", "; ".join(part for part in kernel if part), class_="note")
    if not layers:
        return join([method, element("p", "No layer was measured.")])
    samples = [
        (("second", "ring"), "before"),
        (("first", "square"), "after"),
        (("band", None), "band of pairings drawn at random (permutation null)"),
    ]
    figure = element(
        "figure",
        element("figcaption", "HSIC of fairness and privacy representations per layer"),
        legend(samples),
        responsive(lambda width: dependence_lines(layers, f"HSIC per layer. {said}", width)),
    )
    columns = [Column("Layer", words=True), Column("Before"), Column("After")]
    columns += [Column("Difference"), Column("Null band")]
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
    listed = folded(
        f"Every layer in numbers ({count(len(layers))})",
        table("HSIC per layer before and after the edit", columns, rows),
    )
    return join([element("p", said), method, figure, listed])


def _dependence_words(layers: Sequence[dict]) -> str:
    """How far the edit moved HSIC, against the width of the null band in the same layer."""
    known = [layer for layer in layers if _difference(layer) is not None]
    if not known:
        return "No layer was measured both before and after the edit."
    largest = max(known, key=lambda layer: abs(_difference(layer)))
    said = (
        f"The edit moves HSIC most in layer {largest.get('layer')}: {signed(_difference(largest))}"
    )
    low, high = largest.get("null_low"), largest.get("null_high")
    if measured(low) and measured(high):
        said += f", where the null band is {decimal(high - low, 3)} wide"
        if abs(_difference(largest)) <= high - low:
            said += ", so that this is not to be read as an effect"
    judged = [layer for layer in known if _within(layer) is not None]
    inside = sum(1 for layer in judged if _within(layer))
    said += "."
    if judged:
        said += (
            f" After the edit {count(inside)} of {count(len(judged))} layers lie no higher than "
            "the null band, where dependence cannot be told from chance."
        )
    return said


def _difference(layer: dict) -> float | None:
    before, after = layer.get("before"), layer.get("after")
    return after - before if measured(before) and measured(after) else None


def _within(layer: dict) -> bool | None:
    return layer["after"] <= layer["null_high"] if measured(layer.get("null_high")) else None
