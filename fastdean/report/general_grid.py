"""The section on the price against the general ratio: what must be spared, and what it leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastdean.report.edit import Edit
from fastdean.report.estimates import TESTED, Estimate, family_words, tested
from fastdean.report.markup import Html, element, figure, join, table
from fastdean.report.plots import ratio_panels, responsive
from fastdean.report.quantities import count, measured, ratio

# A measure's key in a row, the key of its value, and the value that means "nothing changed".
_MEASURES = (("margins", "mean", 0.0), ("perplexity", "ratio", 1.0))


def grid_section(grid: Mapping, edit: Edit) -> Html:
    """Margins and price at every general ratio, drawn one below the other, and the numbers."""
    rows = [row for row in grid.get("rows") or [] if measured(row.get("general_ratio"))]
    spared = edit.names.spared_sets or "the general set"
    said = (
        f"The two coupled sets keep their ratio; the ratio of {spared} varies, and with it how "
        f"many of the coupled {edit.entries} are spared. Too small a ratio leaves "
        f"{edit.entries} that general ability needs, too large a one leaves nothing to edit. "
        f"The run's own point is {ratio(grid.get('chosen'))}, marked by a line."
    )
    family = family_words(grid.get("tests"))
    panels = _panels(rows)
    plot = None
    if panels:
        label = f"Margins and price against the ratio of {spared}. " + " ".join(
            f"{name}, at {ratio(at)}: {' '.join(each.written(no_effect))}, "
            f"{each.reading(no_effect)}."
            for name, (no_effect, points) in panels.items()
            for at, each in points
        )
        chosen = grid.get("chosen")
        chosen = chosen if measured(chosen) else None
        axis_name = f"ratio of {spared}"
        plot = figure(
            "Margins and price as more is spared; a filled dot is an effect.",
            responsive(lambda width: ratio_panels(panels, chosen, label, width, axis_name)),
        )
    return join(
        [
            plot,
            element("p", said),
            None
            if family is None
            else element("p", f"{family} The grid is a family of its own.", class_="note"),
            _table(rows, grid.get("chosen"), edit),
        ]
    )


def _sets(rows: Sequence[Mapping], measure: str) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.get(measure) or {}))


def _name(measure: str, of: str) -> str:
    return f"Change of the {of} margin" if measure == "margins" else f"Perplexity ratio, {of}"


def _panels(
    rows: Sequence[Mapping],
) -> dict[str, tuple[float, Sequence[tuple[float, Estimate]]]]:
    return {
        _name(measure, of): (
            no_effect,
            [
                (row["general_ratio"], Estimate.of("", row[measure][of], key))
                for row in rows
                if (row.get(measure) or {}).get(of) and row["general_ratio"] > 0
            ],
        )
        for measure, key, no_effect in _MEASURES
        for of in _sets(rows, measure)
    }


def _table(rows: Sequence[Mapping], chosen: object, edit: Edit) -> Html:
    columns = ["General ratio", edit.done.capitalize()]
    words = ["General ratio"]
    measures = [(m, key, null, of) for m, key, null in _MEASURES for of in _sets(rows, m)]
    for measure, _, _, of in measures:
        name = _name(measure, of)
        columns += [name, f"Interval, {of}", *(f"{each}, {of}" for each in TESTED)]
        columns += [f"Reading, {of}"]
        words += [f"Reading, {of}"]
        columns += [f"KL, {of}", f"Interval of KL, {of}"] if measure == "perplexity" else []
    cells = []
    for row in rows:
        own = row["general_ratio"] == chosen
        cells += [[f"{ratio(row['general_ratio'])}{' (chosen)' if own else ''}"]]
        cells[-1] += [count(row.get("selected"))]
        for measure, key, no_effect, of in measures:
            numbers = (row.get(measure) or {}).get(of) or {}
            found = Estimate.of("", numbers, key)
            cells[-1] += [
                *found.written(no_effect),
                *tested(numbers, no_effect),
                found.reading(no_effect),
            ]
            if measure == "perplexity":
                cells[-1] += Estimate.of("", numbers.get("kl"), "mean").written(1)
    return table("Margins and price against the general ratio", columns, cells, words=words)
