"""From rows or loader batches to tokenised examples without padding.

An example is what the method averages over: one prompt with one response, the response's tokens being
the targets. Everything after this file sees only `Example`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100
TEMPLATES = ("raw", "chat", "published")


@dataclass(frozen=True)
class Example:
    """One tokenised example.

    Attributes:
        input_ids: int64 [T] on the CPU, no padding.
        labels: int64 [T] on the CPU; the token's own id where it is a target, -100 elsewhere.
    """

    input_ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.input_ids.numel()

    def num_targets(self, shift: int) -> int:
        """How many targets a model sees that predicts the token `shift` places ahead."""
        return int((self.labels[shift:] != IGNORE_INDEX).sum())


def read_examples(
    loader: Any, *, tokenizer: Any = None, template: str = "raw", max_length: int | None = None
) -> list[Example]:
    """Read every example of `loader`, in order, padding stripped.

    Args:
        loader: an iterable (DataLoader, `datasets.Dataset`, list, generator) of
            batches `{"input_ids": [B, T], "attention_mask": [B, T], "labels": [B, T]}`,
            single examples with the same keys and [T] values, or, with `tokenizer`, rows (see `encode`).
            `attention_mask` may be left out when there is no padding; `labels` may not.
        tokenizer: a Hugging Face tokenizer, needed for rows of text.
        template, max_length: see `encode`.
    Raises:
        TypeError: `loader` cannot be iterated, or yields something that is no mapping.
        ValueError: an item lacks what is needed, or `loader` is empty.
    """
    if isinstance(loader, str | bytes):
        raise TypeError(
            f"loader must be an iterable of batches or rows, got the text {loader!r}; "
            "read a file or hub id with fastdean.sources.load_rows first"
        )
    if isinstance(loader, Mapping):
        loader = [loader]
    if not isinstance(loader, Iterable):
        raise TypeError(f"loader must be an iterable of batches or rows, got {type(loader).__name__}")

    examples: list[Example] = []
    for position, item in enumerate(loader):
        if isinstance(item, Example):
            examples.append(item)
        elif not isinstance(item, Mapping):
            raise TypeError(
                f"loader must yield dictionaries, got {type(item).__name__} at item {position}; "
                "give each batch the keys input_ids, attention_mask and labels"
            )
        elif "input_ids" in item:
            examples.extend(_strip_padding(item, position))
        elif tokenizer is None:
            raise ValueError(
                f"loader must yield input_ids and labels, got the columns {sorted(item)} at item "
                f"{position}; pass tokenizer= to have rows of text tokenised"
            )
        else:
            examples.extend(
                encode([item], tokenizer, template=template, max_length=max_length, first=len(examples))
            )
    if not examples:
        raise ValueError("loader must yield at least one example, got none; check the source and its filter")
    return examples


def encode(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    template: str = "raw",
    max_length: int | None = None,
    first: int = 0,
) -> list[Example]:
    """Tokenise rows of text.

    A row has `prompt` and `response`, or `messages` (chat turns; every assistant turn is a target), or
    `text` (every token is a target). How `prompt` and `response` are joined is the `template`:

    - "raw": tok(prompt) ++ tok(response), no chat template, no separator.
    - "chat": the tokenizer's chat template, one user turn and one assistant turn.
    - "published": tok(prompt) ++ tok(response)[1:], as DEAN's released code packs it. With a tokenizer
      that adds no BOS token this drops the response's first real token.

    Args:
        max_length: cut every example to its first `max_length` tokens.
        first: number of the first row in messages about errors.
    Raises:
        ValueError: a row lacks its columns, or no target token remains.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template must be one of {', '.join(TEMPLATES)}, got {template!r}")
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must be at least 2 tokens, got {max_length}")

    examples = []
    for number, row in enumerate(rows, start=first):
        ids, labels = _tokenize_row(row, tokenizer, template, number)
        example = Example(
            torch.tensor(ids[:max_length], dtype=torch.int64),
            torch.tensor(labels[:max_length], dtype=torch.int64),
        )
        if example.num_targets(0) == 0:
            cut = "" if max_length is None else f" within max_length={max_length}"
            raise ValueError(
                f"row {number} must have at least one target token{cut}, got none; "
                "its response is empty or cut off, so leave the row out or raise max_length"
            )
        examples.append(example)
    return examples


def _tokenize_row(
    row: Mapping[str, Any], tokenizer: Any, template: str, number: int
) -> tuple[list[int], list[int]]:
    if row.get("messages") is not None:
        return _tokenize_chat(list(row["messages"]), tokenizer, number)
    if isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str):
        if template == "chat":
            turns = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["response"]},
            ]
            return _tokenize_chat(turns, tokenizer, number)
        prompt = tokenizer(row["prompt"])["input_ids"]
        if template == "published":
            response = tokenizer(row["response"])["input_ids"][1:]
        else:
            response = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        return [*prompt, *response], [IGNORE_INDEX] * len(prompt) + list(response)
    if isinstance(row.get("text"), str):
        ids = list(tokenizer(row["text"])["input_ids"])
        return ids, list(ids)
    raise ValueError(
        f"row {number} must have the text columns 'prompt' and 'response', or 'messages', or 'text', "
        f"got {sorted(row)}; rename the columns or map them"
    )


def _tokenize_chat(
    turns: Sequence[Mapping[str, str]], tokenizer: Any, number: int
) -> tuple[list[int], list[int]]:
    """Assistant turns are found by rendering each prefix: templates rarely mark them themselves."""

    def render(messages: Sequence[Mapping[str, str]], generation_prompt: bool) -> list[int]:
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=generation_prompt, tokenize=True, return_dict=True
        )
        return list(encoded["input_ids"])

    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"tokenizer must have a chat template to encode row {number} as a chat, got none; "
            "use template='raw' with prompt and response columns"
        )
    ids = render(turns, False)
    labels = [IGNORE_INDEX] * len(ids)
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before, after = render(turns[:i], True), render(turns[: i + 1], False)
        if ids[: len(after)] != after or after[: len(before)] != before:
            raise ValueError(
                f"row {number}: the chat template renders turn {i} differently once later turns follow, "
                "so its tokens cannot be told apart; give single-turn rows"
            )
        labels[len(before) : len(after)] = ids[len(before) : len(after)]
    return ids, labels


def _strip_padding(item: Mapping[str, Any], position: int) -> list[Example]:
    if item.get("labels") is None:
        raise ValueError(
            f"loader must give labels beside input_ids, got the keys {sorted(item)} at item {position}; "
            "set labels to input_ids on target tokens and to -100 on the prompt and on padding"
        )
    columns = {
        key: _as_rows(item[key], key, position)
        for key in ("input_ids", "labels", "attention_mask")
        if item.get(key) is not None
    }
    columns.setdefault("attention_mask", [torch.ones_like(row) for row in columns["input_ids"]])
    lengths = {key: [row.numel() for row in rows] for key, rows in columns.items()}
    for key in ("labels", "attention_mask"):
        if lengths[key] != lengths["input_ids"]:
            raise ValueError(
                f"{key} must have the shape of input_ids at item {position}, "
                f"got rows of {lengths[key]} and {lengths['input_ids']} tokens"
            )
    examples = []
    for ids, labels, mask in zip(
        columns["input_ids"], columns["labels"], columns["attention_mask"], strict=True
    ):
        kept = mask.bool()
        if not kept.any():
            raise ValueError(
                f"attention_mask must keep at least one token of each example, got a row of zeros at item "
                f"{position}; leave the row out"
            )
        examples.append(Example(ids[kept], labels[kept]))
    return examples


def _as_rows(value: Any, key: str, position: int) -> list[Tensor]:
    """[T], [B, T] or a ragged list of rows -> a list of int64 CPU rows."""
    if isinstance(value, list | tuple) and value and isinstance(value[0], list | tuple | Tensor):
        rows = [torch.as_tensor(row) for row in value]
    else:
        tensor = torch.as_tensor(value)
        if tensor.dim() not in (1, 2):
            raise ValueError(
                f"{key} must have shape [T] or [B, T], got {list(tensor.shape)} at item {position}"
            )
        rows = list(tensor.unsqueeze(0)) if tensor.dim() == 1 else list(tensor)
    return [row.detach().to("cpu", torch.int64) for row in rows]
