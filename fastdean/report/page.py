"""The page as a whole: its order, its head and foot, and the sections that are tables alone."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

from fastdean.files.atomic import write_text_atomic
from fastdean.files.declared import Misfit
from fastdean.report.collapse import bias_section, collapse_section, training_section
from fastdean.report.coupled import coupling_section, coupling_totals, overlap_section
from fastdean.report.effects import (
    dependence_section,
    margin_intervals,
    margins_section,
    perplexity_intervals,
    perplexity_section,
    reading,
)
from fastdean.report.markup import Column, Html, element, folded, join, table
from fastdean.report.quantities import (
    MISSING,
    count,
    decimal,
    duration,
    measured,
    memory,
    percent,
    quotient,
)
from fastdean.report.results import RESULTS
from fastdean.report.wording import Edit
from fastdean.wording.mendable import InputTypeError

_KINDS = {
    "title": str, "created": str, "command": str, "versions": dict, "findings": list,
    "model": dict, "data": dict, "options": dict, "coverage": dict, "coupling": dict,
    "overlap": list, "hsic": dict, "margins": dict, "perplexity": dict, "cost": list,
    "files": dict, "manifest": dict, "warnings": list, "collapse": dict, "training": dict,
    "bias": dict, "shown": dict,
}  # fmt: skip

# Nothing on the page may load or run anything, even if a string should ever slip through.
_GENERATOR = "FastDEAN report"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"

# What the numbers of these sections are not.
_LIMITS = (
    (
        ("margins",),
        "A margin compares the likelihoods of given answers. It is not the verdict of a judge on "
        "what the model writes, and no measure of how often it refuses what it should answer.",
    ),
    (
        ("bias",),
        "A bias measure compares likelihoods on the sentences of one benchmark. A value at its "
        "neutral point does not make a model fair, and measures of different benchmarks need not "
        "agree.",
    ),
    (
        ("margins", "perplexity", "bias"),
        "Each interval covers chance in the drawing of the examples measured here, not the choice "
        "of model, data, ratio or seed. The more is compared, the likelier one interval excludes "
        "no effect by chance.",
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
        ("hsic",),
        "HSIC needs pairs, and a fairness example has no natural partner among the privacy "
        "examples: the pairing is arbitrary, and another one gives other values.",
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
    that the page has no section for are shown as they are, so that nothing measured is lost.
    The page loads nothing from elsewhere and runs no script.

    Raises TypeError where `results` or a part of it is of the wrong type: see `results.py`.
    """
    _check(results)
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
    top = [_findings(results), _warnings(results), _key_numbers(results)]
    sections = [_section(*entry, results) for entry in _SECTIONS]
    main = element("main", *top, *sections)
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


def _check(results: object) -> None:
    if not isinstance(results, Mapping):
        raise InputTypeError(
            f"results must be a dict, got {type(results).__name__}; pass the results of a run, "
            "read from their file with json.load"
        )
    for key, kind in _KINDS.items():
        value = results.get(key)
        if value is not None and not isinstance(value, kind):
            raise InputTypeError(
                f"results[{key!r}] must be a {kind.__name__}, got {type(value).__name__}; "
                "leave the key out if there is nothing to show"
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
    line = [element("strong", model["name"])] if model.get("name") else []
    if measured(model.get("parameters")):
        line.append(f"{count(model['parameters'])} parameters")
    if model.get("dtype"):
        line.append(str(model["dtype"]))
    if results.get("created"):
        line.append(element("time", _date(results["created"]), datetime=results["created"]))
    separated = [part for item in line for part in (" · ", item)][1:]
    return element("header", element("h1", title), element("p", *separated, class_="byline"))


def _date(created: str) -> str:
    """The date in words; text that is no ISO date stays as it is."""
    try:
        moment = datetime.fromisoformat(created)
    except ValueError:
        return created
    zone = f" {moment.tzname()}" if moment.tzinfo else ""
    return f"{moment.day} {moment:%B %Y, %H:%M}{zone}"


def _findings(results: dict) -> Html | None:
    findings = results.get("findings")
    if not findings:
        return None
    items = [element("li", finding) for finding in findings]
    return _labelled("Findings", element("ol", *items), class_="findings")


def _warnings(results: dict) -> Html | None:
    warnings = results.get("warnings")
    if not warnings:
        return None
    items = [element("li", warning) for warning in warnings]
    return _labelled("Warnings", element("ul", *items), class_="warnings")


def _key_numbers(results: dict) -> Html | None:
    edit = Edit.of(results.get("options"))
    numbers = [
        *_coupling_numbers(results.get("coupling"), results.get("coverage"), edit),
        *_effect_numbers(results.get("margins"), results.get("perplexity"), edit),
        *_time_number(results.get("cost")),
    ]
    if not numbers:
        return None
    cells = [
        element("div", element("dt", name), element("dd", value), element("dd", note))
        for name, value, note in numbers
    ]
    return _labelled("Key numbers", element("dl", *cells, class_="strip"))


def _coupling_numbers(coupling: dict | None, coverage: dict | None, edit: Edit) -> list[tuple]:
    numbers = []
    if coupling:
        total = coupling_totals(coupling)
        note = f"of {count(total.get('numel'))} scored"
        heading = f"{edit.weights.capitalize()} {edit.done}"
        numbers += [(heading, count(total.get("kept")), note)]
        note = f"of {count(total.get('k'))} in each top set"
        numbers += [("Coupled", count(total.get("coupled")), note)]
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
            note += f"; not or not all of {', '.join(left_out)}"
        numbers += [("Share of the model scored", percent(coverage.get("share")), note)]
    return numbers


def _effect_numbers(margins: dict | None, perplexity: dict | None, edit: Edit) -> list[tuple]:
    """What the mask of the run's rule did, or the first mask where there is none by that name."""
    numbers = []
    for name, margin in (margins or {}).items():
        for row, _ in _main(margin_intervals(margin), edit):
            note = f"{row.name}: {reading(row, 0)}"
            heading = ", ".join(filter(None, [f"{name.capitalize()} margin", margin.get("unit")]))
            numbers += [(heading, row.written(0)[0], note)]
    for row, _ in _main(perplexity_intervals(perplexity), edit):
        note = f"{row.name}: {reading(row, 1)}"
        numbers += [("Perplexity ratio", row.written(1)[0], note)]
    return numbers


def _main(masks: Sequence[tuple], edit: Edit) -> Sequence[tuple]:
    return [entry for entry in masks if entry[0].name == edit.rule] or masks[:1]


def _time_number(cost: list | None) -> list[tuple]:
    if not cost:
        return []
    peaks = [step["peak_bytes"] for step in cost if measured(step.get("peak_bytes"))]
    note = f"peak memory {memory(max(peaks))}" if peaks else "all steps"
    return [("Time", duration(_seconds(cost)), note)]


def _seconds(cost: list) -> float | None:
    known = [step["seconds"] for step in cost if measured(step.get("seconds"))]
    return sum(known) if known else None


def _cost(cost: list) -> Html:
    columns = [Column("Step", words=True), Column("Time"), Column("Share"), Column("Tokens")]
    columns += [Column("Tokens per second"), Column("Peak memory so far")]
    whole = _seconds(cost)
    rows = [
        [
            step.get("step") or MISSING,
            duration(step.get("seconds")),
            percent(quotient(step.get("seconds"), whole)),
            count(step.get("tokens")),
            decimal(quotient(step.get("tokens"), step.get("seconds")), 3),
            memory(step.get("peak_bytes")),
        ]
        for step in cost
    ]
    total = ["All steps", duration(whole), "", "", "", ""]
    return table(
        "Time and tokens per step, and the peak memory of the process by its end",
        columns,
        rows,
        total,
    )


def _data_and_options(results: dict) -> Html | None:
    parts = [
        _data(results["data"]) if results.get("data") else None,
        _shown(results["shown"]) if results.get("shown") else None,
        _pairs("Options", results.get("options")),
        _pairs("Versions", results.get("versions")),
        _files(results["files"]) if results.get("files") else None,
    ]
    return join(parts) or None


def _data(data: dict) -> Html:
    columns = [Column("Set", words=True), Column("Source", words=True), Column("Examples")]
    columns += [Column("Tokens"), Column("Target tokens"), Column("SHA-256", words=True)]
    rows = [
        [
            name,
            source.get("source") or MISSING,
            count(source.get("examples")),
            count(source.get("tokens")),
            count(source.get("target_tokens")),
            element("code", source.get("sha256") or MISSING, class_="hash"),
        ]
        for name, source in data.items()
    ]
    return table("Examples that were scored", columns, rows)


def _shown(shown: dict) -> Html:
    """An example of each set, as the model read it."""
    parts = []
    for name, example in shown.items():
        texts = [
            element("div", element("dt", kind), element("dd", element("code", text)))
            for kind, text in example.get("parts") or []
        ]
        heading = (
            f"{name}: row {count(example.get('row'))}, rendered as "
            f"{example.get('rendered') or MISSING}, {count(example.get('tokens'))} tokens"
        )
        parts += [element("h3", heading), element("dl", *texts, class_="pairs")]
    return folded("One example of each set, as the model read it", *parts)


def _pairs(heading: str, pairs: dict | None) -> Html | None:
    if not pairs:
        return None
    entries = [
        element("div", element("dt", key), element("dd", element("code", _plain(value))))
        for key, value in pairs.items()
    ]
    return join([element("h3", heading), element("dl", *entries, class_="pairs")])


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _files(paths: dict) -> Html:
    entries = [
        element("div", element("dt", label), element("dd", _link(str(path))))
        for label, path in paths.items()
    ]
    return join([element("h3", "Files"), element("dl", *entries, class_="pairs")])


def _link(path: str) -> Html:
    """A link to a file beside the report; quoted, a path can name neither a scheme nor a host."""
    if path.startswith(("/", "\\")):
        return element("code", path)
    relative = quote(path.encode("utf-8", "replace"), safe="/")
    return element("a", element("code", path), href=f"./{relative}")


def _command(command: str) -> Html:
    # A word of its own box is not broken after its hyphens, and is copied as it stands.
    words = [
        word if index % 2 else element("span", word)
        for index, word in enumerate(re.split(r"(\s+)", command))
    ]
    return element("pre", element("code", *words), class_="command", tabindex=0)


def _manifest(manifest: dict) -> Html:
    return folded("The run's manifest, as JSON", element("pre", _json(manifest), tabindex=0))


def _other(results: dict) -> Html | None:
    other = {key: value for key, value in results.items() if key not in _KINDS}
    return element("pre", _json(other), tabindex=0) if other else None


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)


def _whole(key: str, draw: Callable[[object], Html]) -> Callable[[dict], Html | None]:
    """A section that is made of one entry of the results."""
    return lambda results: draw(results[key]) if results.get(key) else None


def _of_edit(key: str, draw: Callable[[object, Edit], Html]) -> Callable[[dict], Html | None]:
    """The same where the section speaks of the edit, which the options describe."""
    return lambda results: (
        draw(results[key], Edit.of(results.get("options"))) if results.get(key) else None
    )


# Id, heading and content of the sections, in the page's order.
_SECTIONS: tuple[tuple[str, str, Callable[[dict], Html | None]], ...] = (
    ("coupling", "Coupling per layer and module", _of_edit("coupling", coupling_section)),
    ("overlap", "Overlap against ratio", _of_edit("overlap", overlap_section)),
    ("margins", "Margins before and after", _of_edit("margins", margins_section)),
    ("perplexity", "Perplexity", _whole("perplexity", perplexity_section)),
    ("hsic", "Dependence of representations", _whole("hsic", dependence_section)),
    ("collapse", "Neural collapse", _whole("collapse", collapse_section)),
    ("bias", "Bias measures", _whole("bias", bias_section)),
    ("training", "Training", _whole("training", training_section)),
    ("cost", "Cost", _whole("cost", _cost)),
    ("data", "Data and options", _data_and_options),
    ("command", "Command", _whole("command", _command)),
    ("manifest", "Manifest", _whole("manifest", _manifest)),
    ("other", "Other results", _other),
)


def _section(
    name: str, heading: str, draw: Callable[[dict], Html | None], results: dict
) -> Html | None:
    content = draw(results)
    if not content:
        return None
    return element(
        "section",
        element("h2", heading, id=f"{name}-heading"),
        element("div", content, class_="content"),
        id=name,
        aria_labelledby=f"{name}-heading",
    )


def _labelled(heading: str, content: Html, class_: str | None = None) -> Html:
    """A part of the page's top, whose heading only a screen reader needs."""
    return element("div", element("h2", heading, class_="unseen"), content, class_=class_)


def _footer(results: dict) -> Html | None:
    limits = [
        element("li", limit)
        for sections, limit in _LIMITS
        if any(results.get(name) for name in sections)
    ]
    if not limits:
        return None
    return element(
        "footer",
        element("h2", "What these numbers are not"),
        element("ul", *limits, class_="content"),
    )
