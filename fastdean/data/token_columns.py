"""The columns of a batch of tokens as rows of integers, and where its examples begin and end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdean.data.segments import CUMULATIVE_LENGTHS, spans


def example_spans(
    item: Mapping[str, Any], lengths: Sequence[int], position: int
) -> list[list[tuple[int, int]]]:
    """For each row of a batch, of `lengths` tokens, the (start, end) of each of its examples.

    Raises:
        ValueError: what divides the rows contradicts itself or their lengths.
    """
    masks = beside(item, "attention_mask", lengths, position)
    seq_idx = beside(item, "seq_idx", lengths, position)
    given = item.get("position_ids")
    positions = None if given is None else carried_rows(given, "position_ids", lengths)
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


def beside(
    item: Mapping[str, Any], key: str, lengths: Sequence[int], position: int
) -> list[Tensor] | None:
    """The rows of a column that is read here, one value for each token; None: not given."""
    if item.get(key) is None:
        return None
    rows = as_rows(item[key], key, position, whole_floats=key == "attention_mask")
    found = [row.numel() for row in rows]
    if found != lengths:
        raise ValueError(
            f"{key} must have the shape of input_ids at item {position}, got rows of "
            f"{found} and {lengths} tokens; pad both alike"
        )
    return rows


def carried_rows(value: Any, key: str, lengths: Sequence[int]) -> list[Tensor] | None:
    """The rows of any other column, where it has one integer for each token; else None."""
    try:
        rows = as_rows(value, key, 0, keep_bool=True)
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
        found, *more = as_rows(item[key], key, position)
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


def as_rows(
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
