"""From rows or loader batches to tokenised examples without padding.

An example is what the method averages over: one prompt with one response, the response's tokens
being the targets. Everything after this file sees only `Example`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastdean.data.segments import DIVIDING_COLUMNS
from fastdean.data.skipped import Skipped
from fastdean.data.token_columns import as_rows, beside, carried_rows, example_spans
from fastdean.data.tokenising import IGNORE_INDEX, TEMPLATES, tokenised
from fastdean.default_device import cpu_by_default, of_the_caller
from fastdean.wording.mendable import InputTypeError
from fastdean.wording.numbers import require_whole

__all__ = ["IGNORE_INDEX", "TEMPLATES", "Example", "encode", "read_examples"]

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
            its forward names (`fastdean.models.fitting.fitted`).
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
        """A copy in which every token is a target of shift 0, for reading representations."""
        return replace(self, labels=self.input_ids)

    def num_targets(self, shift: int) -> int:
        """Number of targets for a model that predicts the token `shift` places ahead."""
        return int((self.labels[shift:] != IGNORE_INDEX).sum())


@cpu_by_default
def read_examples(
    loader: Any,
    *,
    tokenizer: Any = None,
    template: str | None = None,
    max_length: int | None = None,
    require_labels: bool = True,
    skip_bad_rows: bool = False,
) -> list[Example]:
    """Read every example of `loader`, in order, padding stripped.

    A row that holds several examples is split (see `fastdean.data.segments`); what ends such a row
    without a target, one token over and over, is padding. A token that `attention_mask` hides is no
    target. What else a batch has for each token is carried along (`Example.columns`).

    Args:
        loader: an iterable (DataLoader, `datasets.Dataset`, list, generator) of
            batches `{"input_ids": [B, T], "attention_mask": [B, T], "labels": [B, T]}`,
            single examples with the same keys and [T] values, or, with `tokenizer`, rows (see
            `encode`). `attention_mask` may be left out when there is no padding; `labels` may not.
        tokenizer: a Hugging Face tokenizer, needed for rows of text.
        template, max_length: see `encode`.
        require_labels: False, for those who predict nothing: `labels` may be left out, and every
            token is its own.
        skip_bad_rows: leave out rows of text that cannot be read or tokenised, with a warning that
            counts them, rather than refuse the first.
    Raises:
        TypeError: `loader` cannot be iterated, or yields something that is no mapping.
        ValueError: an item lacks what is needed, or no example is left.
    """
    skipped = Skipped() if skip_bad_rows else None
    found = numbered_examples(
        loader,
        tokenizer=tokenizer,
        template=template,
        max_length=max_length,
        require_labels=require_labels,
        skipped=skipped,
    )
    if skipped is not None:
        skipped.warn("loader")
    return [example for _, example in found]


def numbered_examples(
    loader: Any,
    *,
    tokenizer: Any = None,
    template: str | None = None,
    max_length: int | None = None,
    require_labels: bool = True,
    skipped: Skipped | None = None,
) -> list[tuple[int, Example]]:
    """The examples of `read_examples`, each with its number from 0.

    Args:
        skipped: gets the rows of text that cannot be used; None: the first of them is an error.
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
    examples: list[tuple[int, Example]] = []
    for position, item in enumerate(of_the_caller(loader)):
        first = len(examples) + (0 if skipped is None else len(skipped.rows))
        if isinstance(item, Example):
            examples.append((first, item.first(max_length)))
        elif isinstance(item, Mapping) and "input_ids" in item:
            item = _as_collected(item, loader)
            if not require_labels and item.get("labels") is None:
                item = {**item, "labels": item["input_ids"]}
            found = (example.first(max_length) for example in _examples_of(item, position))
            examples.extend(enumerate(found, start=first))
        elif isinstance(item, Mapping) and tokenizer is None:
            raise ValueError(
                f"loader must yield input_ids and labels, got the columns {sorted(item)} at item "
                f"{position}; pass tokenizer= to have rows of text tokenised"
            )
        else:
            try:
                rows = _rows_of(item, position)
            except (InputTypeError, ValueError) as error:
                if skipped is None or tokenizer is None:
                    raise
                skipped.rows[first] = str(error)
                continue
            examples.extend(_encoded(rows, tokenizer, template, max_length, first, skipped))
    if not examples:
        advice = "; check the source and its filter"
        if skipped is not None and skipped.rows:
            advice = f" that can be used: {next(iter(skipped.rows.values()))}"
        raise ValueError(f"loader must yield at least one example, got none{advice}")
    return examples


@cpu_by_default
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
    _check_max_length(max_length)
    return [example for _, example in _encoded(rows, tokenizer, template, max_length, first)]


def _check_max_length(max_length: int | None) -> None:
    # A causal model predicts nothing from less than two tokens.
    if max_length is None:
        return
    require_whole("max_length", max_length, "a number of tokens")
    if max_length < 2:
        raise ValueError(
            f"max_length must be at least 2 tokens, got {max_length}; leave it out to cut nothing"
        )


def _encoded(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    template: str | None,
    max_length: int | None,
    first: int,
    skipped: Skipped | None = None,
) -> Iterator[tuple[int, Example]]:
    if template is not None and template not in TEMPLATES:
        raise ValueError(
            f"template must be one of {', '.join(TEMPLATES)}, got {template!r}; leave it out for "
            "'raw', or give rows with messages for a chat"
        )
    for number, row in enumerate(rows, start=first):
        try:
            yield number, _encoded_row(row, tokenizer, template, max_length, number)
        except ValueError as error:
            if skipped is None:
                raise
            skipped.rows[number] = str(error)


def _encoded_row(
    row: Mapping[str, Any],
    tokenizer: Any,
    template: str | None,
    max_length: int | None,
    number: int,
) -> Example:
    ids, labels, rendered = tokenised(row, tokenizer, template, number)
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
    return example


def _rows_of(item: Any, position: int) -> Sequence[Mapping[str, Any]]:
    """The rows of a loader's item: itself, or those that torch's default collation has joined.

    It makes columns [B] of text rows, and of B chats one list of turns, each with B roles and B
    contents.
    """
    if not isinstance(item, Mapping):
        raise InputTypeError(
            f"loader must yield dictionaries, got {type(item).__name__} at item {position}; "
            "give each batch the keys input_ids, attention_mask and labels"
        )
    turns: Any = item.get("messages")
    first = turns[0] if isinstance(turns, Sequence) and turns else None
    if isinstance(first, Mapping) and isinstance(first.get("role"), list | tuple):
        chats = len(first["role"])
        for turn in turns:
            if not all(_is_text_column(turn, key, chats) for key in ("role", "content")):
                raise ValueError(
                    "loader must collate chats of roles and texts, got a turn of other parts, "
                    f"{turn!r:.80}; pass collate_fn=list to the DataLoader, and give its rows"
                )
        return [
            {"messages": [{key: turn[key][i] for key in ("role", "content")} for turn in turns]}
            for i in range(chats)
        ]
    columns = {
        key: item[key]
        for key in ("prompt", "response", "text")
        if isinstance(item.get(key), list | tuple)
    }
    if not columns:
        return [item]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _is_text_column(turn: Any, key: str, length: int) -> bool:
    value = turn.get(key) if isinstance(turn, Mapping) else None
    if not isinstance(value, list | tuple) or len(value) != length:
        return False
    return all(isinstance(text, str) for text in value)


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
    input_ids = as_rows(item["input_ids"], "input_ids", position)
    lengths = [row.numel() for row in input_ids]
    labels = beside(item, "labels", lengths, position)
    assert labels is not None  # They were asked for first.
    following = beside(item, "shift_labels", lengths, position)
    masks = beside(item, "attention_mask", lengths, position)
    divided = example_spans(item, lengths, position)
    carried = {
        key: carried_rows(value, key, lengths)
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
            what = "a row without tokens" if not ids.numel() else "a row that is padding alone"
            raise ValueError(
                f"loader must give each example at least one token that is no padding, got {what} "
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
