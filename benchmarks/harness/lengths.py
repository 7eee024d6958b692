"""How long examples are, and examples of such lengths.

`_BEAVERTAILS` says how long the rows of BeaverTails are that DEAN scores fairness with: 600 rows,
prompt and safe response encoded separately ("raw", no chat template) with SmolLM2's tokenizer.
Their lengths are all but uncorrelated there (0.08), so they are drawn apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from fastdean.data.examples import IGNORE_INDEX, Example

# At most so long are the prompts, and the responses, of these shares of the rows.
_SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)
_BEAVERTAILS = (
    (4, 6, 6, 7, 8, 9, 11, 13, 16, 19, 27, 39, 50, 56, 120),
    (11, 25, 34, 42, 49, 55, 62, 69, 75, 80, 87, 92, 97, 100, 108),
)


class Length(NamedTuple):
    """Tokens of one example; the response's are the targets."""

    prompt: int
    response: int

    @property
    def tokens(self) -> int:
        return self.prompt + self.response


def chosen(count: int, tokens: int | None) -> list[Length]:
    """`count` lengths of `tokens` each, one in five of it prompt; None: BeaverTails'."""
    if tokens is None:
        return beavertails(count)
    prompt = max(1, tokens // 5)
    return [Length(prompt, tokens - prompt)] * count


def beavertails(count: int) -> list[Length]:
    """`count` lengths distributed like BeaverTails' fairness rows; the same ones every time.

    One from each of `count` equal parts of the distribution, so that few lengths already have its
    mean; in a fixed shuffled order, with prompts and responses paired at random.
    """
    generator = torch.Generator().manual_seed(count)
    shares = (np.arange(count) + 0.5) / count
    drawn = []
    for tokens in _BEAVERTAILS:
        order = torch.randperm(count, generator=generator).numpy()
        drawn.append(np.interp(shares, _SHARES, tokens).round().astype(int)[order].tolist())
    return [Length(*pair) for pair in zip(*drawn, strict=True)]


def filling(rows: int) -> list[Length]:
    """BeaverTails' lengths until `rows` tokens are full, the last one cut to what is left."""
    found: list[Length] = []
    for length in beavertails(max(1, rows // 8)):
        if length.tokens >= rows:
            break
        found.append(length)
        rows -= length.tokens
    return [*found, Length(0, rows)]


def segments(lengths: Sequence[Length]) -> torch.Tensor:
    """int64 [B, 2]: (start, end) of each example when they lie one after the other."""
    counts = torch.tensor([length.tokens for length in lengths], dtype=torch.int64)
    return torch.stack([counts.cumsum(0) - counts, counts.cumsum(0)], dim=1)


def random_examples(count: int, tokens: int | None, vocabulary: int) -> list[Example]:
    """`count` of `tokens` each, or of BeaverTails' lengths; the same ones every time."""
    return examples(chosen(count, tokens), vocabulary)


def examples(lengths: Sequence[Length], vocabulary: int) -> list[Example]:
    """Examples of these lengths with random tokens; the same ones every time."""
    generator = torch.Generator().manual_seed(len(lengths))
    made = []
    for length in lengths:
        ids = torch.randint(vocabulary, (length.tokens,), generator=generator)
        labels = ids.clone()
        labels[: length.prompt] = IGNORE_INDEX
        made.append(Example(ids, labels))
    return made
