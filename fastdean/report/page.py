"""The page as a whole: its head, its sections in order, and its foot."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastdean.files.atomic import write_text_atomic
from fastdean.files.declared import Misfit
from fastdean.report.answers import answers_section, examples_section, judged_section
from fastdean.report.collapse import bias_section, collapse_section, training_section
from fastdean.report.coupled import coupling_section, overlap_section
from fastdean.report.details import (
    command_section,
    cost_section,
    data_section,
    manifest_section,
    other_section,
)
from fastdean.report.edit import Edit
from fastdean.report.effects import (
    dependence_section,
    margins_section,
    perplexities_section,
    perplexity_section,
)
from fastdean.report.experts import experts_section
from fastdean.report.general_grid import grid_section
from fastdean.report.key_numbers import key_numbers
from fastdean.report.markup import Html, element, items, join
from fastdean.report.quantities import count, measured, plural
from fastdean.report.results import RESULTS
from fastdean.report.summary import glance, masks_table
from fastdean.report.verdict import SMALL_WORDS, clauses
from fastdean.wording.mendable import InputTypeError

_GENERATOR = "FastDEAN report"
# Nothing on the page may load or run anything, even if a string should ever slip through.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"

# What the numbers of these sections are not.
_LIMITS = (
    (
        ("margins",),
        "A margin compares the likelihoods of given answers. It is not the verdict of a judge on "
        "what the model writes, and no measure of how often it refuses what it should answer.",
    ),
    (
        ("bias", "measures"),
        "A bias measure compares likelihoods on the sentences of one benchmark. A value at its "
        "neutral point does not make a model fair, and measures of different benchmarks need not "
        "agree.",
    ),
    (
        ("margins", "perplexity", "perplexities", "bias", "measures", "judged"),
        "Each interval covers chance in the drawing of the examples measured here, not the choice "
        "of model, data, ratio or seed. The more runs are compared, the likelier one interval "
        "excludes no effect by chance.",
    ),
    (
        ("collapse",),
        "The published regulariser evens out the cosines between class means and word embeddings. "
        "It does so whatever their common value is, and an even alignment is not fairness: the "
        "bias measures say whether anything followed from it.",
    ),
    (
        ("coupling",),
        "The importance of an entry is a first-order estimate of what zeroing it does to the loss. "
        "Coupling is an overlap of such estimates and not a mechanism.",
    ),
    (
        ("judged", "answers"),
        "The list of phrases sees refusals in English alone, and takes an answer that quotes one "
        "for one; a judge misses much, and each another part.",
    ),
    (
        ("hsic",),
        "HSIC needs pairs, and an example of one set has no natural partner among those of "
        "another: the pairing is arbitrary, and another one gives other values.",
    ),
    (
        ("coupling",),
        "Editing entries where they stand makes a model neither smaller nor faster.",
    ),
)


def render_report(results: dict) -> str:
    """The results of a run as one self-contained HTML page.

    `results` holds plain values as they come from JSON. Every section may be missing and is then
    left out; within a section, what is missing, None or not finite is written as a dash. Keys
    that the page has no section for are shown as JSON, so that nothing measured is lost.
    The page loads nothing from elsewhere and runs no script.

    Raises TypeError where `results` or a part of it is of the wrong type: see `results.py`.
    """
    checked(results)
    title = results.get("title") or "FastDEAN report"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="generator", content=_GENERATOR),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", Html(_style())),
    )
    main = element("main", _tiles(results), *_sections(results))
    body = element("body", _header(title, results), main, _footer(results))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def write_report(results: dict, path: str | os.PathLike) -> Path:
    """Write the page of `results` to `path`, whole or not at all, and return the path.

    A reader never sees half of it, and a failure leaves an earlier report as it was.

    Raises FileNotFoundError where the folder does not exist, TypeError as `render_report` does.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"path must be in an existing folder, got {str(path)!r}; create {path.parent} first"
        )
    write_text_atomic(path, render_report(results))
    return path


def is_report(path: Path) -> bool:
    """Whether `path` is a page that `write_report` wrote."""
    try:
        with open(path, encoding="utf-8") as file:
            start = file.read(4096)
    except (OSError, ValueError):
        return False
    return f'name="generator" content="{_GENERATOR}"' in start


def checked(results: object) -> None:
    """Raise TypeError unless `results` is what `results.py` declares."""
    if not isinstance(results, Mapping):
        raise InputTypeError(
            f"results must be a dict, got {type(results).__name__}; pass the results of a run, "
            "read from their file with json.load"
        )
    try:
        RESULTS.check(results, "results")
    except Misfit as misfit:
        raise InputTypeError(
            f"{misfit.where} must be {misfit.expected}, got {misfit.got}; leave it out if there is "
            "nothing to show"
        ) from None


def _style() -> str:
    return files("fastdean.report").joinpath("style.css").read_text(encoding="utf-8")


def _header(title: str, results: dict) -> Html:
    model = results.get("model") or {}
    line: list[str] = [element("strong", model["name"])] if model.get("name") else []
    if measured(model.get("parameters")):
        line.append(f"{count(model['parameters'])} parameters")
    if model.get("dtype"):
        line.append(str(model["dtype"]))
    if results.get("created"):
        line.append(element("time", _date(results["created"]), datetime=results["created"]))
    warnings = results.get("warnings") or ()
    if warnings:
        line.append(element("a", plural(len(warnings), "warning"), href="#words"))
    separated = [part for item in line for part in (" · ", item)][1:]
    return element(
        "header",
        element("h1", title),
        element("p", *separated, class_="byline"),
        _verdict(results),
    )


def _verdict(results: dict) -> Html | None:
    """The one line that answers what came of it."""
    said = clauses(results)
    if not said:
        return None
    parts = [
        element(
            "span",
            element("strong", f"{each.name}: ") if each.name else None,
            f"{each.said}. ",
            class_="claims" if each.claims else None,
        )
        for each in said
    ]
    small = any(", small" in each.said for each in said)
    return element(
        "div",
        element("h2", "Verdict", class_="unseen"),
        element("p", *parts),
        element("p", f"{SMALL_WORDS[:1].upper()}{SMALL_WORDS[1:]}.", class_="note")
        if small
        else None,
        class_="verdict",
    )


def _date(created: str) -> str:
    """The date in words; text that is no ISO date stays as it is."""
    try:
        moment = datetime.fromisoformat(created)
    except ValueError:
        return created
    zone = f" {moment.tzname()}" if moment.tzinfo else ""
    return f"{moment.day} {moment:%B %Y, %H:%M}{zone}"


def _tiles(results: dict) -> Html | None:
    numbers = key_numbers(results)
    if not numbers:
        return None
    return element("div", element("h2", "Key numbers", class_="unseen"), numbers)


def _words(results: dict) -> Html | None:
    """What was found, in sentences, and what must be known beside it."""
    parts = [
        items("ol", results.get("findings") or (), "findings"),
        items("ul", results.get("warnings") or (), "warnings"),
    ]
    return join(parts) if any(parts) else None


def _sections(results: dict) -> list[Html | None]:
    """Plots first, then words, then every figure in numbers, then what the run was made of."""
    edit, tests = Edit.of(results.get("options")), results.get("tests")

    def of(key: str, draw: Callable[..., Html], *more: Any) -> Html | None:
        return draw(results[key], *more) if results.get(key) else None

    masks = masks_table(results)
    edited = "Model" if results.get("collapse") else "Mask"
    sections = [
        ("glance", "At a glance", glance(results)),
        ("masks", "Masks beside each other", masks and masks.html()),
        ("judged", "Verdicts", results.get("judged") and judged_section(results)),
        ("answers", "Answers side by side", results.get("answers") and answers_section(results)),
        ("collapse", "Neural collapse", of("collapse", collapse_section)),
        ("bias", "Bias measures", of("bias", bias_section, tests)),
        ("measures", "Measures", of("measures", bias_section, tests)),
        ("training", "Training", of("training", training_section)),
        ("general_grid", "Price against the general ratio", of("general_grid", grid_section, edit)),
        ("words", "In words", _words(results)),
        ("coupling", "Coupling per layer and module", of("coupling", coupling_section, edit)),
        ("overlap", "Overlap against ratio", of("overlap", overlap_section, edit)),
        ("expert_load", "Load per expert", of("expert_load", experts_section)),
        ("margins", "Margins before and after", of("margins", margins_section, edit, tests)),
        ("perplexity", "Perplexity", of("perplexity", perplexity_section, tests, edited)),
        ("perplexities", "Perplexities", of("perplexities", perplexities_section, tests)),
        ("hsic", "Dependence of representations", of("hsic", dependence_section, edit)),
        ("examples", "One example of each set", of("shown", examples_section)),
        ("cost", "Cost", of("cost", cost_section)),
        ("data", "Data and options", data_section(results)),
        ("command", "Command", of("command", command_section)),
        ("manifest", "Manifest", of("manifest", manifest_section)),
        ("other", "Other results", other_section(results)),
    ]
    return [
        element(
            "section",
            element("h2", heading, id=f"{name}-heading"),
            element("div", content, class_="content"),
            id=name,
            aria_labelledby=f"{name}-heading",
        )
        for name, heading, content in sections
        if content
    ]


def _footer(results: dict) -> Html | None:
    limits = [limit for sections, limit in _LIMITS if any(map(results.get, sections))]
    if not limits:
        return None
    return element(
        "footer",
        element("h2", "What these numbers are not"),
        items("ul", limits, "content"),
    )
