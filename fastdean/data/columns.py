"""Rows by the columns that others call prompt and response: the habits of Alpaca, TRL and Dolly."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# What is read as it is, if a row has it.
_OURS = ("messages", "text", "premise")
_ANSWERS = ("output", "completion")
_SURROGATE = re.compile("[\ud800-\udfff]")


def usual_columns(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with `prompt` and `response` where it has them under names that others use.

    - `instruction`, with `input` or `context` below it, is the prompt.
    - `output` or `completion` is the response.
    - `prompt` and `completion` that are lists of chat turns are `messages`.

    A row that has what it needs under the names of this package comes back as it is.
    """
    has = {key for key, value in row.items() if value is not None}
    if {"prompt", "response"} <= has or has & {*_OURS}:
        return row
    prompt, answer = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(answer, list):
        return {**row, "messages": [*prompt, *answer]}
    found = dict(row)
    if "prompt" not in has and "instruction" in has:
        parts = [row["instruction"], row.get("input") or row.get("context")]
        texts = all(isinstance(part, str | None) for part in parts)
        found["prompt"] = "\n".join(filter(None, parts)) if texts else row["instruction"]
    named = next((name for name in _ANSWERS if name in has), None)
    if "response" not in has and named is not None and "prompt" in found:
        found["response"] = row[named]
    return found


def has_lone_surrogate(text: str) -> bool:
    """Whether a text holds what is no character, and UTF-8 cannot write."""
    return _SURROGATE.search(text) is not None
