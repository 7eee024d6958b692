"""What a run was made of: its cost, data, options, files, command and manifest."""

from __future__ import annotations

import json
import re
from urllib.parse import quote

from fastdean.report.markup import Html, element, folded, join, table, terms
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


def seconds_of(cost: list) -> float | None:
    """Of all steps whose time is known."""
    known = [step["seconds"] for step in cost if measured(step.get("seconds"))]
    return sum(known) if known else None


def cost_section(cost: list) -> Html:
    """Time, tokens and memory of each step."""
    whole = seconds_of(cost)
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
    return table(
        "Time and tokens per step, and the peak memory of the process by its end",
        ["Step", "Time", "Share", "Tokens", "Tokens per second", "Peak memory so far"],
        rows,
        ["All steps", duration(whole), "", "", "", ""],
        words=("Step",),
    )


def data_section(results: dict) -> Html:
    """The data, options, versions and files."""
    parts = [
        (results.get("data"), _data),
        (results.get("options"), lambda options: _pairs("Options", options)),
        (results.get("versions"), lambda versions: _pairs("Versions", versions)),
        (results.get("files"), _files),
    ]
    return join(draw(part) for part, draw in parts if part)


def _data(data: dict) -> Html:
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
    columns = ["Set", "Source", "Examples", "Tokens", "Target tokens", "SHA-256"]
    words = ("Set", "Source", "SHA-256")
    return table("Examples that were scored", columns, rows, words=words)


def _pairs(heading: str, pairs: dict) -> Html:
    entries = ((key, element("code", _plain(value))) for key, value in pairs.items())
    return join([element("h3", heading), terms(entries, "pairs")])


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _files(paths: dict) -> Html:
    entries = ((label, _link(str(path))) for label, path in paths.items())
    return join([element("h3", "Files"), terms(entries, "pairs")])


def _link(path: str) -> Html:
    """A link to a file beside the report; quoted, a path can name neither a scheme nor a host."""
    if path.startswith(("/", "\\")):
        return element("code", path)
    relative = quote(path.encode("utf-8", "replace"), safe="/")
    return element("a", element("code", path), href=f"./{relative}")


def command_section(command: str) -> Html:
    """The command, to be copied."""
    # A word of its own box is not broken after its hyphens, and is copied as it stands.
    words = [
        word if index % 2 else element("span", word)
        for index, word in enumerate(re.split(r"(\s+)", command))
    ]
    return element("pre", element("code", *words), class_="command", tabindex=0)


def manifest_section(manifest: dict) -> Html:
    """The manifest, folded."""
    return folded("The run's manifest, as JSON", _json(manifest))


def other_section(results: dict) -> Html | None:
    """Keys of the results that no section knows."""
    other = {key: value for key, value in results.items() if key not in RESULTS.optional}
    return _json(other) if other else None


def _json(value: object) -> Html:
    written = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    return element("pre", written, tabindex=0)
