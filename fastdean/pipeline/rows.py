"""From the sources of a job to numbered rows and their examples: which are scored, which measured.

Rows keep their number in the source, counted from 1, so that one that is refused can be found.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastdean._logging import logger
from fastdean.data import Example, encode
from fastdean.forward import label_shift
from fastdean.model_state import max_tokens
from fastdean.pipeline.job import Job
from fastdean.sources import load_rows, sample_rows

NumberedRow = tuple[int, dict[str, Any]]


@dataclass(frozen=True)
class SplitRows:
    """One source, split into what is scored and what is measured on.

    Attributes:
        held_out: whether none of the measured rows is a scored one.
    """

    scored: list[NumberedRow]
    measured: list[NumberedRow]
    held_out: bool

    @property
    def digest(self) -> str:
        """Of the rows and their order, to tell whether the source has changed."""
        content = json.dumps([self.scored, self.measured], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()


def take_rows(
    source: str, count: int | None, seed: int, *, name: str = "source"
) -> tuple[list[NumberedRow], list[NumberedRow]]:
    """(`count` rows of a source in shuffled order, the others), each with its number from 1.

    With fewer rows than `count` all are taken, and a warning says so.

    Args:
        name: of the argument that names the source, for messages.
    """
    with _named(name):
        numbered = list(enumerate(load_rows(source), start=1))
    if count is not None and count > len(numbered):
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
    except ValueError as error:
        raise ValueError(f"{name} {source!r}: {error}") from None


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors call the source by the argument that names it: there may be several."""
    try:
        yield
    except ValueError as error:
        raise ValueError(re.sub(r"^source\b", name, str(error))) from None


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


def split_rows(name: str, job: Job) -> SplitRows:
    """The scored rows, and others to measure on: of other prompts, with what the figures need."""
    scored, others = take_rows(getattr(job, name), job.examples, job.seed, name=name)
    seen = {str(row["prompt"]) for _, row in scored if "prompt" in row}
    fresh = [(n, row) for n, row in others if str(row.get("prompt")) not in seen]

    def usable(candidates: Sequence[NumberedRow]) -> list[NumberedRow]:
        found = [(n, row) for n, row in candidates if _is_measurable(row, name)]
        return found[: job.eval_examples]

    held_out = usable(fresh)
    return SplitRows(scored, held_out or usable(scored), bool(held_out))


def _is_measurable(row: Mapping[str, Any], name: str) -> bool:
    """Margins need both answers to a prompt; perplexity takes any row."""
    return name == "general" or all(row.get(key) for key in ("prompt", "response", "unsafe"))
