"""From text to tokens, with those that end a female, a male or a neutral word marked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from fastdean.debias.gender_words import GenderWords

OTHER, FEMALE, MALE, NEUTRAL = range(4)


@dataclass(frozen=True)
class Text:
    """One tokenised text.

    Attributes:
        input_ids: int64 [T] on the CPU, no padding.
        special: bool [T], the tokens that the tokenizer added.
        kinds: int64 [T]; FEMALE, MALE or NEUTRAL on the last token of such a word, else OTHER.
    """

    input_ids: Tensor
    special: Tensor
    kinds: Tensor


@dataclass(frozen=True)
class TextBatch:
    """Texts padded on the right.

    Attributes:
        input_ids, kinds: int64 [B, T].
        attention_mask: int64 [B, T].
        special: bool [B, T]; also True on padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    special: Tensor
    kinds: Tensor

    def to(self, device: torch.device) -> TextBatch:
        return TextBatch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


class TextEncoder:
    """Callable: text -> `Text`.

    Args:
        tokenizer: a fast Hugging Face tokenizer, whose offsets find words of several pieces too.
        words: the female and male words.
        neutral_words: in any case; None: `embedded_neutral_words()`.
        max_length: the text is cut to this number of tokens.
    Raises:
        ValueError: the tokenizer is not a fast one.
    """

    def __init__(
        self,
        tokenizer: Any,
        words: GenderWords,
        *,
        neutral_words: Iterable[str] | None = None,
        max_length: int,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"tokenizer must be a fast one, which knows where in the text its tokens lie, got "
                f"{type(tokenizer).__name__}; load it with AutoTokenizer.from_pretrained"
            )
        neutral = embedded_neutral_words() if neutral_words is None else neutral_words
        self._kinds: dict[str, int] = {
            **{word.lower(): NEUTRAL for word in neutral},
            **dict.fromkeys(words.female, FEMALE),
            **dict.fromkeys(words.male, MALE),
        }
        either = "|".join(re.escape(word) for word in sorted(self._kinds, key=len, reverse=True))
        pattern = rf"(?<!\w)(?:{either})(?!\w)" if either else r"(?!)"
        self._pattern = re.compile(pattern, re.IGNORECASE)
        self._tokenizer = tokenizer
        self._max_length = max_length

    def __call__(self, text: str) -> Text:
        with _own_settings_kept(self._tokenizer):
            encoded = self._tokenizer(
                text,
                truncation=True,
                max_length=self._max_length,
                return_offsets_mapping=True,
                return_special_tokens_mask=True,
            )
        kinds = torch.full((len(encoded["input_ids"]),), OTHER)
        for match in self._pattern.finditer(text):
            # To the pattern, which ignores case, more letters are equal than to lower(): "ſhe".
            kind = self._kinds.get(match.group().lower())
            place = _last_token(encoded["offset_mapping"], *match.span())
            if kind is not None and place is not None:
                kinds[place] = kind
        return Text(
            torch.tensor(encoded["input_ids"], dtype=torch.int64),
            torch.tensor(encoded["special_tokens_mask"], dtype=torch.bool),
            kinds,
        )


def embedded_neutral_words() -> tuple[str, ...]:
    """Occupations and traits that stereotypes tie to a gender; written for this package."""
    file = resources.files("fastdean.data") / "neutral_words.txt"
    return tuple(file.read_text("utf-8").split())


def collate(texts: Sequence[Text], pad_id: int) -> TextBatch:
    """The texts, at least one, as one batch."""

    def padded(name: str, fill: int | bool) -> Tensor:
        columns = [getattr(text, name) for text in texts]
        return torch.nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=fill)

    lengths = torch.tensor([text.input_ids.numel() for text in texts])
    input_ids = padded("input_ids", pad_id)
    mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    return TextBatch(input_ids, mask, padded("special", True), padded("kinds", OTHER))


def texts_of(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> list[tuple[str, ...]]:
    """The named columns of each row.

    Raises:
        ValueError: no row, or a row without a text there.
    """
    found = []
    for number, row in enumerate(rows):
        missing = [name for name in columns if not isinstance(row.get(name), str) or not row[name]]
        if missing:
            raise ValueError(
                f"row {number} must have text in the column {missing[0]!r}, got the columns "
                f"{sorted(row)}; map it with ::{missing[0]}=COLUMN behind the source"
            )
        found.append(tuple(row[name] for name in columns))
    if not found:
        raise ValueError("rows must hold at least one row, got none; check the source")
    return found


def _last_token(offsets: Sequence[tuple[int, int]], start: int, end: int) -> int | None:
    """The last token that covers a character of text[start:end]; None if the end is cut off."""
    covering = [i for i, (low, high) in enumerate(offsets) if low < end and high > start]
    return covering[-1] if covering and offsets[covering[-1]][1] >= end else None


@contextmanager
def _own_settings_kept(tokenizer: Any) -> Iterator[None]:
    """Restores truncation and padding: a call sets them, and saving would keep them."""
    backend = tokenizer.backend_tokenizer
    truncation, padding = backend.truncation, backend.padding
    try:
        yield
    finally:
        if truncation is None:
            backend.no_truncation()
        else:
            backend.enable_truncation(**truncation)
        if padding is None:
            backend.no_padding()
        else:
            backend.enable_padding(**padding)
