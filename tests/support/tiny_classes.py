"""Batches rich in the tokens of a few classes, for the regulariser's tests."""

from __future__ import annotations

import torch
from tiny_models import VOCAB

IDS = (5, 9, 12, 20, 31, 44, 60)


def some_classes(ids=IDS):
    """A class for each of these token ids."""
    from fastdean.collapse import CollapseClasses

    return CollapseClasses(
        pieces=tuple((i,) for i in ids),
        words=tuple(f"word{i}" for i in ids),
        groups=("group",) * len(ids),
        left_out=(),
    )


def rich_batches(count, rows=3, columns=12, seed=0):
    """Half of the tokens are of `IDS`; rows end in padding, and a part of the labels is hidden."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    for _ in range(count):
        listed = torch.tensor(IDS)[integers(0, len(IDS), rows, columns)]
        anything = integers(3, VOCAB, rows, columns)
        ids = torch.where(integers(0, 2, rows, columns) == 1, listed, anything)
        lengths = integers(columns // 2, columns + 1, rows, 1)
        mask = (torch.arange(columns) < lengths).long()
        ids = torch.where(mask == 1, ids, 0)
        hidden = (mask == 0) | (torch.arange(columns) < integers(1, 4, rows, 1))
        yield {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": torch.where(hidden, -100, ids),
        }


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
