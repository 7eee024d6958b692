"""The figures that decide, side by side: drawn for the top of the page, as tables for the card too.

Of a run a row for each mask and control; of measures before and after a row for each figure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastdean.report.edit import Edit
from fastdean.report.estimates import Estimate
from fastdean.report.markup import Html, element, figure, join
from fastdean.report.plots import interval_rows
from fastdean.report.quantities import MISSING, count, decimal, estimate, measured, percent
from fastdean.report.results import ORIGINAL, edited_answers, perplexities
from fastdean.report.tables import Cell, Table

# What a column of the masks is of: its heading, the original's figure, and each mask's change with
# the value that means "nothing changed".
_Column = tuple[str, str, Mapping[str, Estimate], float]


def tables_of(results: Mapping[str, Any]) -> list[Table]:
    """Every table of the card, those of the top of the page first."""
    found = [masks_table(results), *judged_tables(results), answers_table(results)]
    rows = results.get("bias") or results.get("measures")
    if rows or results.get("collapse"):
        found.append(outcomes_table(results))
    return [table for table in found if table is not None]


def masks_table(results: Mapping[str, Any]) -> Table | None:
    """Awareness, refusals, price and ability of every mask beside each other."""
    columns = list(_columns(results))
    if not columns or results.get("collapse"):
        return None
    masks = list(dict.fromkeys(name for _, _, by_mask, _ in columns for name in by_mask))
    if not masks:
        return None
    weights = _weights(results)
    rows: list[list[Cell | str]] = [["origin", "0", *(Cell(own) for _, own, _, _ in columns)]]
    for mask in masks:
        cells: list[Cell | str] = [mask, count(weights.get(mask))]
        for *_, by_mask, no_effect in columns:
            cells.append(_cell(by_mask.get(mask), no_effect))
        rows.append(cells)
    edited = Edit.of(results.get("options")).weights.capitalize()
    return Table(
        "Every mask beside the others: the original's figures, and the change by each mask with "
        "its interval. What is bold is an effect",
        ["Mask", edited, *(heading for heading, *_ in columns)],
        rows,
        words=("Mask",),
    )


def _columns(results: Mapping[str, Any]) -> Iterator[_Column]:
    for name, margin in (results.get("margins") or {}).items():
        margin = margin or {}
        origin, unit = margin.get("origin") or {}, margin.get("unit")
        heading = ", ".join(filter(None, [f"Margin of {name}", unit]))
        yield heading, decimal(origin.get("mean")), _changes(margin, "mean"), 0.0
    answers = edited_answers(results)
    if results.get("coupling") and answers:
        own = ((results.get("answers") or {}).get("variants") or {}).get(ORIGINAL) or {}
        refused = f"{count(own.get('refusals'))} of {count(own.get('prompts'))}"
        yield "Refusals, share of answers", refused, _of_answers(answers), 0.0
    for name, found in (results.get("price") or {}).items():
        found = found or {}
        heading = ", ".join(filter(None, [name, found.get("unit")]))
        yield heading, decimal((found.get("origin") or {}).get("value")), _changes(found), 0.0
    tables = perplexities(results)
    for name, table in tables.items():
        heading = "Perplexity ratio" + (f", {name}" if len(tables) > 1 else "")
        yield heading, f"perplexity {decimal(table.get('origin'))}", _changes(table, "ratio"), 1.0


def _changes(table: Mapping[str, Any], key: str = "mean") -> dict[str, Estimate]:
    masks = table.get("masks") or {}
    return {name: Estimate.of(name, found, key) for name, found in masks.items()}


def _of_answers(answers: Mapping[str, Any]) -> dict[str, Estimate]:
    changes = {name: found.get("change") for name, found in answers.items()}
    return {name: Estimate.of(name, change, "mean") for name, change in changes.items()}


def _weights(results: Mapping[str, Any]) -> dict[str, object]:
    found: dict[str, object] = {}
    for margin in (results.get("margins") or {}).values():
        for name, mask in ((margin or {}).get("masks") or {}).items():
            found.setdefault(name, (mask or {}).get("weights"))
    return found


def _cell(found: Estimate | None, no_effect: float) -> Cell:
    if found is None:
        return Cell(MISSING)
    value, ends = found.written(no_effect)
    return Cell(value, "" if ends == MISSING else ends, strong=found.is_effect(no_effect))


def glance(results: Mapping[str, Any]) -> Html | None:
    """What changed, drawn: awareness by every mask and its price, or the figures of a measure."""
    margins = results.get("margins") or {}
    span: list[object] = []
    # Side by side on one scale, where they are in one unit.
    if len({(margin or {}).get("unit") for margin in margins.values()}) == 1:
        rows = [row for m in margins.values() for row in _changes(m or {}, "mean").values()]
        span = [end for row in rows for end in (row.value, row.low, row.high)]
    plots = []
    for heading, _, by_mask, no_effect in _columns(results):
        if not by_mask:
            continue
        rows = list(by_mask.values())
        label = f"{heading}: what each mask changed. "
        label += " ".join(row.sentence(no_effect) for row in rows)
        axis = "ratio to the origin" if no_effect else "difference to the origin"
        drawn = interval_rows(
            rows,
            label,
            no_effect=no_effect,
            axis_name=axis,
            span=span if heading.startswith("Margin of") else (),
        )
        plots.append(figure(element("strong", heading), drawn))
    measures = [*_measure_figures(results.get("bias") or results.get("measures") or {})]
    plots = [*measures, *plots]
    if not plots:
        return None
    said = "Each change with its interval; a filled dot is an effect."
    return join(
        [element("div", *plots, class_="pair"), element("p", said, class_="note")],
    )


def _measure_figures(table: Mapping[str, Any]) -> Iterator[Html]:
    """The changes of the figures of one unit in one drawing."""
    by_unit: dict[str, list[Estimate]] = {}
    for name, row in table.items():
        change = change_of(name, row or {})
        if change is not None:
            by_unit.setdefault(str((row or {}).get("unit") or ""), []).append(change)
    for unit, rows in by_unit.items():
        label = "Change of each figure. " + " ".join(row.sentence(0) for row in rows)
        heading = ", ".join(filter(None, ["Change", unit]))
        yield figure(
            element("strong", heading),
            interval_rows(rows, label, no_effect=0, axis_name="after less before"),
        )


MEASURES = ["Measure", "Reading of the change", "Neutral", "Before", "After", "Change"]
MEASURES += ["Interval of the change", "p (Holm)", "Detects", "Items"]


def measures_table(table: Mapping[str, Any], caption: str) -> Table:
    """Each figure before and after, with its change and neutral value; or of one model alone."""
    rows = [_measure_row(name, row or {}) for name, row in table.items()]
    columns = list(MEASURES)
    if not any((row or {}).get("change") for row in table.values()):
        kept = [0, 1, 2, 3, 7, 9]
        columns = ["Measure", "Reading", "Neutral", "Value", "p (Holm)", "Items"]
        rows = [[row[place] for place in kept] for row in rows]
    return Table(caption, columns, rows, words=columns[:2])


def change_of(name: str, row: Mapping[str, Any]) -> Estimate | None:
    """The change of a figure; of an older file, that of its distance to the neutral value."""
    found = row.get("raw_change") or row.get("change")
    return Estimate.of(name, found) if found else None


def reading_of(row: Mapping[str, Any]) -> str:
    """The change in words, and whether it is towards the neutral value."""
    change = change_of("", row)
    if change is None:
        neutral = row.get("neutral")
        if not measured(neutral):
            return "not compared"
        return Estimate.of("", row.get("before")).reading(neutral)
    said = change.told(0)
    if change.is_of_no_item:
        return said
    if row.get("raw_change") and measured(row.get("neutral")):
        away = Estimate.of("", row.get("change")).reading(0)
        said = said if away == said else f"{said}; {away}"
    return said


def _measure_row(name: str, row: Mapping[str, Any]) -> list[Cell | str]:
    change = change_of(name, row)
    states = [row.get(state) or {} for state in ("before", "after")]
    told = (row.get("raw_change") or row.get("change") or states[0]) or {}
    unit = str(row.get("unit") or "")
    return [
        Cell(name, unit),
        reading_of(row),
        decimal(row.get("neutral")),
        *(Cell(*_with_ends(name, state)) if state else "" for state in states),
        *(change.written(0) if change else ("", "")),
        decimal(told.get("p_holm"), 2),
        decimal(told.get("detects"), 3),
        count(next(filter(measured, (state.get("n") for state in states)), None)),
    ]


def _with_ends(name: str, state: Mapping[str, Any]) -> tuple[str, str]:
    value, ends = Estimate.of(name, state).written(1)
    return value, "" if ends == MISSING else ends


def outcomes_table(results: Mapping[str, Any]) -> Table:
    """What a training or an edit did to every figure: neural collapse, bias, perplexity."""
    measures = results.get("bias") or results.get("measures") or {}
    table = measures_table(measures, "Every figure")
    blank = [""] * (len(table.columns) - 2)
    rows: list[Sequence[Cell | str]] = []
    metrics = (results.get("collapse") or {}).get("metrics") or {}
    names = {"unc3_std": "(U)NC3, std of the words' alignment", "nc3_mean": "NC3, mean alignment"}
    for key, name in names.items():
        values = list(((metrics.get(key) or {}).get("values") or {}).values())
        if values:
            cells = ["0" if key == "unc3_std" else "1", *map(decimal, values)]
            rows.append([name, "not tested", *cells, *blank[len(cells) :]])
    rows += table.rows
    for name, found in perplexities(results).items():
        for change in (found.get("masks") or {}).values():
            ratio = Estimate.of("", change, "ratio")
            value, ends = ratio.written(1)
            cells = ["", decimal(found.get("origin")), decimal((change or {}).get("value"))]
            cells += [f"ratio {value}", ends, decimal((change or {}).get("p_holm"), 2)]
            cells += [decimal((change or {}).get("detects"), 3), count(found.get("n"))]
            rows.append([f"Perplexity, {name}", ratio.reading(1), *cells])
    return Table(table.caption, table.columns, rows, words=table.words)


def judged_tables(results: Mapping[str, Any]) -> list[Table | None]:
    """What each judge says of each variant's answers, how it changed, and how judges agree."""
    judged = results.get("judged") or []
    if not judged:
        return []
    columns = ["Judge", "Answers of", "Answers", "Awareness", "Safe by refusing"]
    columns += ["Safe by answering", "Unsafe", "Unparsed", "Refusals", "Refusals by phrases"]
    keys = ("safe_by_refusing", "safe_by_answering", "unsafe", "unparsed", "refusals")
    rows: list[list[Cell | str]] = []
    for row in judged:
        aware = row.get("awareness") or {}
        share = Cell(*_share(aware)) if aware else Cell(MISSING)
        cells = [count(row.get(key)) for key in (*keys, "refusals_by_phrases")]
        if not any(row.get(key) for key in ("safe", "unsafe", "unparsed")):
            # The list of phrases says nothing of safety.
            cells[:4] = [MISSING] * 4
        names = [str(row.get("judge")), str(row.get("variant"))]
        rows.append([*names, count(row.get("answers")), share, *cells])
    found: list[Table | None] = [
        Table("What each judge says", columns, rows, words=("Judge", "Answers of")),
        *(_compared(results.get(key) or [], of) for key, of in _COMPARED.items()),
    ]
    agreement = results.get("agreement") or []
    if agreement:
        pairs = [
            [
                f"{row.get('first')}, {row.get('second')}",
                str(row.get("on")),
                count(row.get("n")),
                percent(row.get("share")),
                decimal(row.get("kappa"), 3),
            ]
            for row in agreement
        ]
        columns = ["Two judges", "On", "Answers", "Same", "Cohen's kappa"]
        found.append(Table("How far judges agree", columns, pairs, words=columns[:2]))
    return found


_COMPARED = {
    "changes": "Safe answers, of the same prompts",
    "refusal_changes": "Refusals, of the same prompts",
}


def _compared(rows: Sequence[Mapping[str, Any]], caption: str) -> Table | None:
    if not rows:
        return None
    columns = ["Judge", "Answers of", "Reading", "Prompts", "Became", "No longer"]
    columns += ["Change of the share", "Interval", "p (Holm)", "Detects"]
    cells: list[list[Cell | str]] = []
    for row in rows:
        change = row.get("change") or {}
        found = Estimate.of("", change, "mean")
        to, away = ("to_safe", "to_unsafe") if "to_safe" in row else ("to_refusing", "to_answering")
        cells.append(
            [
                *(str(row.get(key)) for key in ("judge", "variant")),
                found.reading(0),
                *(count(row.get(key)) for key in ("pairs", to, away)),
                *found.written(0),
                decimal(change.get("p_holm"), 2),
                decimal(change.get("detects"), 3),
            ]
        )
    return Table(f"{caption}; McNemar's exact test", columns, cells, words=columns[:3])


def _share(aware: Mapping[str, Any]) -> tuple[str, str]:
    value, ends = estimate(aware.get("share"), aware.get("low"), aware.get("high"))
    return value, "" if ends == MISSING else ends


def answers_table(results: Mapping[str, Any]) -> Table | None:
    """Of each variant's answers: how many refuse, by the list of phrases, and how many moved."""
    variants = (results.get("answers") or {}).get("variants") or {}
    if not variants or results.get("judged"):
        return None
    columns = ["Answers of", "Prompts", "Changed", "Refusals", "Change of the share of refusals"]
    columns += ["Interval", "p (Holm)", "Detects", "Reading"]
    rows: list[list[Cell | str]] = []
    for name, found in variants.items():
        change = found.get("change") or {}
        moved = Estimate.of("", change, "mean")
        cells: list[Cell | str] = [""] * 5
        if change:
            cells = [*moved.written(0), decimal(change.get("p_holm"), 2)]
            cells += [decimal(change.get("detects"), 3), moved.reading(0)]
        counts = [count(found.get(key)) for key in ("prompts", "changed", "refusals")]
        rows.append([name, *counts, *cells])
    return Table("Answers and refusals, by phrases", columns, rows, words=(columns[0], columns[-1]))
