"""One forward pass of a Hugging Face model over a batch, with logits at the target rows only.

Scoring and evaluation share it. The rows are gathered on the way into the model's own output
embedding, so that whatever the model does to its logits afterwards (Cohere's and Granite's scaling,
Gemma 2's soft-cap) stays in place; computing `hidden @ weight.T` by hand would lose it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, once_differentiable

from fastdean.data.batching import Batch, Layout, default_tokens_per_batch, plan_batches
from fastdean.data.examples import IGNORE_INDEX, Example
from fastdean.models.adapters import base_model, require_no_prompts
from fastdean.models.attention.packed import attention_by_segments
from fastdean.models.calling import (
    call,
    forward_inputs,
    logits_of,
    require_row_per_token,
)
from fastdean.models.experts.fused import chosen_experts, fused_experts
from fastdean.models.hooks import forward_pre_hooks
from fastdean.models.model_state import (
    config_entry,
    evaluation_state,
    input_device,
    input_embedding,
    max_tokens,
    text_config,
    unwrap,
    weight_of,
)
from fastdean.models.probes import (
    numbers_from,
    packing_is_exact,
    padding_is_exact,
    repeats,
    sees_ahead,
    sees_back,
    segments_are_exact,
    undisturbed,
)
from fastdean.models.ranks.shards import is_sharded, rows_at

# What models call the tables that they look positions and token types up in.
_POSITIONS = re.compile(r"^wpe$|^(?!.*(relative|rel_)).*position")
# What configurations call the number of tokens that attention picks, or of blocks and their size.
_PICKED = ("keep_window_size", "index_topk", "indexer_budget")
_PICKED_BLOCKS = ("index_topk_blocks", "index_block_size")
_TABLES = {"position_ids": _POSITIONS, "token_type_ids": re.compile(r"token_type")}


def label_shift(model: nn.Module) -> int:
    """1 for causal language models, 0 for masked ones.

    The class says which of the two the model may be, and a measurement which it is: some classes
    are causal or not by an entry of their configuration.

    Raises:
        ValueError: the model is neither, or not what its class is for; its loss has to come from
            the caller. Or it does not compute the same twice, or puts a learned prompt in front of
            the tokens.
    """
    require_no_prompts(model)
    shifts = _shifts_by_class(model)
    if not shifts:
        raise ValueError(
            f"model must be a causal or masked language model, got {type(model).__name__}; "
            "pass loss_fn= to define its per-example loss"
        )
    inner = base_model(model)
    ahead = sees_ahead(inner)
    if ahead is None:
        return max(shifts)
    if ahead and 1 in shifts and repeats(inner) is False:
        raise ValueError(
            "model must give the same logits for the same tokens, got "
            f"{type(inner).__name__}, which does not compute the same twice; turn off what is "
            "random in eval mode too (such as dropout), or what a forward pass changes in it"
        )
    if ahead and 0 not in shifts:
        raise ValueError(
            "model must be causal to be read as the causal language model of its class, got "
            f"{type(inner).__name__}, whose logits depend on later tokens; set is_decoder=True (or "
            "causal=True) in its configuration, load it as a masked language model, or pass "
            "loss_fn= to define its per-example loss"
        )
    # Of a model that mixes no tokens at all (its attention may be masked out) the class decides.
    if not ahead and 1 not in shifts and sees_back(inner):
        raise ValueError(
            "model must see the tokens on both sides to be read as the masked language model of "
            f"its class, got {type(inner).__name__}, whose logits depend on earlier tokens only; "
            "load it as a causal language model, or pass loss_fn= to define its per-example loss"
        )
    return 0 if ahead or 1 not in shifts else 1


def label_shift_of_class(model: nn.Module) -> int:
    """By how many places the model's own loss moves the labels: by its class alone.

    Raises:
        ValueError: the model is no causal or masked language model.
    """
    shifts = _shifts_by_class(model)
    if not shifts:
        raise ValueError(
            f"model must be a causal or masked language model, got {type(model).__name__}; load it "
            "with its language modelling head"
        )
    return min(shifts)


def _shifts_by_class(model: nn.Module) -> set[int]:
    from transformers.models.auto import modeling_auto as auto

    masked = set(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())
    causal = set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return set()
    for cls in type(base_model(model)).__mro__:
        name = cls.__name__
        shifts = {1} if name in causal else set()
        if name in masked and not getattr(config, "is_decoder", False):
            shifts.add(0)
        if shifts:
            return shifts
    return {1} if getattr(model, "can_generate", lambda: False)() else set()


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


def tokens_per_batch_of(model: nn.Module, device: torch.device | None = None) -> int:
    """How many tokens of this model go through one forward pass by default.

    Args:
        device: where it would compute; None: where it does.
    """
    matrices = ((weight.shape[0], weight.shape[1]) for weight in matrices_of(model))
    head = _head_of(model)
    size = None if head is None else tuple(head.shape)
    device = input_device(model) if device is None else device
    return default_tokens_per_batch(device, (m for m in matrices if m != size), _stacks_of(model))


def _stacks_of(model: nn.Module) -> Iterator[tuple[int, int, int, int]]:
    """Of the stacked weights of experts how many there are, how many a token goes through, and
    outputs and inputs of each."""
    chosen = chosen_experts(text_config(model))
    for module in model.modules():
        fused = fused_experts(module)
        if fused is None:
            continue
        for leaf in fused.weights:
            number, *sizes = weight_of(module, leaf).shape
            outputs, inputs = reversed(sizes) if fused.transposed else sizes
            # Some are given every token, with zeros for those that others were chosen for.
            through = min(chosen or number, number) if fused.routed else number
            yield number, through, outputs, inputs


def matrices_of(model: nn.Module) -> Iterator[Tensor]:
    """The two-dimensional parameters that tokens are multiplied with.

    All but the tables of embeddings, of which one may be the head as well.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    tables.discard(id(_head_of(model)))
    for weight in model.parameters():
        if weight.dim() == 2 and id(weight) not in tables:
            yield weight


def _head_of(model: nn.Module) -> Tensor | None:
    """The weight that makes the logits, as far as the model says."""
    return getattr(getattr(model, "get_output_embeddings", lambda: None)(), "weight", None)


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


def fitted(model: nn.Module, examples: Sequence[Example]) -> list[Example]:
    """The examples with those of their columns that `model` takes, and no others.

    Positions that the model gives its tokens by itself are left out as well.

    Raises:
        ValueError: an example came with an input that the model's forward names and a batch of
            tokens cannot carry; or it has more tokens than the model's table has positions, or
            others than the model knows.
    """
    names = forward_inputs(model)
    tables = {name: _table_size(model, kind) for name, kind in _TABLES.items()}
    numbered: dict[int, bool] = {}
    found = []
    for number, example in enumerate(examples):
        if lost := sorted(example.not_carried & names):
            raise ValueError(
                "loader must give the model inputs of one integer per token, got "
                f"{', '.join(lost)} for example {number}, which {type(model).__name__} takes in "
                "another form; leave them out, or score its batches as they are with loss_fn="
            )
        if example.columns:
            columns = {name: c for name, c in example.columns.items() if name in names}
            _require_known(columns, tables, number)
            example = replace(example, columns=_without_default_positions(model, columns, numbered))
        found.append(replace(example, not_carried=frozenset()))
    _require_tokens(model, found)
    if tables["position_ids"] is not None:
        require_positions(model, found)
    return found


def _require_tokens(model: nn.Module, examples: Sequence[Example]) -> None:
    """Refuse what would fail deep inside the model, or on a GPU without a message."""
    vocabulary = _vocabulary(model)
    for i, example in enumerate(examples):
        targets = example.labels[example.labels != IGNORE_INDEX]
        for key, ids in (("input_ids", example.input_ids), ("labels", targets)):
            outside = ids[(ids < 0) | (ids >= vocabulary)]
            if outside.numel():
                ignored = "" if key == "input_ids" else f" or be {IGNORE_INDEX}"
                raise ValueError(
                    f"{key} must lie in 0..{vocabulary - 1}{ignored}, got {int(outside[0])} in "
                    f"example {i}; use the model's own tokenizer"
                )


def _vocabulary(model: nn.Module) -> int:
    # Some (Perceiver) name a parameter that is no table of tokens.
    weight = getattr(input_embedding(model), "weight", None)
    return text_config(model).vocab_size if weight is None else weight.shape[0]


def require_positions(model: nn.Module, examples: Sequence[Example], first: int = 0) -> None:
    """Raise ValueError for the first example, counted from `first`, longer than the positions."""
    longest = max_tokens(model)
    for i, example in enumerate(examples, start=first):
        if longest is not None and len(example) > longest:
            raise ValueError(
                f"example {i} must have at most {longest} tokens (the model's positions), got "
                f"{len(example)}; cut it with max_length"
            )


def _require_known(
    columns: Mapping[str, Tensor], tables: Mapping[str, int | None], number: int
) -> None:
    """Refuse numbers that the model looks up in a table and that lie outside of it."""
    for name, size in tables.items():
        values = columns.get(name)
        if values is None or size is None:
            continue
        outside = values[(values < 0) | (values >= size)]
        if outside.numel():
            raise ValueError(
                f"{name} must lie in 0..{size - 1}, got {int(outside[0])} in example {number}; "
                "leave them out to have the model's own"
            )


def _table_size(model: nn.Module, kind: re.Pattern[str]) -> int | None:
    """How many rows the model's table of positions or of token types has; None where it has none.

    A table of fewer positions than the model has is another part's: of a tower for images.
    """
    at_least = (max_tokens(model) or 1) if kind is _POSITIONS else 1
    sizes = [
        module.num_embeddings - getattr(module, "offset", 0)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and kind.search(name.rpartition(".")[2])
    ]
    return min((size for size in sizes if size >= at_least), default=None)


def _without_default_positions(
    model: nn.Module, columns: dict[str, Tensor], numbered: dict[int, bool]
) -> dict[str, Tensor]:
    """The columns less positions that the model gives by itself; `numbered` keeps the answers."""
    positions, mask = columns.get("position_ids"), columns.get("attention_mask")
    columns = dict(columns)
    if positions is not None:
        start = int(positions[0])
        # Other starts are not asked about: each answer takes forward passes.
        if start in usual_starts(model):
            consecutive = torch.arange(start, start + len(positions))
            if start not in numbered:
                numbered[start] = numbers_from(model, start)
            if torch.equal(positions, consecutive) and numbered[start]:
                del columns["position_ids"]
    if mask is not None and "position_ids" not in columns and bool(mask.all()):
        del columns["attention_mask"]
    return columns


def usual_starts(model: nn.Module) -> list[int]:
    """From which positions models number their tokens: 0, or behind the padding one (RoBERTa)."""
    padding = getattr(text_config(model), "pad_token_id", None)
    return [0] if padding is None else sorted({0, padding + 1})


def exact_layout(model: nn.Module, examples: Sequence[Example]) -> Layout:
    """How these `fitted` examples may share a batch of this model without changing its numbers."""
    plain = [example for example in examples if not example.columns]
    by_columns: dict[tuple[str, ...], list[Example]] = {}
    for example in examples:
        if example.columns and not example.stands_alone:
            by_columns.setdefault(tuple(sorted(example.columns)), []).append(example)
    with undisturbed(model):
        causal = label_shift(model) == 1
        packed = causal and packing_is_exact(model, plain)
        by_segments = causal and segments_are_exact(model, plain)
        grouped = [*([] if packed else [plain]), *by_columns.values()]
        padded = all(padding_is_exact(model, group) for group in grouped)
    return Layout(
        packed=packed,
        padded=padded,
        alone_above=alone_above(model),
        longest_row=_longest_row(model) if packed or by_segments else None,
        by_segments=by_segments,
    )


def _longest_row(model: nn.Module) -> int | None:
    """Tokens of a row in which no example's numbers depend on the others there, or None.

    Llama 4 scales its queries by their places in the row, from the `floor_scale`th on, whatever
    their positions.
    """
    config = text_config(model)
    scaled_from = getattr(config, "floor_scale", None)
    if not scaled_from or not getattr(config, "attn_temperature_tuning", False):
        scaled_from = math.inf
    picking = _picking_limit(model) or math.inf
    shortest = min(max_tokens(model) or math.inf, scaled_from - 1, picking)
    return None if shortest == math.inf else max(1, int(shortest))


def alone_above(model: nn.Module) -> int | None:
    """The length from which an example's numbers depend on what shares its batch, or None."""
    limits = (_rotary_limit(model), _picking_limit(model))
    return min((limit for limit in limits if limit is not None), default=None)


def _picking_limit(model: nn.Module) -> int | None:
    """The length from which attention sees a few tokens that the model picks, or None.

    In longer rows, padding included, models were seen to pick other tokens of the same example
    (Doge, DeepSeek's sparse attention, whose scores are clipped at zero and so may tie).
    """
    config = text_config(model)
    limits = [config_entry(config, name) for name in _PICKED]
    # Where several tokens are compressed to one before that, so many compressed ones are picked.
    rates = config_entry(config, "compress_rates")
    if isinstance(rates, Mapping) and rates:
        limits = [limit * min(rates.values()) if limit else None for limit in limits]
    picked, size = (config_entry(config, name) for name in _PICKED_BLOCKS)
    if isinstance(picked, int) and isinstance(size, int):
        limits.append(picked * size)
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def _rotary_limit(model: nn.Module) -> int | None:
    """The length from which rotary frequencies depend on the longest example of a batch."""
    config = text_config(model)
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    limits = []
    for rope in (found, *found.values()):
        kind = rope.get("rope_type") or rope.get("type") if isinstance(rope, Mapping) else None
        if kind is not None and ("dynamic" in kind or kind == "longrope"):
            limits += [
                rope.get("original_max_position_embeddings"),
                getattr(config, "original_max_position_embeddings", None),
                getattr(config, "max_position_embeddings", None),
            ]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


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
