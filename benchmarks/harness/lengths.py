"""How long examples are: what the speed of scoring depends on where the text itself does not.

`_BEAVERTAILS` says how long the rows of BeaverTails are that DEAN scores fairness with: 600 rows,
prompt and safe response encoded separately ("raw", no chat template) with SmolLM2's tokenizer. Only
these counts are kept; prompt and response lengths are all but uncorrelated there (0.08), so they
are drawn apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastdean.data import IGNORE_INDEX, Example

# Share of the rows that are at most this long: (share, tokens of the prompt, of the response).
_BEAVERTAILS = (
    (0.00, 4, 11),
    (0.05, 6, 25),
    (0.10, 6, 34),
    (0.20, 7, 42),
    (0.30, 8, 49),
    (0.40, 9, 55),
    (0.50, 11, 62),
    (0.60, 13, 69),
    (0.70, 16, 75),
    (0.80, 19, 80),
    (0.90, 27, 87),
    (0.95, 39, 92),
    (0.98, 50, 97),
    (0.99, 56, 100),
    (1.00, 120, 108),
)


@dataclass(frozen=True)
class Length:
    """Tokens of one example; the response's are the targets."""

    prompt: int
    response: int

    @property
    def tokens(self) -> int:
        return self.prompt + self.response


def beavertails(count: int) -> list[Length]:
    """`count` lengths distributed like BeaverTails' fairness rows; the same ones every time.

    One from each of `count` equal parts of the distribution, so that few lengths already have its
    mean; in a fixed shuffled order, with prompts and responses paired at random.
    """
    generator = torch.Generator().manual_seed(count)
    shares = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    prompts, responses = (
        _quantile(column, shares[torch.randperm(count, generator=generator)]) for column in (1, 2)
    )
    return [Length(p, r) for p, r in zip(prompts, responses, strict=True)]


def _quantile(column: int, shares: torch.Tensor) -> list[int]:
    """Between two rows of the table a length grows linearly."""
    known = torch.tensor([row[0] for row in _BEAVERTAILS], dtype=torch.float64)
    tokens = torch.tensor([row[column] for row in _BEAVERTAILS], dtype=torch.float64)
    above = torch.searchsorted(known, shares).clamp(1, len(known) - 1)
    step = (shares - known[above - 1]) / (known[above] - known[above - 1])
    return torch.lerp(tokens[above - 1], tokens[above], step).round().long().tolist()


def fixed(count: int, tokens: int) -> list[Length]:
    """`count` times the same length, one in five tokens of it prompt, as in BeaverTails."""
    prompt = max(1, tokens // 5)
    return [Length(prompt, tokens - prompt)] * count


def filling(rows: int) -> list[Length]:
    """BeaverTails' lengths until `rows` tokens are full, the last one cut to what is left."""
    lengths = beavertails(max(1, rows // 8))
    chosen: list[Length] = []
    left = rows
    for length in lengths:
        if length.tokens >= left:
            break
        chosen.append(length)
        left -= length.tokens
    return [*chosen, Length(0, left)]


def segments(lengths: Sequence[Length]) -> torch.Tensor:
    """int64 [B, 2]: (start, end) of each example when they lie one after the other."""
    ends = torch.tensor([length.tokens for length in lengths], dtype=torch.int64).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    return torch.stack([starts, ends], dim=1)


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
