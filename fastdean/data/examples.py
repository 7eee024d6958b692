"""From rows or loader batches to tokenised examples without padding.

An example is what the method averages over: one prompt with one response, the response's tokens
being the targets. Everything after this file sees only `Example`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdean.data.columns import usual_columns
from fastdean.data.segments import CUMULATIVE_LENGTHS, DIVIDING_COLUMNS, spans
from fastdean.wording.mendable import InputTypeError

__all__ = ["Example", "encode"]

IGNORE_INDEX = -100
TEMPLATES = ("raw", "chat", "published")
_READ_HERE = ("input_ids", "labels", "shift_labels", "attention_mask", *DIVIDING_COLUMNS)
# How an example was rendered that came as tokens.
TOKENS = "tokens"


@dataclass(frozen=True, eq=False)
class Example:
    """One tokenised example.

    Attributes:
        input_ids: int64 [T] on the CPU, no padding.
        labels: int64 [T] on the CPU; the token's own id where it is a target, -100 elsewhere.
        columns: what else the loader gave for each token, name -> int64 or bool [T] on the CPU:
            `token_type_ids`, `position_ids` and others. `attention_mask` is among them where it
            hides a token between others, and beside `position_ids`. A model is given those that
            its forward names (`fastdean.models.forward.fitted`).
        not_carried: names of what the loader gave in another form (pictures, text). A model whose
            forward names one of them is refused.
        rendered: how it became tokens: one of `TEMPLATES`, "text", or "tokens" where it came so.
    """

    input_ids: Tensor
    labels: Tensor
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    not_carried: frozenset[str] = frozenset()
    rendered: str = TOKENS

    def __len__(self) -> int:
        return self.input_ids.numel()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Example):
            return NotImplemented
        own, others = self._tensors(), other._tensors()
        return (
            own.keys() == others.keys()
            and all(torch.equal(tensor, others[name]) for name, tensor in own.items())
            and self.not_carried == other.not_carried
        )

    def __hash__(self) -> int:
        return hash(tuple(self.input_ids.tolist()))

    def _tensors(self) -> dict[str, Tensor]:
        return {**self.columns, "input_ids": self.input_ids, "labels": self.labels}

    @property
    def stands_alone(self) -> bool:
        """Whether its positions or its mask are its own, which no other example may share."""
        return bool({"position_ids", "attention_mask"} & self.columns.keys())

    def first(self, length: int | None) -> Example:
        """Its first `length` tokens; None: all of them."""
        columns = {name: column[:length] for name, column in self.columns.items()}
        ids, labels = self.input_ids[:length], self.labels[:length]
        return replace(self, input_ids=ids, labels=labels, columns=columns)

    def predicting_itself(self) -> Example:
        """With every token a target of shift 0: for those who read representations."""
        return replace(self, labels=self.input_ids)

    def num_targets(self, shift: int) -> int:
        """How many targets a model sees that predicts the token `shift` places ahead."""
        return int((self.labels[shift:] != IGNORE_INDEX).sum())


def read_examples(
    loader: Any,
    *,
    tokenizer: Any = None,
    template: str | None = None,
    max_length: int | None = None,
    require_labels: bool = True,
) -> list[Example]:
    """Read every example of `loader`, in order, padding stripped.

    A row that holds several examples is split (see `fastdean.data.segments`); what ends such a row
    without a target, one token over and over, is padding. What else a batch has for each token is
    carried along (`Example.columns`).

    Args:
        loader: an iterable (DataLoader, `datasets.Dataset`, list, generator) of
            batches `{"input_ids": [B, T], "attention_mask": [B, T], "labels": [B, T]}`,
            single examples with the same keys and [T] values, or, with `tokenizer`, rows (see
            `encode`). `attention_mask` may be left out when there is no padding; `labels` may not.
        tokenizer: a Hugging Face tokenizer, needed for rows of text.
        template, max_length: see `encode`.
        require_labels: False, for those who predict nothing: `labels` may be left out, and every
            token is its own.
    Raises:
        TypeError: `loader` cannot be iterated, or yields something that is no mapping.
        ValueError: an item lacks what is needed, or `loader` is empty.
    """
    if isinstance(loader, str | bytes):
        raise InputTypeError(
            f"loader must be an iterable of batches or rows, got the text {loader!r}; "
            "read a file or hub id with fastdean.data.load_rows first"
        )
    if isinstance(loader, Mapping):
        loader = [loader]
    if not isinstance(loader, Iterable):
        raise InputTypeError(
            f"loader must be an iterable of batches or rows, got {type(loader).__name__}"
        )

    _check_max_length(max_length)

    examples: list[Example] = []
    for position, item in enumerate(loader):
        if isinstance(item, Example):
            examples.append(item.first(max_length))
        elif not isinstance(item, Mapping):
            raise InputTypeError(
                f"loader must yield dictionaries, got {type(item).__name__} at item {position}; "
                "give each batch the keys input_ids, attention_mask and labels"
            )
        elif "input_ids" in item:
            item = _as_collected(item, loader)
            if not require_labels and item.get("labels") is None:
                item = {**item, "labels": item["input_ids"]}
            found = _examples_of(item, position)
            examples.extend(example.first(max_length) for example in found)
        elif tokenizer is None:
            raise ValueError(
                f"loader must yield input_ids and labels, got the columns {sorted(item)} at item "
                f"{position}; pass tokenizer= to have rows of text tokenised"
            )
        else:
            rows, first = _rows_of(item), len(examples)
            examples.extend(
                encode(rows, tokenizer, template=template, max_length=max_length, first=first)
            )
    if not examples:
        raise ValueError(
            "loader must yield at least one example, got none; check the source and its filter"
        )
    return examples


def encode(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    template: str | None = None,
    max_length: int | None = None,
    first: int = 0,
) -> list[Example]:
    """Tokenise rows of text.

    A row has `prompt` and `response`, or `messages` (chat turns; every assistant turn is a target),
    or `text` (every token is a target); other habits are read as `columns` says. How `prompt` and
    `response` are joined is the `template`:

    - None: "raw". `messages` always take the chat template and `text` takes none; under "raw" or
      "published" by name `messages` are refused.
    - "raw": tok(prompt) ++ tok(response), no chat template, no separator.
    - "chat": the tokenizer's chat template, one user turn and one assistant turn.
    - "published": tok(prompt) ++ tok(response)[1:], as DEAN's released code packs it. With a
      tokenizer that adds no BOS token this drops the response's first real token.

    Args:
        max_length: cut every example to its first `max_length` tokens.
        first: number of the first row in messages about errors.
    Raises:
        ValueError: a row lacks its columns, or no target token remains.
    """
    if template is not None and template not in TEMPLATES:
        raise ValueError(f"template must be one of {', '.join(TEMPLATES)}, got {template!r}")
    _check_max_length(max_length)

    examples = []
    for number, row in enumerate(_uncollated(rows), start=first):
        ids, labels, rendered = _tokenize_row(row, tokenizer, template, number)
        whole = Example(
            torch.tensor(ids, dtype=torch.int64),
            torch.tensor(labels, dtype=torch.int64),
            rendered=rendered,
        )
        example = whole.first(max_length)
        if example.num_targets(0) == 0:
            cut = "" if max_length is None else f" within max_length={max_length}"
            raise ValueError(
                f"row {number} must have at least one target token{cut}, got none; "
                "its response is empty or cut off, so leave the row out or raise max_length"
            )
        examples.append(example)
    return examples


def _check_max_length(max_length: int | None) -> None:
    # A causal model predicts nothing from less than two tokens.
    if max_length is not None and max_length < 2:
        raise ValueError(
            f"max_length must be at least 2 tokens, got {max_length}; leave it out to cut nothing"
        )


def _tokenize_row(
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
        return *_tokenize_chat(row["messages"], tokenizer, number), "chat"
    if isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str):
        if template == "chat":
            turns = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["response"]},
            ]
            return *_tokenize_chat(turns, tokenizer, number), "chat"
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
        f"'text', got {sorted(row)}; rename the columns or map them"
    )


def _tokenize_chat(turns: Any, tokenizer: Any, number: int) -> tuple[list[int], list[int]]:
    """Assistant turns are found by rendering each prefix: templates rarely mark them themselves."""
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
    _require_readable(turns, number)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"tokenizer must have a chat template to encode row {number} as a chat, got none; "
            "use template='raw' with prompt and response columns"
        )
    ids = _render(turns, tokenizer, number)
    labels = [IGNORE_INDEX] * len(ids)
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = _render(turns[:i], tokenizer, number, generation_prompt=True)
        after = _render(turns[: i + 1], tokenizer, number)
        if ids[: len(after)] != after or after[: len(before)] != before:
            raise ValueError(
                f"row {number} must be a chat whose turns are rendered one after the other, got a "
                f"template that changes what precedes turn {i} or the turn itself, so its tokens "
                "cannot be told apart; give single-turn rows or use template='raw'"
            )
        labels[len(before) : len(after)] = ids[len(before) : len(after)]
    return ids, labels


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


def _require_readable(turns: Sequence[Mapping[str, Any]], number: int) -> None:
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
        if any("\ud800" <= character <= "\udfff" for character in turn["content"]):
            raise ValueError(
                f"row {number} must have text in every turn, got a lone surrogate, which is no "
                f"character, in turn {i}; correct the row or leave it out"
            )


def _uncollated(rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The rows; a batch of chats that torch's default collation has transposed, chat by chat.

    It makes one list of turns of B chats, each turn with B roles and B contents.
    """
    for row in rows:
        turns = row.get("messages")
        first = turns[0] if isinstance(turns, Sequence) and turns else None
        if not isinstance(first, Mapping) or not isinstance(first.get("role"), list | tuple):
            yield row
            continue
        chats, columns = len(first["role"]), ("role", "content")
        for turn in turns:
            if not all(_is_text_column(turn.get(key), chats) for key in columns):
                raise ValueError(
                    "loader must collate chats of roles and texts, got a turn of other parts, "
                    f"{turn!r:.80}; pass collate_fn=list to the DataLoader, and give its rows"
                )
        for chat in range(chats):
            yield {"messages": [{key: turn[key][chat] for key in columns} for turn in turns]}


def _is_text_column(value: Any, length: int) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == length
        and all(isinstance(text, str) for text in value)
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


def _rows_of(item: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A batch of text rows as a DataLoader collates it, {"prompt": [B], ...}, row by row."""
    columns = {
        key: item[key]
        for key in ("prompt", "response", "text")
        if isinstance(item.get(key), list | tuple)
    }
    if not columns:
        return [item]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _as_collected(item: Mapping[str, Any], loader: Any) -> Mapping[str, Any]:
    """The batch as its examples were, where torch's default collation has transposed it.

    Columns of token lists come out of it as T tensors of shape [B]. Read as rows they would be
    other examples, and nothing would fail.
    """
    if getattr(loader, "collate_fn", None) is not torch.utils.data.default_collate:
        return item
    return {
        key: torch.stack(value, dim=1) if _is_transposed(value) else value
        for key, value in item.items()
    }


def _is_transposed(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(row, Tensor) and row.shape == value[0].shape for row in value)
        and value[0].dim() == 1
    )


def _examples_of(item: Mapping[str, Any], position: int) -> list[Example]:
    """The examples of a batch, or of a single one, in order."""
    if item.get("labels") is None:
        raise ValueError(
            f"loader must give labels beside input_ids, got the keys {sorted(item)} at item "
            f"{position}; set labels to input_ids on target tokens and to -100 on the prompt and "
            "on padding"
        )
    input_ids = _as_rows(item["input_ids"], "input_ids", position)
    lengths = [row.numel() for row in input_ids]
    labels = _beside(item, "labels", lengths, position)
    following = _beside(item, "shift_labels", lengths, position)
    masks = _beside(item, "attention_mask", lengths, position)
    divided = example_spans(item, lengths, position)
    carried = {
        key: _carried_rows(value, key, lengths)
        for key, value in item.items()
        if key not in _READ_HERE and value is not None
    }
    not_carried = frozenset(key for key, rows in carried.items() if rows is None)
    columns = {key: rows for key, rows in carried.items() if rows is not None}

    examples = []
    for number, (ids, found) in enumerate(zip(input_ids, divided, strict=True)):
        mask = None if masks is None else masks[number]
        row = {key: rows[number] for key, rows in columns.items()}
        if not found:
            raise ValueError(
                f"attention_mask must keep at least one token of each example, got a row of zeros "
                f"at item {position}; leave the row out"
            )
        pieces = []
        for start, end in found:
            part = slice(start, end)
            piece = {key: column[part] for key, column in row.items()}
            targets = labels[number][part]
            visible = (
                torch.ones_like(ids[part], dtype=torch.bool) if mask is None else mask[part] != 0
            )
            targets = targets.where(visible, IGNORE_INDEX)
            # With positions too: without a mask, transformers takes a jump in them for the
            # beginning of another example, but only where no cache is used.
            if "position_ids" in piece or not visible.all():
                piece["attention_mask"] = visible.long()
            if following is not None:
                _require_shifted(following[number][part], targets, position)
            pieces.append(Example(ids[part], targets, piece, not_carried))
        examples.extend(pieces if mask is not None else _without_padding_at_the_end(pieces))
    return examples


def example_spans(
    item: Mapping[str, Any], lengths: Sequence[int], position: int
) -> list[list[tuple[int, int]]]:
    """For each row of a batch, of `lengths` tokens, the (start, end) of each of its examples.

    Raises:
        ValueError: what divides the rows contradicts itself or their lengths.
    """
    masks = _beside(item, "attention_mask", lengths, position)
    seq_idx = _beside(item, "seq_idx", lengths, position)
    given = item.get("position_ids")
    positions = None if given is None else _carried_rows(given, "position_ids", lengths)
    for mask in masks or ():
        if bool((mask < 0).any()):
            raise ValueError(
                "attention_mask must hold 0 for padding, else 1 or the number of the example, got "
                f"{int(mask.min())} at item {position}; give the mask that the tokenizer made"
            )
    cuts = _cuts(item, lengths, masks, position)
    try:
        return [
            spans(
                length,
                mask=None if masks is None else masks[number],
                position_ids=None if positions is None else positions[number],
                seq_idx=None if seq_idx is None else seq_idx[number],
                cuts=cuts[number],
            )
            for number, length in enumerate(lengths)
        ]
    except ValueError as error:
        raise ValueError(f"{error} (item {position})") from None


def _without_padding_at_the_end(pieces: list[Example]) -> list[Example]:
    """Collators fill a row of several examples up, and what they fill it with is no example."""
    filling = pieces[-1].input_ids[-1]
    while len(pieces) > 1:
        last = pieces[-1]
        if last.num_targets(0) or (last.input_ids != filling).any():
            break
        pieces = pieces[:-1]
    return pieces


def _require_shifted(following: Tensor, labels: Tensor, position: int) -> None:
    if not torch.equal(following[:-1], labels[1:]) or following[-1] != IGNORE_INDEX:
        raise ValueError(
            "shift_labels must be labels moved by one place, -100 at the end of each example, got "
            f"others at item {position}; leave shift_labels out, labels say the same"
        )


def _beside(
    item: Mapping[str, Any], key: str, lengths: Sequence[int], position: int
) -> list[Tensor] | None:
    """The rows of a column that is read here, one value for each token; None: not given."""
    if item.get(key) is None:
        return None
    rows = _as_rows(item[key], key, position, whole_floats=key == "attention_mask")
    found = [row.numel() for row in rows]
    if found != lengths:
        raise ValueError(
            f"{key} must have the shape of input_ids at item {position}, got rows of "
            f"{found} and {lengths} tokens; pad both alike"
        )
    return rows


def _carried_rows(value: Any, key: str, lengths: Sequence[int]) -> list[Tensor] | None:
    """The rows of any other column, where it has one integer for each token; else None."""
    try:
        rows = _as_rows(value, key, 0, keep_bool=True)
    except ValueError:
        return None
    if key == "position_ids" and len(rows) == 1:
        # Models take one row of them for a whole batch.
        rows = rows * len(lengths)
    return rows if [row.numel() for row in rows] == lengths else None


def _cuts(
    item: Mapping[str, Any],
    lengths: Sequence[int],
    masks: Sequence[Tensor] | None,
    position: int,
) -> list[set[int]]:
    """Where cumulative lengths say that an example begins, row by row.

    They count all tokens of the batch, or those that its mask keeps.
    """
    total = sum(lengths)
    kept = torch.arange(total) if masks is None else torch.cat(list(masks)).nonzero().squeeze(1)
    places: set[int] = set()
    for key in CUMULATIVE_LENGTHS:
        if item.get(key) is None:
            continue
        found, *more = _as_rows(item[key], key, position)
        wrong = more or len(found) < 2 or found[0] != 0 or found[-1] > total
        if wrong or bool((found.diff() < 0).any()):
            raise ValueError(
                f"{key} must rise from 0 to at most the batch's {total} tokens, got "
                f"{item[key]!r:.80} at item {position}; give the places where its examples begin, "
                "and its end"
            )
        if found[-1] == len(kept):
            found = kept[found[found < len(kept)]]
        places.update(found.tolist())
    rows, first = [], 0
    for length in lengths:
        rows.append({place - first for place in places if first <= place < first + length})
        first += length
    return rows


def _as_rows(
    value: Any, key: str, position: int, *, keep_bool: bool = False, whole_floats: bool = False
) -> list[Tensor]:
    """[T], [B, T] or a ragged list of rows -> a list of int64 CPU rows."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "O":
        # What `datasets` makes of ragged rows in its NumPy format.
        value = list(value)
    many = isinstance(value, list | tuple) and len(value) > 0 and hasattr(value[0], "__len__")
    try:
        rows = [torch.as_tensor(row) for row in (value if many else [value])]
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"{key} must hold integers of shape [T] or [B, T], got {value!r:.80} at item "
            f"{position} ({error}); tokenise the loader's rows, or pass tokenizer="
        ) from None
    if not many and rows[0].dim() == 2:
        rows = list(rows[0])
    for row in rows:
        if row.dim() != 1:
            raise ValueError(
                f"{key} must have shape [T] or [B, T], got a row of shape {list(row.shape)} at "
                f"item {position}; drop the extra dimensions"
            )
        if row.is_complex() or (row.is_floating_point() and row.numel()):
            if whole_floats and torch.equal(row, row.round()) and row.isfinite().all():
                continue
            raise ValueError(
                f"{key} must hold integers, got {row.dtype} at item {position}; cast it to int64"
            )
    kept = torch.bool if keep_bool else torch.int64
    return [
        row.detach().to("cpu", kept if row.dtype == torch.bool else torch.int64) for row in rows
    ]
