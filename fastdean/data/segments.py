"""Where the examples of a loader's row begin and end: its padding, and rows that hold several.

Collators that save padding put several examples into one row and say so in one of these ways:

- `position_ids` that start again (transformers' DataCollatorWithFlattening);
- an `attention_mask` that numbers them, 1 1 2 2 3 3 0;
- `seq_idx`, the number of each token's example;
- `cu_seq_lens_q` and its like, the places where they begin.

Where several of these are given, an example begins wherever one of them says so.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

CUMULATIVE_LENGTHS = (
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "cu_seq_lens",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "cu_seqlens",
)
# What says how a row is divided, and nothing else.
DIVIDING_COLUMNS = (
    "seq_idx",
    *CUMULATIVE_LENGTHS,
    "max_length_q",
    "max_length_k",
    "max_seqlen_q",
    "max_seqlen_k",
    "max_seqlen",
)


def spans(
    length: int,
    *,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cuts: Collection[int] = (),
) -> list[tuple[int, int]]:
    """(start, end) of each example in a row of `length` tokens, padding at either end left out.

    Args:
        mask: int64 [T], 0 for padding, else 1 or the number of the example.
        position_ids, seq_idx: int64 [T]; a negative one is padding.
        cuts: places 0..T where an example begins.
    Raises:
        ValueError: one number in two places.
    """
    kept = torch.ones(length, dtype=torch.bool)
    if mask is not None:
        kept &= mask != 0
    for numbers in (position_ids, seq_idx):
        if numbers is not None:
            kept &= numbers >= 0
    places = kept.nonzero().squeeze(1)
    if len(places) < 2:
        return [(place, place + 1) for place in places.tolist()]
    before, here = places[:-1], places[1:]
    begins = torch.zeros(len(here), dtype=torch.bool)
    for name, numbers in (("attention_mask", mask), ("seq_idx", seq_idx)):
        if numbers is not None:
            changes = numbers[before] != numbers[here]
            if int(changes.sum()) + 1 > len(numbers[places].unique()):
                raise ValueError(
                    f"{name} must number the examples of a row one after the other, got one "
                    "number in two places; give each example a number of its own"
                )
            begins |= changes
    if position_ids is not None:
        begins |= _starts_again(position_ids[before], position_ids[here], position_ids[places[0]])
    if cuts:
        # How many cuts lie at or before each token: more than before the token ahead of it.
        passed = torch.searchsorted(torch.tensor(sorted(cuts)), places, right=True)
        begins |= passed[1:] > passed[:-1]
    pieces = places.tensor_split((begins.nonzero().squeeze(1) + 1).tolist())
    return [(int(piece[0]), int(piece[-1]) + 1) for piece in pieces]


def _starts_again(before: Tensor, here: Tensor, first: Tensor) -> Tensor:
    """At 0, or where the row's first position is. Any other jump is a numbering of its own."""
    return (here <= before) & ((here == 0) | (here == first))
