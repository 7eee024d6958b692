"""Prompts: what a row asks, without the answer that may stand beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastdean.data.columns import has_lone_surrogate, usual_columns

# Beside which other habits are not looked for; none of them is a prompt.
_NO_PROMPTS = ("text", "premise", "hypothesis")


def prompt_row(row: Mapping[str, Any], asked: Mapping[str, Any] = {}) -> dict[str, Any]:
    """`{"prompt": text}`, or `{"messages": turns}` without an answer at their end.

    `prompt` may be a list of chat turns, and an instruction with its input is a prompt, as
    `columns` says. Chat turns go before a prompt, unless the mapping names the prompt.

    Args:
        asked: what a mapping of columns gives; these keys are in the row, too.
    Raises:
        ValueError: there is none; the text begins with what the row must be.
    """
    found = usual_columns({key: row[key] for key in row if key not in _NO_PROMPTS})
    prompt, turns = found.get("prompt"), found.get("messages")
    if turns is not None and "prompt" not in asked:
        return {"messages": _without_answer(turns)}
    if isinstance(prompt, list):
        return {"messages": _without_answer(prompt)}
    if isinstance(prompt, str) and has_lone_surrogate(prompt):
        raise ValueError(
            "must have text as its prompt, got a lone surrogate, which is no character; correct "
            "the row or leave it out"
        )
    if isinstance(prompt, str) and prompt.strip():
        return {"prompt": prompt}
    if "prompt" in found:
        got = "an empty text" if isinstance(prompt, str) else type(prompt).__name__
        raise ValueError(
            f"must have text as its prompt, got {'null' if prompt is None else got}; correct the "
            "row or leave it out"
        )
    raise ValueError(
        f"must have the column 'prompt' or 'messages', got {sorted(map(str, row))}; map it with "
        "::prompt=COLUMN"
    )


def prompt_text(row: Mapping[str, Any]) -> str:
    """What is asked, as one text: the prompt, or the last turn that a user takes.

    Raises:
        ValueError: chat turns that are none, or hold no text there; the text begins with what the
            row must be.
    """
    if "prompt" in row:
        return row["prompt"]
    turns = row["messages"]
    if not (isinstance(turns, list) and turns and all(isinstance(t, Mapping) for t in turns)):
        raise ValueError(
            f"must have a list of {{'role', 'content'}} dictionaries as messages, got {turns!r:.80}"
            "; convert the chat to that form"
        )
    asked = [turn for turn in turns if turn.get("role") == "user"] or turns
    content = asked[-1].get("content")
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    whole = [text for text in texts if isinstance(text, str) and not has_lone_surrogate(text)]
    if not whole or len(whole) < len(texts):
        raise ValueError(
            f"must have text in the last turn of its user, got {content!r:.80}; correct the row or "
            "leave it out"
        )
    return "".join(whole)


def _without_answer(turns: Any) -> Any:
    """The turns up to the last one that is no assistant's: what the model is to answer."""
    found = list(turns) if isinstance(turns, Sequence) and not isinstance(turns, str) else turns
    while isinstance(found, list) and found and _role(found[-1]) == "assistant":
        found = found[:-1]
    return found


def _role(turn: Any) -> Any:
    return turn.get("role") if isinstance(turn, Mapping) else None
