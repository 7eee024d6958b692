"""What the page says, as a Markdown card: the verdict, and the tables it rests on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdean.files.atomic import write_text_atomic
from fastdean.report.estimates import family_words
from fastdean.report.page import checked
from fastdean.report.summary import tables_of
from fastdean.report.verdict import verdict_line
from fastdean.wording import markdown


def render_card(results: Mapping[str, Any]) -> str:
    """The results of a run as a Markdown card, from the figures of `render_report`.

    Raises TypeError as `render_report` does.
    """
    checked(results)
    model = (results.get("model") or {}).get("name")
    tests = results.get("tests") or (results.get("answers") or {}).get("tests")
    said = family_words(tests)
    warnings = "\n".join(f"- {markdown.text(str(text))}" for text in results.get("warnings") or [])
    command = results.get("command")
    parts = [
        f"# {markdown.text(str(results.get('title') or 'FastDEAN'))}",
        f"Model: {markdown.code(str(model))}" if model else "",
        f"**{markdown.text(verdict_line(results))}**" if verdict_line(results) else "",
        *(table.markdown() for table in tables_of(results)),
        markdown.text(said) if said else "",
        f"Warnings:\n\n{warnings}" if warnings else "",
        markdown.block(str(command), "bash") if command else "",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def write_card(results: Mapping[str, Any], path: str | os.PathLike) -> Path:
    """Write the card of `results` to `path`, whole or not at all, and return the path."""
    path = Path(path)
    write_text_atomic(path, render_card(results))
    return path
