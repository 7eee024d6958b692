"""One forward pass of a Hugging Face model over a batch, with logits at the target rows only.

Scoring and evaluation share it. The rows are gathered on the way into the model's own output
embedding, so that whatever the model does to its logits afterwards (Cohere's and Granite's scaling,
Gemma 2's soft-cap) stays in place; computing `hidden @ weight.T` by hand would lose it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, once_differentiable

from fastdean.data.batching import Batch, plan_batches
from fastdean.data.examples import Example
from fastdean.models.attention.packed import attention_by_segments
from fastdean.models.batch_size import tokens_per_batch_of
from fastdean.models.calling import (
    call,
    logits_of,
    require_row_per_token,
)
from fastdean.models.exact_layout import exact_layout
from fastdean.models.fitting import fitted
from fastdean.models.hooks import forward_pre_hooks
from fastdean.models.label_shift import label_shift
from fastdean.models.model_state import (
    evaluation_state,
    input_device,
    unwrap,
)
from fastdean.models.ranks.shards import is_sharded, rows_at


def attention_for(model: nn.Module, batch: Batch) -> AbstractContextManager:
    """A context in which the examples of `batch` attend as planned."""
    return attention_by_segments(model, batch.segments) if batch.by_segments else nullcontext()


@contextmanager
def target_logits(model: nn.Module) -> Iterator[Callable[[Batch], Tensor]]:
    """Inside, a function `batch -> logits [M, V]` at the batch's target rows.

    Example:
        with target_logits(model) as logits_at:
            logits = logits_at(batch)
    """
    waiting: Batch | None = None

    def gather(module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        nonlocal waiting
        if waiting is None or not args:
            return None
        batch, waiting = waiting, None
        require_row_per_token(args[0], batch.input_ids)
        return (rows_at(args[0], batch.target_rows), *args[1:]), kwargs

    def logits_at(batch: Batch) -> Tensor:
        nonlocal waiting
        waiting = batch
        try:
            with attention_for(model, batch):
                logits = logits_of(call(model, batch.model_inputs()))
        finally:
            gathered, waiting = waiting is None, None
        _require_whole(logits, head)
        if gathered:
            return logits.flatten(0, -2)
        # A model that never calls its output embedding as a module returns every row.
        require_row_per_token(logits, batch.input_ids)
        return logits.flatten(0, -2).index_select(0, batch.target_rows.to(logits.device))

    of_transformers: Any = model
    head = of_transformers.get_output_embeddings()
    with forward_pre_hooks({} if head is None else {head: gather}):
        yield logits_at


def _require_whole(logits: Tensor, head: nn.Module | None) -> None:
    """Refuse logits of a part of the vocabulary, where the head is split over ranks."""
    weight = getattr(head, "weight", None)
    if weight is None or not is_sharded(weight):
        return
    if is_sharded(logits) or logits.shape[-1] != weight.shape[0]:
        got = "a DTensor" if is_sharded(logits) else f"{logits.shape[-1]} of {weight.shape[0]}"
        raise ValueError(
            f"model must return the logits of its whole vocabulary on every rank, got {got}; let "
            "its head gather them (colwise_gather_output, or output_layouts=Replicate())"
        )


def target_losses(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of each target row in nats, fp32 [M], computed in fp32.

    Equivalent to `cross_entropy(logits.float(), targets, reduction="none")` up to rounding. Keeps
    the logits [M, V] for the backward pass and makes no other tensor of their size before it.
    """
    return _CrossEntropy.apply(logits, batch.targets.to(logits.device))


class _CrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[target] of each row; its gradient is softmax(logits) - one-hot.

    With m the largest logit of a row and s = log sum exp(logits - m), the loss is
    (m - logits[target]) + s. Blocks of rows pass through fp32 one after the other, forward and
    backward: whole fp32 copies of bf16 logits would take five times the logits' own memory.
    """

    @staticmethod
    def forward(ctx: BackwardCFunction, logits: Tensor, targets: Tensor) -> Tensor:
        targets = targets.unsqueeze(1)
        highest = logits.amax(1, keepdim=True).float()
        log_sum = torch.empty_like(highest)
        for block, wide, m, s in _row_blocks(logits, highest, log_sum):
            torch.sum(wide.copy_(block).sub_(m).exp_(), 1, keepdim=True, out=s)
        log_sum.log_()
        ctx.save_for_backward(logits, targets, highest, log_sum)
        return (highest - logits.gather(1, targets).float() + log_sum).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, grad: Tensor) -> tuple[Tensor, None]:
        by_row: list[Tensor]
        logits, *by_row = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        blocks = _row_blocks(logits, *by_row, grad.unsqueeze(1), grad_logits)
        for block, wide, target, m, s, g, out in blocks:
            # exp(logits - (m + s)) would lose what s adds to a large m.
            probability = wide.copy_(block).sub_(m).sub_(s).exp_()
            probability.scatter_(1, target, probability.gather(1, target) - 1)
            torch.mul(probability, g, out=out if out.dtype == wide.dtype else wide)
            if out.dtype != wide.dtype:
                out.copy_(wide)
        return grad_logits, None


def _row_blocks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the tensors' rows, as many at a time as one block of fp32 logits may hold.

    Behind each block of logits stands fp32 memory of its shape, the same for all blocks.
    """
    # On a CPU a block stays in the cache between its operations; elsewhere launches must be few.
    block_bytes = (2 if logits.device.type == "cpu" else 64) * 1024 * 1024
    rows = max(1, block_bytes // (4 * logits.shape[1]))
    wide = logits.new_empty(min(rows, len(logits)), logits.shape[1], dtype=torch.float32)
    for block, *rest in zip(*(t.split(rows) for t in (logits, *others)), strict=True):
        yield block, wide[: len(block)], *rest


def prepare_batches(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    tokens_per_batch: int | None = None,
    shift: int | None = None,
    measured_on: Callable[[Sequence[Example]], Sequence[Example]] | None = None,
) -> list[Batch]:
    """Plan the batches of a causal or masked LM, in its `exact_layout`.

    Args:
        shift: see `plan_batches`; None: the model's `label_shift`.
        measured_on: the fitted examples -> those of which the layout is; None: these.
    Raises:
        ValueError: as `fitted`, `label_shift` and `plan_batches` do.
    """
    if tokens_per_batch is None:
        tokens_per_batch = tokens_per_batch_of(model)
    examples = fitted(model, examples)
    return plan_batches(
        examples,
        shift=label_shift(model) if shift is None else shift,
        tokens_per_batch=tokens_per_batch,
        **vars(exact_layout(model, measured_on(examples) if measured_on else examples)),
    )


@torch.no_grad()
def target_log_likelihood(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    tokens_per_batch: int | None = None,
    progress: bool = True,
    description: str = "log-likelihood",
) -> tuple[Tensor, Tensor]:
    """Log-likelihood of each example's targets given everything before them.

    Returns:
        sums: float64 [n], log p of the targets in nats, summed over the example's targets.
        counts: int64 [n], targets per example. Both on the CPU, in the order of `examples`.
    """
    from tqdm.auto import tqdm

    model = unwrap(model)
    sums = torch.zeros(len(examples), dtype=torch.float64)
    counts = torch.zeros(len(examples), dtype=torch.int64)
    batches = prepare_batches(model, examples, tokens_per_batch=tokens_per_batch)
    device = input_device(model)
    with (
        evaluation_state(model),
        target_logits(model) as logits_at,
        tqdm(total=len(examples), desc=description, unit="ex", disable=not progress) as bar,
    ):
        losses = []
        for batch in batches:
            moved = batch.to(device)
            losses.append(target_losses(logits_at(moved), moved))
            bar.update(batch.num_examples)
    # Read when all batches are queued: one read after each would leave the device without work.
    for batch, per_token in zip(batches, losses, strict=True):
        members = torch.tensor(batch.example_index)[batch.target_example]
        sums.index_add_(0, members, -per_token.cpu().double())
        counts.index_add_(0, members, torch.ones_like(members))
    return sums, counts
