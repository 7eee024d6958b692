"""From the sources of a job to numbered rows and their examples.

Rows keep their number in the source, counted from 1, so that one that is refused can be found.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any

from torch import nn

from fastdean.data.examples import Example, encode
from fastdean.data.skipped import Skipped
from fastdean.data.sources import BadRow, asks_the_hub, numbered_rows, sample_rows
from fastdean.files.hub import is_unreachable
from fastdean.models.label_shift import label_shift
from fastdean.models.model_state import max_tokens
from fastdean.wording.log import logger

NumberedRow = tuple[int, dict[str, Any]]


def take_rows(
    source: str,
    count: int | None,
    seed: int,
    *,
    name: str = "source",
    skipped: Skipped | None = None,
    usual: int | None = None,
    prompts: bool = False,
) -> tuple[list[NumberedRow], list[NumberedRow]]:
    """(`count` rows of a source in shuffled order, the others), each with its number from 1.

    With fewer rows than `count` all are taken, and a warning says so if somebody asked for it.

    Args:
        name: of the argument that names the source, for messages.
        skipped: gets the rows that cannot be read; None: the first of them is an error.
        usual: what `count` is if nobody asks.
        prompts: rows need not have an answer, see `numbered_rows`.
    """
    with _named(name), _one_request(source):
        numbered = numbered_rows(source, None if skipped is None else skipped.rows, prompts=prompts)
    if count is not None and count > len(numbered):
        if count != usual:
            logger.warning(
                "%s has %d rows, fewer than the %d asked for: all are taken",
                source,
                len(numbered),
                count,
            )
        count = len(numbered)
    return sample_rows(numbered, count, seed)


def encode_rows(
    rows: Sequence[NumberedRow],
    source: str,
    tokenizer: Any,
    model: nn.Module | None,
    *,
    template: str | None = None,
    max_length: int | None = None,
    name: str = "source",
) -> list[Example]:
    """Tokenise numbered rows; what the model could not take is refused by source and number.

    Without a model only what cannot be tokenised is refused.

    Raises:
        ValueError: a row without a target the model predicts, or longer than its positions.
    """
    try:
        return _encoded(rows, tokenizer, model, template, max_length)
    except ValueError as error:
        raise ValueError(f"{name} {source!r}: {error}{_or_skip(error)}") from None


def _encoded(
    rows: Sequence[NumberedRow],
    tokenizer: Any,
    model: nn.Module | None,
    template: str | None,
    max_length: int | None,
) -> list[Example]:
    """As `encode_rows`; errors name the row and not its source."""
    # Once for all rows: whether a model has changed takes a look at each of its modules.
    shift = 0 if model is None else label_shift(model)
    return [
        _fitting(
            encode([row], tokenizer, template=template, max_length=max_length, first=n),
            n,
            model,
            shift,
        )
        for n, row in rows
    ]


def encode_usable(
    rows: Sequence[NumberedRow], skipped: Skipped | None, *arguments: Any, **options: Any
) -> tuple[list[NumberedRow], list[Example]]:
    """The rows that `usable_rows` leaves, and their examples; arguments as for `encode_rows`."""
    usable = usable_rows(rows, skipped, *arguments, **options)
    return usable, encode_rows(usable, *arguments, **options)


def usable_rows(
    rows: Sequence[NumberedRow],
    skipped: Skipped | None,
    source: str,
    tokenizer: Any,
    model: nn.Module | None,
    *,
    template: str | None = None,
    max_length: int | None = None,
    name: str = "source",
    pairs: bool = False,
) -> list[NumberedRow]:
    """The rows that `encode_rows` takes with these arguments; the others are added to `skipped`.

    Where nothing is skipped all are, and `encode_rows` refuses the first that it cannot take.

    Args:
        pairs: the unsafe response must be taken as well.
    Raises:
        ValueError: the options are wrong, or no row is left.
    """
    if skipped is None:
        return list(rows)
    options = (tokenizer, model, template, max_length)
    # What is wrong with the options is wrong with every row.
    encode_rows([], source, tokenizer, model, template=template, max_length=max_length, name=name)
    found = []
    for number, row in rows:
        try:
            _encoded([(number, row)], *options)
            if pairs and is_pair(row):
                _encoded([(number, {**row, "response": row["unsafe"]})], *options)
        except ValueError as error:
            skipped.rows[number] = str(error)
        else:
            found.append((number, row))
    if rows and not found:
        reason = skipped.rows[rows[0][0]]
        raise ValueError(f"{name} {source!r}: every row had to be left out: {reason}")
    return found


def is_pair(row: Mapping[str, Any]) -> bool:
    """Whether a row holds a safe and an unsafe answer to its prompt, as margins need them."""
    return all(row.get(key) for key in ("prompt", "response", "unsafe"))


def _or_skip(error: Exception) -> str:
    """What else can be done about rows that are refused."""
    text = str(error)
    is_row = isinstance(error, BadRow) or text.startswith("row ")
    return "; or pass skip_bad_rows=True to leave such rows out" if is_row else ""


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors call the source by the argument that names it: there may be several."""
    try:
        yield
    except ValueError as error:
        text = re.sub(r"^source\b", name, str(error))
        raise ValueError(f"{text}{_or_skip(error)}") from None


@contextmanager
def _one_request(source: str) -> Iterator[None]:
    """If the hub cannot be reached, ask its cache alone: the libraries retry for half a minute."""
    if not (asks_the_hub(source) and is_unreachable()):
        yield
        return
    from huggingface_hub import constants

    # What the environment variable sets; it is read at every request.
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _fitting(
    encoded: Sequence[Example], number: int, model: nn.Module | None, shift: int
) -> Example:
    (example,) = encoded
    if model is None:
        return example
    if example.num_targets(shift) == 0:
        raise ValueError(
            f"row {number} must have at least one target token after its first token, got none; "
            "leave the row out"
        )
    longest = max_tokens(model)
    if longest is not None and len(example) > longest:
        raise ValueError(
            f"row {number} must have at most {longest} tokens (the model's positions), got "
            f"{len(example)}; cut it with max_length"
        )
    return example


def content_digest(rows: Sequence[NumberedRow]) -> str:
    """Of what the rows hold, whatever their order: equal for two copies of one file."""
    lines = sorted(json.dumps(row, sort_keys=True, default=str) for _, row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def same_content_cautions(contents: Mapping[str, str]) -> list[str]:
    """A sentence for each two sets of the same rows.

    Args:
        contents: name of the set -> `content_digest` of its rows.
    """
    return [
        f"{one} and {other} hold the same rows: what is said of both is said of one set twice"
        for one, other in combinations(contents, 2)
        if contents[one] == contents[other]
    ]
