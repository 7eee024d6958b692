"""Trainings with the regulariser, and what they did, on one process and on several."""

from __future__ import annotations

import pytest
import torch
from tiny_classes import rich_batches, some_classes
from two_ranks import WORLD

from fastdean import CollapseRegularizer

STRENGTH = 10.0
STEPS = 3


def batches_of(world=WORLD, **options):
    """Those of each rank, and those of one process that has them all."""
    of_ranks = [list(rich_batches(STEPS, rows=2, seed=seed, **options)) for seed in range(world)]
    joined = [
        {name: torch.cat([batch[name] for batch in step]) for name in step[0]}
        for step in zip(*of_ranks, strict=True)
    ]
    return of_ranks, joined


BATCHES, JOINED = batches_of()


def items(batches):
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)


def unlabelled(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def total_loss(logits, labels):
    kept = labels[:, 1:] != -100
    return torch.nn.functional.cross_entropy(
        logits[:, :-1][kept], labels[:, 1:][kept], reduction="sum"
    )


def whole(tensor):
    """All of a tensor that may be sharded."""
    return getattr(tensor, "full_tensor", lambda: tensor)().detach().clone()


def trained(
    model,
    batches,
    options,
    *,
    wrapped=None,
    scale=1 / 50,
    strength=STRENGTH,
    classes=None,
    shard=None,
    averaged=None,
    after=None,
):
    """Gradients, value and statistics after each batch, and the weights at the end.

    Args:
        wrapped: the model that is called; None: `model`.
        scale: of the sum over the items' losses.
        shard: what shards the model once the regulariser is attached, as the Trainer does.
        averaged: model -> None; what makes the gradients those of all ranks, where nothing does.
        after: (model, regularizer) -> None, after each step.
    """
    model.train()
    classes = some_classes() if classes is None else classes
    regularizer = CollapseRegularizer(model, classes, strength, **options)
    if shard is not None:
        shard(model)
    # Tensors of several kinds are not updated in one call.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
    found = []
    for batch in batches:
        optimizer.zero_grad()
        logits = (wrapped or model)(**unlabelled(batch)).logits
        loss = total_loss(logits, batch["labels"]) * scale
        (loss + regularizer.term()).backward()
        if averaged is not None:
            averaged(model)
        found.append(
            {
                "gradients": {
                    name: whole(p.grad)
                    for name, p in model.named_parameters()
                    if p.grad is not None
                },
                "value": regularizer.value,
                "sums": regularizer.state.sums.clone(),
                "counts": regularizer.state.counts.clone(),
            }
        )
        optimizer.step()
        if after is not None:
            after(model, regularizer)
    regularizer.remove()
    return found, {name: whole(p) for name, p in model.named_parameters()}


def require_same_training(result, expected):
    """In fp64, up to rounding."""
    assert not isinstance(result, str), result
    steps, weights = result
    expected_steps, expected_weights = expected
    for step, exact in zip(steps, expected_steps, strict=True):
        assert step["value"] == pytest.approx(exact["value"], rel=1e-9)
        assert torch.equal(step["counts"], exact["counts"])
        torch.testing.assert_close(step["sums"], exact["sums"], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(step["gradients"], exact["gradients"], rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-7, atol=1e-8)
