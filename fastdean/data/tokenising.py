"""From a row of text to tokens and labels: prompts and responses, chats, plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastdean.data.columns import has_lone_surrogate, usual_columns

IGNORE_INDEX = -100
TEMPLATES = ("raw", "chat", "published")


def tokenised(
    row: Mapping[str, Any], tokenizer: Any, template: str | None, number: int
) -> tuple[list[int], list[int], str]:
    """Token ids, labels, and what they were rendered as."""
    row = usual_columns(row)
    if row.get("messages") is not None:
        if template not in (None, "chat"):
            raise ValueError(
                f"template must be 'chat' or left out for a row of messages, got {template!r} for "
                f"row {number}, which has no other rendering; leave it out, or give prompt and "
                "response columns"
            )
        return *_tokenised_chat(row["messages"], tokenizer, number), "chat"
    for key in ("prompt", "response", "text"):
        if isinstance(row.get(key), str) and has_lone_surrogate(row[key]):
            raise ValueError(
                f"row {number} must have text in {key!r}, got a lone surrogate, which is no "
                "character; correct the row or leave it out"
            )
    if isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str):
        if template == "chat":
            turns = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["response"]},
            ]
            return *_tokenised_chat(turns, tokenizer, number), "chat"
        prompt = tokenizer(row["prompt"])["input_ids"]
        if template == "published":
            response = tokenizer(row["response"])["input_ids"][1:]
        else:
            response = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        labels = [IGNORE_INDEX] * len(prompt) + list(response)
        return [*prompt, *response], labels, template or "raw"
    if isinstance(row.get("text"), str):
        ids = list(tokenizer(row["text"])["input_ids"])
        return ids, list(ids), "text"
    raise ValueError(
        f"row {number} must have the text columns 'prompt' and 'response', or 'messages', or "
        f"'text', got {sorted(map(str, row))}; rename the columns or map them"
    )


def tokenised_prompt(
    row: Mapping[str, Any],
    tokenizer: Any,
    template: str | None,
    number: int,
    *,
    generation_prompt: bool = True,
) -> list[int]:
    """Token ids of a row of `prompts.prompt_row`, up to where the answer begins.

    Args:
        template: None or "raw": the prompt by itself; "chat": as the only turn of a chat. Chat
            turns always take the tokenizer's template.
        generation_prompt: have the template begin the assistant's turn.
    Raises:
        ValueError: no tokens, turns that are none, or a tokenizer without a template.
    """
    if "messages" in row or template == "chat":
        turns = row.get("messages", [{"role": "user", "content": row.get("prompt")}])
        turns = _text_turns(turns, tokenizer, number)
        ids = _render(turns, tokenizer, number, generation_prompt=generation_prompt)
    else:
        ids = list(tokenizer(row["prompt"])["input_ids"])
    if not ids:
        raise ValueError(f"row {number} must have a prompt of at least one token, got none")
    return ids


def chat_turns(turns: Any, number: int) -> list[dict[str, Any]]:
    """The turns of a chat, each with its content as one text; ValueError where they are none."""
    if not isinstance(turns, Sequence) or not all(
        isinstance(turn, Mapping) and {"role", "content"} <= set(turn) for turn in turns
    ):
        raise ValueError(
            f"row {number} must have a list of {{'role', 'content'}} dictionaries as messages, "
            f"got {turns!r:.80}; convert the chat to that form"
        )
    turns = [
        {**turn, "content": _text_of(turn["content"], i, number)} for i, turn in enumerate(turns)
    ]
    _require_turns(turns, number)
    return turns


def _text_turns(turns: Any, tokenizer: Any, number: int) -> list[dict[str, Any]]:
    """As `chat_turns`, for a tokenizer that can render them."""
    turns = chat_turns(turns, number)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"tokenizer must have a chat template to encode row {number} as a chat, got none; "
            "use template='raw' with prompt and response columns"
        )
    return turns


def _tokenised_chat(turns: Any, tokenizer: Any, number: int) -> tuple[list[int], list[int]]:
    """Assistant turns are found by rendering each prefix: templates rarely mark them themselves."""
    turns = _text_turns(turns, tokenizer, number)
    ids = _render(turns, tokenizer, number)
    labels = [IGNORE_INDEX] * len(ids)
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = _render(turns[:i], tokenizer, number, generation_prompt=True)
        after = _render(turns[: i + 1], tokenizer, number)
        if ids[: len(after)] != after or after[: len(before)] != before:
            raise _indivisible_error(turns, tokenizer, number, i)
        labels[len(before) : len(after)] = ids[len(before) : len(after)]
    return ids, labels


def _indivisible_error(
    turns: Sequence[Mapping[str, Any]], tokenizer: Any, number: int, i: int
) -> ValueError:
    """What is said of turn `i`, whose tokens are not those between the renderings around it."""

    def text(shown: Sequence[Mapping[str, Any]], generation_prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(
            list(shown), add_generation_prompt=generation_prompt, tokenize=False
        )

    before, after = text(turns[:i], True), text(turns[: i + 1])
    if after.startswith(before) and text(turns).startswith(after):
        # The tokenizer's doing: a space at the end of the prompt goes to the answer's first word.
        return ValueError(
            f"row {number} must be a chat whose turns share no token, got a template that renders "
            f"{before[-12:]!r} before turn {i}, and a tokenizer that joins the turn's beginning "
            "or end with what stands beside it; have the template end what precedes and follows "
            "a turn with a line break or a special token, or use template='raw'"
        )
    return ValueError(
        f"row {number} must be a chat whose turns are rendered one after the other, got a "
        f"template that changes what precedes turn {i} or the turn itself, so its tokens "
        "cannot be told apart; give single-turn rows or use template='raw'"
    )


def _text_of(content: Any, turn: int, number: int) -> str:
    """A turn's content as text: it may be a list of parts, which must all be text."""
    if isinstance(content, str):
        return content
    found = "null" if content is None else type(content).__name__
    if isinstance(content, Sequence):
        parts = [{"type": "text", "text": p} if isinstance(p, str) else p for p in content]
        kinds = [p.get("type") if isinstance(p, Mapping) else type(p).__name__ for p in parts]
        if parts and all(
            kind == "text" and isinstance(p.get("text"), str)
            for kind, p in zip(kinds, parts, strict=True)
        ):
            return "".join(part["text"] for part in parts)
        other = next((kind for kind in kinds if kind != "text"), "text without text")
        found = f"a part of type {other!r}" if parts else "a list without parts"
    raise ValueError(
        f"row {number} must have text in every turn, got {found} in turn {turn}; leave the row out "
        "(a call of a tool, an image and a recording have no tokens here)"
    )


def _require_turns(turns: Sequence[Mapping[str, Any]], number: int) -> None:
    """Raise ValueError for a chat that no template renders turn by turn."""
    if not turns or turns[0]["role"] == "assistant":
        found = "its first turn an assistant's" if turns else "no turn"
        raise ValueError(
            f"row {number} must be a chat in which something precedes the assistant's answer, got "
            f"{found}; leave that turn out, or the row"
        )
    for i, turn in enumerate(turns):
        if not isinstance(turn["role"], str):
            raise ValueError(
                f"row {number} must have text as the role of every turn, got "
                f"{type(turn['role']).__name__} in turn {i}; correct the row or leave it out"
            )
        if has_lone_surrogate(turn["content"]):
            raise ValueError(
                f"row {number} must have text in every turn, got a lone surrogate, which is no "
                f"character, in turn {i}; correct the row or leave it out"
            )


def _render(
    turns: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    number: int,
    *,
    generation_prompt: bool = False,
) -> list[int]:
    try:
        encoded = tokenizer.apply_chat_template(
            list(turns), add_generation_prompt=generation_prompt, tokenize=True, return_dict=True
        )
    except MemoryError:
        raise
    except Exception as error:  # a template computes, and fails as any program does
        raise ValueError(
            f"row {number} must be a chat that the tokenizer's template accepts, got its error: "
            f"{str(error) or type(error).__name__}; check the order and the names of the roles"
        ) from error
    return list(encoded["input_ids"])
