"""One forward pass of a Hugging Face model over a batch, with logits at the target rows only.

Scoring and evaluation share it. The rows are gathered on the way into the model's own output
embedding, so that whatever the model does to its logits afterwards (Cohere's and Granite's scaling,
Gemma 2's soft-cap) stays in place; computing `hidden @ weight.T` by hand would lose it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from fastdean.adapters import require_no_prompts
from fastdean.batching import Batch, Layout, default_tokens_per_batch, plan_batches
from fastdean.data import Example
from fastdean.hooks import forward_pre_hooks
from fastdean.model_state import evaluation_state, input_device, unwrap

_PROBE_TOKENS = 12
_PROBED: WeakKeyDictionary[nn.Module, dict[tuple, bool]] = WeakKeyDictionary()


def label_shift(model: nn.Module) -> int:
    """1 for causal language models, 0 for masked ones.

    Raises:
        ValueError: the model is neither; its loss has to come from the caller. Or it puts a learned
            prompt in front of the tokens.
    """
    require_no_prompts(model)
    from transformers.models.auto import modeling_auto as auto

    masked = set(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())
    causal = set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        for name in _class_names(model):
            if name in causal:
                return 1
            if name in masked and not getattr(config, "is_decoder", False):
                return 0
        if getattr(model, "can_generate", lambda: False)():
            return 1
    raise ValueError(
        f"model must be a causal or masked language model, got {type(model).__name__}; "
        "pass loss_fn= to define its per-example loss"
    )


def _class_names(model: nn.Module) -> list[str]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return [cls.__name__ for cls in type(inner).__mro__]


class TargetLogits:
    """Callable inside a `with` block: `batch -> logits [M, V]` at the batch's target rows.

    Example:
        with TargetLogits(model) as head:
            logits = head(batch)
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # An object of its own, so that the hook does not keep this one, which undoes it, alive.
        self._gathering = _Gathering()
        self._hooked: AbstractContextManager | None = None

    def __enter__(self) -> Self:
        head = self._model.get_output_embeddings()
        hooks = {} if head is None else {head: self._gathering.gather}
        self._hooked = forward_pre_hooks(hooks)
        self._hooked.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        hooked, self._hooked = self._hooked, None
        hooked.__exit__(*exc_info)

    def __call__(self, batch: Batch) -> Tensor:
        self._gathering.rows = batch.target_rows
        try:
            logits = self._model(**batch.model_inputs()).logits.flatten(0, -2)
        finally:
            gathered, self._gathering.rows = self._gathering.rows is None, None
        # A model that never calls its output embedding as a module returns every row.
        return logits if gathered else logits.index_select(0, batch.target_rows.to(logits.device))


class _Gathering:
    """Takes `rows` of what the next call of the output embedding would see."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None

    def gather(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        if self.rows is None or not args:
            return None
        rows, self.rows = self.rows, None
        hidden = args[0].flatten(0, -2)
        gathered = hidden.index_select(0, rows.to(hidden.device)).unsqueeze(0)
        return (gathered, *args[1:]), kwargs


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
    def forward(ctx: FunctionCtx, logits: Tensor, targets: Tensor) -> Tensor:
        targets = targets.unsqueeze(1)
        highest = logits.amax(1, keepdim=True).float()
        log_sum = torch.empty_like(highest)
        for block, m, s in _row_blocks(logits, highest, log_sum):
            torch.sum((block.float() - m).exp_(), 1, keepdim=True, out=s)
        log_sum.log_()
        ctx.save_for_backward(logits, targets, highest, log_sum)
        return (highest - logits.gather(1, targets).float() + log_sum).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        logits, *by_row = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        blocks = _row_blocks(logits, *by_row, grad.unsqueeze(1), grad_logits)
        for block, target, m, s, g, out in blocks:
            probability = (block.float() - m).sub_(s).exp_()
            probability.scatter_(1, target, probability.gather(1, target) - 1)
            out.copy_(probability.mul_(g))
        return grad_logits, None


def _row_blocks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the tensors' rows, as many at a time as one block of fp32 logits may hold."""
    # On a CPU a block stays in the cache between its operations; elsewhere launches must be few.
    block_bytes = (4 if logits.device.type == "cpu" else 64) * 1024 * 1024
    rows = max(1, block_bytes // (4 * logits.shape[1]))
    return zip(*(tensor.split(rows) for tensor in (logits, *others)), strict=True)


def prepare_batches(
    model: nn.Module, examples: Sequence[Example], *, tokens_per_batch: int | None = None
) -> list[Batch]:
    """Plan the batches of a causal or masked LM, in its `exact_layout`."""
    if tokens_per_batch is None:
        tokens_per_batch = default_tokens_per_batch(input_device(model))
    return plan_batches(
        examples,
        shift=label_shift(model),
        tokens_per_batch=tokens_per_batch,
        **vars(exact_layout(model, examples)),
    )


def exact_layout(model: nn.Module, examples: Sequence[Example]) -> Layout:
    """How examples may share a batch of this model without changing its numbers."""
    packed = packing_is_exact(model, examples)
    return Layout(
        packed=packed,
        padded=packed or padding_is_exact(model, examples),
        alone_above=_rotary_limit(model),
    )


def packing_is_exact(model: nn.Module, examples: Sequence[Example]) -> bool:
    """Whether restarting `position_ids` keeps packed examples apart in this model.

    Measured on the first two examples rather than looked up by model family: (1) changing one
    packed example must not move the other's logits at all, in either direction; (2) a packed
    example's logits must be those it has alone. State-space and bidirectional models fail the
    first, models that ignore `position_ids` the second. Measured once per model, dtype and
    attention implementation: the answer lies in the model's code, not in its weights. False,
    unmeasured, for masked models and for a single example, which has nothing to be packed with.
    """
    if label_shift(model) == 0 or len(examples) < 2:
        return False
    return _measured_once(_measure_packing, model, examples)


@torch.no_grad()
def _measure_packing(model: nn.Module, examples: Sequence[Example], device: torch.device) -> bool:
    a, b = (example.input_ids[:_PROBE_TOKENS] for example in examples[:2])
    with evaluation_state(model):
        try:
            ab = _packed_logits(model, [a, b], device)
            changed_a = _packed_logits(model, [_another(a), b], device)
            changed_b = _packed_logits(model, [a, _another(b)], device)
            alone = _packed_logits(model, [b], device)
        except (TypeError, ValueError):  # the model takes no position_ids
            return False
    epsilon = torch.finfo(next(model.parameters()).dtype).eps
    return (
        _distance(changed_a[len(a) :], ab[len(a) :]) <= epsilon / 4
        and _distance(changed_b[: len(a)], ab[: len(a)]) <= epsilon / 4
        and _distance(alone, ab[len(a) :]) <= max(1e-4, 6 * epsilon)
    )


def padding_is_exact(model: nn.Module, examples: Sequence[Example]) -> bool:
    """Whether padding on the right under an `attention_mask` leaves an example's logits alone.

    Measured on the first two examples, like packing: models that mix tokens outside of attention
    (Fourier transforms, convolutions) see the padding. True, unmeasured, for a single example.
    """
    if len(examples) < 2:
        return True
    return _measured_once(_measure_padding, model, examples)


@torch.no_grad()
def _measure_padding(model: nn.Module, examples: Sequence[Example], device: torch.device) -> bool:
    longer, shorter = sorted((e.input_ids[:_PROBE_TOKENS] for e in examples[:2]), key=len)[::-1]
    shorter = shorter[: max(1, len(longer) // 2)]
    ids = torch.zeros(2, len(longer), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, part in enumerate((longer, shorter)):
        ids[row, : len(part)] = part
        mask[row, : len(part)] = 1
    with evaluation_state(model):
        alone = model(input_ids=shorter.unsqueeze(0).to(device)).logits[0].double()
        padded = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[1].double()
    epsilon = torch.finfo(next(model.parameters()).dtype).eps
    return _distance(padded[: len(shorter)], alone) <= max(1e-4, 6 * epsilon)


def _measured_once(
    measure: Callable[[nn.Module, Sequence[Example], torch.device], bool],
    model: nn.Module,
    examples: Sequence[Example],
) -> bool:
    """The answer of `measure`, kept per model, dtype, device and attention implementation."""
    device = input_device(model)
    attention = getattr(model.config, "_attn_implementation", None)
    key = (measure.__name__, next(model.parameters()).dtype, device.type, attention)
    answers = _PROBED.setdefault(model, {})
    if key not in answers:
        answers[key] = measure(model, examples, device)
    return answers[key]


def _rotary_limit(model: nn.Module) -> int | None:
    """The length from which rotary frequencies depend on the longest example of a batch."""
    config = model.config.get_text_config()
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    limits = []
    for rope in (found, *found.values()):
        if isinstance(rope, Mapping) and rope.get("rope_type") in ("longrope", "dynamic"):
            limits.append(
                rope.get("original_max_position_embeddings")
                or getattr(config, "original_max_position_embeddings", None)
                or config.max_position_embeddings
            )
    return min(limits, default=None)


def _another(ids: Tensor) -> Tensor:
    flipped = ids.flip(0)
    return flipped if not torch.equal(flipped, ids) else (ids - 1).abs()


def _packed_logits(model: nn.Module, parts: Sequence[Tensor], device: torch.device) -> Tensor:
    ids = torch.cat(list(parts)).unsqueeze(0).to(device)
    positions = torch.cat([torch.arange(part.numel()) for part in parts]).unsqueeze(0).to(device)
    return model(input_ids=ids, position_ids=positions).logits[0].double()


def _distance(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm().clamp_min(1e-30))


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
        TargetLogits(model) as head,
        tqdm(total=len(examples), desc=description, unit="ex", disable=not progress) as bar,
    ):
        losses = []
        for batch in batches:
            moved = batch.to(device)
            losses.append(target_losses(head(moved), moved))
            bar.update(batch.num_examples)
    # Read when all batches are queued: one read after each would leave the device without work.
    for batch, per_token in zip(batches, losses, strict=True):
        members = torch.tensor(batch.example_index)[batch.target_example]
        sums.index_add_(0, members, -per_token.cpu().double())
        counts.index_add_(0, members, torch.ones_like(members))
    return sums, counts
