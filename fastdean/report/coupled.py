"""The sections on sets of weights: coupling per layer and module, overlap against the ratio."""

from __future__ import annotations

from collections.abc import Sequence

from fastdean.report.edit import Edit
from fastdean.report.markup import Html, element, figure, folded, join, table
from fastdean.report.plots import coupling_bars, legend, overlap_lines, responsive
from fastdean.report.quantities import (
    MISSING,
    count,
    decimal,
    measured,
    percent,
    plural,
    quotient,
    ratio,
)
from fastdean.report.results import COUNTS, SIGNS

# More panels than this are added up into one: a mixture of experts has hundreds of matrices.
_MOST_PANELS = 12
_MOST_ROWS = 600


def coupling_totals(coupling: dict) -> dict[str, object]:
    """The section's own totals, or the sums of its rows where it brings none."""
    rows = coupling.get("rows") or []
    sums: dict[str, object] = {}
    if rows:
        sums = {key: sum(_whole(row.get(key)) for row in rows) for key in COUNTS}
        if any("same" in row for row in rows):
            sums |= {key: sum(row.get(key) or 0 for row in rows) for key in SIGNS}
    return {**sums, **(coupling.get("total") or {})}


def coupling_section(coupling: dict, edit: Edit) -> Html:
    """Bars per layer and module, and every matrix in a folded table."""
    rows, total = coupling.get("rows") or [], coupling_totals(coupling)
    where = f" over {plural(len(rows), 'matrix', 'matrices')}" if rows else ""
    said = (
        f"Of {count(total.get('k'))} {edit.entries} in each top set"
        f"{where}, {count(total.get('coupled'))} are in both "
        f"{_both(edit)}. {_spared_words(total, edit)}{_selected_words(total, edit)}."
    )
    said += _agreement(total, edit)
    if not rows:
        return element("p", said)
    if not total.get("coupled"):
        said += f" No matrix couples {edit.names.first} and {edit.names.second} at this ratio."
    drawn = _coupling_figure(rows, said, edit)
    return join([element("p", said), drawn, _matrix_table(rows, total, edit)])


def _both(edit: Edit) -> str:
    return f"the {edit.names.first} and the {edit.names.second} set"


def _spared_words(total: dict, edit: Edit) -> str:
    if not edit.names.spared:
        return "No set is spared; "
    # A name of its own, or the paper's.
    matter = "matter for general text" if edit.names.spared == ("general",) else ""
    matter = matter or f"are in {edit.names.spared_sets}"
    return f"{count(total.get('removed'))} of those {matter} as well and are spared; "


def _agreement(total: dict, edit: Edit) -> str:
    """On how many coupled entries the sets agree; nothing where the scores had no signs."""
    if not measured(total.get("same")):
        return ""
    chance = decimal(total.get("same_by_chance"), 3)
    return (
        f" Zeroing {count(total.get('same'))} of the coupled {edit.entries} helps both sets or "
        f"harms both, to first order; {chance} would if the signs on one set told nothing of those "
        f"on the other. On {count(total.get('opposite'))} the sets differ."
    )


def _selected_words(total: dict, edit: Edit) -> str:
    kept = count(total.get("kept"))
    if edit.is_coupled:
        return f"{kept} are {edit.done}"
    explained = edit.selection(edit.rule)
    meaning = f" ({explained})" if explained else ""
    return f"rule {edit.rule}{meaning} selects {kept} {edit.entries}, which are {edit.done}"


def _coupling_figure(rows: Sequence[dict], said: str, edit: Edit) -> Html:
    panels = _panels(rows)
    caption = f"Coupled {edit.entries} per layer and module. "
    samples = [(("track", None), "size k of each top set")]
    if edit.is_coupled:
        if edit.names.spared:
            spared = edit.names.spared_sets
            samples += [(("outlined", None), f"in both sets and in {spared}: spared")]
        samples += [(("solid", None), edit.done)]
    else:
        caption = (
            f"{edit.entries.capitalize()} that rule {edit.rule} selects, per layer and module, "
            "whether they are in both sets or not. "
        )
        samples += [(("solid", None), f"selected and {edit.done}")]
        if any(bar["kept"] > bar["k"] for bars in panels.values() for bar in bars.values()):
            caption += "A bar that is taller than k hides it. "
    if any(None in bars for bars in panels.values()):
        caption += "The bar marked – lies outside of the layers. "
    if len(panels) == 1 and len({_module(row) for row in rows}) > 1:
        caption += "Modules are added up, because there are too many for a panel each. "
    label, done, stacked = f"{caption}{said}", edit.done, edit.is_coupled
    return figure(
        caption,
        legend(samples),
        responsive(lambda width: coupling_bars(panels, label, width, done=done, stacked=stacked)),
    )


def _panels(rows: Sequence[dict]) -> dict[str, dict[int | None, dict[str, int]]]:
    """module -> layer -> sums over the matrices that share both."""
    one = len({_module(row) for row in rows}) > _MOST_PANELS
    panels: dict[str, dict[int | None, dict[str, int]]] = {}
    for row in rows:
        bars = panels.setdefault("all modules" if one else _module(row), {})
        bar = bars.setdefault(row.get("layer"), dict.fromkeys(COUNTS, 0))
        for key in COUNTS:
            bar[key] += _whole(row.get(key))
    return panels


def _module(row: dict) -> str:
    return str(row.get("module") or row.get("name") or MISSING)


def _matrix_table(rows: Sequence[dict], total: dict, edit: Edit) -> Html:
    shown, note = list(rows), None
    if len(rows) > _MOST_ROWS:
        coupled = [row for row in rows if row.get("coupled") or row.get("kept")]
        shown = coupled[:_MOST_ROWS]
        note = element(
            "p",
            f"{count(len(rows) - len(shown))} of {count(len(rows))} matrices are not listed; "
            f"{count(len(rows) - len(coupled))} of them have no coupled {edit.entry}.",
            class_="note",
        )
    first, second = (f"{name} set" for name in (edit.names.first, edit.names.second))
    columns = ["Matrix", edit.entries.capitalize(), "k", first, second, "In both"]
    # Where no set is spared, nothing could be.
    counted = [key for key in COUNTS if key != "removed" or edit.names.spared]
    columns += ["Spared"] if "removed" in counted else []
    columns += [edit.done.capitalize()]
    signed = measured(total.get("same"))
    columns += ["Signs agree", "Differ", "Agree by chance"] if signed else []
    listed = table(
        "Top sets and their overlap per matrix",
        columns,
        [
            [element("code", row.get("name") or _module(row)), *_counts(row, counted, signed)]
            for row in shown
        ],
        ["All matrices", *_counts(total, counted, signed)],
        words=("Matrix",),
    )
    return folded(f"Every matrix in numbers ({plural(len(rows), 'row')})", note, listed)


def _counts(row: dict, counted: Sequence[str], signed: bool) -> list[str]:
    cells = [count(row.get(key)) for key in counted]
    if signed:
        cells += [count(row.get("same")), count(row.get("opposite"))]
        cells += [decimal(row.get("same_by_chance"), 3)]
    return cells


def overlap_section(points: Sequence[dict], edit: Edit) -> Html:
    """Shares of the top sets against the ratio, beside what unrelated sets would share.

    It counts the coupled entries whatever the run's rule is: nothing of it is an edit.
    """
    points = sorted(points, key=lambda point: point.get("ratio") or 0)
    # Below the ratio at which the largest matrix has a candidate there is nothing to share.
    empty = [ratio(point.get("ratio")) for point in points if point.get("k") == 0]
    points = [point for point in points if point.get("k") != 0]
    if not points:
        return element("p", f"No matrix has a candidate at ratio {' or '.join(empty)}.")
    keys = {"shared": "coupled", "left": "kept", "chance": "expected_by_chance"}
    shares = [
        {"ratio": point.get("ratio")}
        | {name: quotient(point.get(key), point.get("k")) for name, key in keys.items()}
        for point in points
    ]
    said = "Two sets that have nothing to do with each other would share what chance gives; "
    said += f"{edit.entries} beyond that are what the two objectives have in common."
    if empty:
        said += f" No matrix has a candidate at ratio {' or '.join(empty)}."
    names = {"shared": "in both sets", "left": f"and not {_spared(edit)}", "chance": "by chance"}
    label = "Share of the top sets against the ratio. " + " ".join(
        f"At {ratio(share['ratio'])}: "
        + ", ".join(f"{percent(share[key])} {name}" for key, name in names.items())
        + "."
        for share in shares
    )
    # Where chance stays far below the other lines, its line cannot be told from the axis.
    chances = [share["chance"] for share in shares if measured(share["chance"])]
    most = f" ({percent(max(chances))} at most)" if chances else ""
    samples = [
        (("second", "ring"), f"in {_both(edit)}"),
        (("first", "square"), f"in both and not in {edit.names.spared_sets or 'any other'}"),
        (("quiet", None), f"in both sets by chance{most}"),
    ]
    drawn = figure(
        "Share of each top set that is coupled, as the sets grow.",
        legend(samples),
        responsive(lambda width: overlap_lines(shares, label, width, edit.entries)),
    )
    return join([element("p", said), drawn, _overlap_table(points, shares, edit)])


def _spared(edit: Edit) -> str:
    return " or ".join(edit.names.spared) or "in any other"


def _overlap_table(points: Sequence[dict], shares: Sequence[dict], edit: Edit) -> Html:
    columns = ["Ratio", "k, all matrices", "In both", "Share", "By chance", "Times chance"]
    columns += [f"Also {_spared(edit)}", f"Not {_spared(edit)}"]
    rows = [
        [
            ratio(point.get("ratio")),
            count(point.get("k")),
            count(point.get("coupled")),
            percent(share["shared"]),
            decimal(point.get("expected_by_chance"), 2),
            decimal(quotient(point.get("coupled"), point.get("expected_by_chance")), 3),
            count(point.get("removed")),
            count(point.get("kept")),
        ]
        for point, share in zip(points, shares, strict=True)
    ]
    return table("Overlap of the top sets against the ratio", columns, rows, words=("Ratio",))


def _whole(value: object) -> int:
    return int(value) if measured(value) else 0
