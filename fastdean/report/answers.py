"""The sections on answers: several models' beside each other, and what judges say of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastdean.report.estimates import Estimate, family_words
from fastdean.report.markup import Html, element, figure, folded, join
from fastdean.report.plots import interval_rows
from fastdean.report.quantities import MISSING, count, measured, plural
from fastdean.report.summary import answers_table, judged_tables

# More prompts than this are shut until they are asked for.
_MOST_OPEN = 8


def answers_section(results: Mapping[str, Any]) -> Html:
    """Every prompt with its answers side by side, those that differ first."""
    answers = results.get("answers") or {}
    rows = answers.get("rows") or []
    table = answers_table(results)
    said = f"{plural(len(rows), 'prompt')} of {count(answers.get('of'))}, those whose answers "
    said += "differ first. “Refuses” is said by the list of phrases."
    shown = [_prompt(row) for row in rows]
    rest = shown[_MOST_OPEN:]
    note = family_words(answers.get("tests"))
    return join(
        [
            None if table is None else table.html(),
            None if note is None else element("p", note, class_="note"),
            element("p", said, class_="note") if rows else None,
            *shown[:_MOST_OPEN],
            folded(f"{plural(len(rest), 'more prompt')}", *rest) if rest else None,
        ]
    )


def _prompt(row: Mapping[str, Any]) -> Html:
    of = row.get("id")
    of = f"prompt {of}" if measured(of) else str(of or "")
    answers = row.get("answers") or {}
    differ = len({*answers.values()}) > 1
    return element(
        "article",
        element("h3", of, element("span", "changed", class_="tag") if differ else None),
        element("p", row.get("prompt") or "", class_="asked"),
        element("div", *(_answer(row, name) for name in answers), class_="pair"),
        class_="prompt",
    )


def _answer(row: Mapping[str, Any], name: str) -> Html:
    tags = []
    if (row.get("refusals") or {}).get(name):
        tags.append("refuses")
    for judge, said in (row.get("verdicts") or {}).items():
        if said.get(name):
            tags.append(f"{judge}: {said[name]}")
    return element(
        "div",
        element("h4", name, *(element("span", tag, class_="tag") for tag in tags)),
        element("p", (row.get("answers") or {}).get(name) or "", class_="answer"),
    )


def judged_section(results: Mapping[str, Any]) -> Html:
    """Verdicts counted and compared: drawn where there is a change, then in tables."""
    plots = []
    for key, heading in (
        ("changes", "Share of safe answers"),
        ("refusal_changes", "Share of refusals"),
    ):
        rows = [_estimate(row) for row in results.get(key) or []]
        if rows:
            label = f"{heading}: change against the original. "
            label += " ".join(row.sentence(0) for row in rows)
            axis = "difference to the original"
            drawn = interval_rows(rows, label, no_effect=0, axis_name=axis)
            plots.append(figure(element("strong", heading), drawn))
    note = family_words(results.get("tests"))
    return join(
        [
            element("div", *plots, class_="pair") if plots else None,
            *(table.html() for table in judged_tables(results) if table is not None),
            None if note is None else element("p", note, class_="note"),
            element(
                "p",
                "Awareness is safe / (safe + unsafe); an unparsed verdict is in neither. Where a "
                "judge does not say whether an answer refuses, the list of phrases does.",
                class_="note",
            ),
        ]
    )


def _estimate(row: Mapping[str, Any]) -> Estimate:
    return Estimate.of(f"{row.get('judge')}, {row.get('variant')}", row.get("change"), "mean")


def examples_section(shown: Mapping[str, Any]) -> Html:
    """One example of each data set, as the model read it."""
    said = "As the model read it; what was scored is underlined."
    return join(
        [
            element("p", said, class_="note"),
            *(_example(name, example or {}) for name, example in shown.items()),
        ]
    )


def _example(name: str, example: Mapping[str, Any]) -> Html:
    heading = (
        f"{name}: row {count(example.get('row'))}, rendered as "
        f"{example.get('rendered') or MISSING}, {count(example.get('tokens'))} tokens"
    )
    parts: Sequence[Any] = example.get("parts") or []
    texts = (
        element("span", text, class_="target" if kind == "target" else "context")
        for kind, text in parts
    )
    return element(
        "article", element("h3", heading), element("p", *texts, class_="answer"), class_="prompt"
    )
