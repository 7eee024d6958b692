"""Attention of packed examples, each by itself.

Several examples stand in one row, and each attends to its own tokens only. A mask over the whole
row says so at the price of its square. Here the model's own mask is asked about each example's
square alone, examples of like length go through batched products together, and what lies between
two examples is never computed:

    O_s = softmax(scaling * Q_s K_s^T, where the model's mask allows) V_s     for each example s

The function takes part through transformers' `AttentionInterface` and `AttentionMaskInterface`.
A model that does not go through them, or asks for what is not written here, keeps its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

NAME = "fastdean_segments"

# The weights of a longer example's attention would take more memory than the model's own, which
# keeps none of them for the backward pass.
LONGEST_SEGMENT = 256
# Examples share a product where the shortest has at least this share of the longest's tokens.
_LIKE_LENGTH = 0.75

# What models pass on to any attention function, and what changes nothing here: the mask says it,
# or it asks for outputs and caches that a scoring pass does not have.
_IGNORED = frozenset(
    {
        "attention_mask",
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "dropout",
        "is_causal",
        "layer_idx",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "sliding_window",
        "use_cache",
    }
)


class NotExpressible(RuntimeError):
    """The model asks its attention for something that this one does not do."""


@dataclass(frozen=True)
class Segments:
    """How the rows of a packed batch are cut, once for all layers.

    Attributes:
        bounds: (start, end) of each example; together they are the rows 0..N-1, in order and
            without a gap.
        groups: numbers of the examples that share a product; each example is in one.
    """

    bounds: tuple[tuple[int, int], ...]
    groups: tuple[tuple[int, ...], ...]

    @classmethod
    def cut(cls, segments: Tensor) -> Segments:
        """Group the examples of a batch by length; `segments` is int64 [S, 2] on the CPU."""
        bounds = tuple((start, end) for start, end in segments.tolist())
        starts_where_the_last_ends = [0, *(end for _, end in bounds[:-1])]
        if [start for start, _ in bounds] != starts_where_the_last_ends:
            raise AssertionError(f"packed examples leave a gap: {bounds}")
        return cls(bounds, tuple(_of_like_length([end - start for start, end in bounds])))

    @property
    def rows(self) -> int:
        return self.bounds[-1][1]

    def longest(self, members: Sequence[int]) -> int:
        return max(self.bounds[i][1] - self.bounds[i][0] for i in members)


def _of_like_length(lengths: Sequence[int]) -> Iterator[tuple[int, ...]]:
    left = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while left:
        like = [i for i in left if lengths[i] >= _LIKE_LENGTH * lengths[left[0]]]
        yield tuple(like)
        left = left[len(like) :]


_ANNOUNCED: ContextVar[Segments | None] = ContextVar("fastdean_segments", default=None)


def _announced() -> Segments:
    segments = _ANNOUNCED.get()
    if segments is None:
        raise NotExpressible("a pass outside of the block that says which examples it has")
    return segments


@contextmanager
def attention_by_segments(model: nn.Module, segments: Tensor) -> Iterator[None]:
    """The model's attention is the one of this file inside the block, and its own afterwards.

    Args:
        segments: int64 [S, 2] on the CPU, (start, end) of each example in the packed row that the
            model is called on inside.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, segment_attention)
    AttentionMaskInterface.register(NAME, segment_mask)
    configs = [c for c in _configs(model) if hasattr(c, "_attn_implementation_internal")]
    before = [config._attn_implementation_internal for config in configs]
    announced = _ANNOUNCED.get()
    try:
        _ANNOUNCED.set(Segments.cut(segments))
        for config in configs:
            # Not through the public setter: it sets the vision and audio parts' as well.
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name
        _ANNOUNCED.set(announced)


def _configs(model: nn.Module) -> list[Any]:
    """The configurations that the model's modules read, each once."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in configs if config is not None}.values())


def segment_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """What is added to the scores of each example: `dtype` [S, 1, L, L], 0 where a token may attend
    and -inf elsewhere, L the longest example's tokens.

    The model's mask function is asked by row numbers of the whole batch, so that sliding windows
    and chunks mean what they mean in the model. The places behind an example's end attend as its
    last token does; their results are not read.
    """
    segments = _announced()
    if (batch_size, q_length, kv_length, q_offset, kv_offset) != (1, *2 * (segments.rows,), 0, 0):
        raise NotExpressible("a mask between other tokens than the packed row's own")
    if use_vmap or attention_mask is not None or mask_function is None:
        raise NotExpressible("a mask that is not a function of two positions")
    bounds = torch.tensor(segments.bounds, device=device)
    starts, lengths = bounds[:, :1], bounds[:, 1:] - bounds[:, :1]
    steps = torch.arange(int(segments.longest(range(len(segments.bounds)))), device=device)
    places = starts + steps.minimum(lengths - 1)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    allowed = mask_function(zero, zero, places[:, None, :, None], places[:, None, None, :])
    allowed = allowed & (steps < lengths)[:, None, None, :]
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, -torch.inf)


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of each announced example by itself.

    Args:
        query: [1, H, N, d]; key, value: [1, H_kv, N, d] and [1, H_kv, N, d_v], H a multiple of
            H_kv.
        attention_mask: what `segment_mask` returned.
        scaling: of the products; None: d^-1/2.
        softcap: cap * tanh(scores / cap) takes the scores' place before they are masked.
        s_aux: [H], one more score of each head, which takes part in the softmax alone (sinks).
    Returns:
        [1, N, H, d_v], as transformers' attention functions do, and no weights.
    Raises:
        NotExpressible: the model asks for anything else.
    """
    asked = {name for name, value in kwargs.items() if value is not None and value is not False}
    unknown = sorted(asked - _IGNORED)
    if unknown or kwargs.get("dropout"):
        raise NotExpressible(f"attention with {', '.join(unknown) or 'dropout'}")
    segments = _announced()
    batch, heads, rows, width = query.shape
    kv_heads = key.shape[1]
    mask_shape = (len(segments.bounds), 1, *2 * (segments.longest(range(len(segments.bounds))),))
    if (
        attention_mask is None
        or attention_mask.shape != mask_shape
        or (batch, rows) != (1, segments.rows)
        or key.shape[2] != rows
        or heads % kv_heads
    ):
        raise NotExpressible("attention between other tokens than the packed row's own")
    scaling = width**-0.5 if scaling is None else scaling
    # The query heads of one key head stand as further rows of its product: [H_kv, N, H/H_kv, d].
    q_parts = _Cut.apply(query[0].unflatten(0, (kv_heads, -1)).transpose(1, 2), segments)
    k_parts = _Cut.apply(key[0], segments)
    v_parts = _Cut.apply(value[0], segments)
    sinks = None if s_aux is None else s_aux.view(kv_heads, 1, 1, -1, 1)
    attended = []
    for members, q, k, v in zip(segments.groups, q_parts, k_parts, v_parts, strict=True):
        longest = q.shape[2]
        mask = attention_mask[list(members), 0, :longest, :longest]
        attended.append(_attend(q, k, v, mask, scaling, softcap, sinks))
    return _Joined.apply(segments, *attended).flatten(1, 2).unsqueeze(0), None


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Examples of one group: q [A, G, L, g, d], k [A, G, L, d], v [A, G, L, d_v], mask [G, L, L].

    Returns [A, G, L, g, d_v]. The softmax of bf16 and fp16 is taken in fp32, as in the models' own.
    """
    shape = (*q.shape[:-1], k.shape[2])
    scores = torch.baddbmm(
        q.new_zeros(1, 1, 1),
        q.flatten(2, 3).flatten(0, 1),
        k.flatten(0, 1).transpose(1, 2),
        beta=0,
        alpha=scaling,
    ).view(shape)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + mask[:, :, None, :]
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).expand(*shape[:-1], 1)], dim=-1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide).to(v.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    attended = weights.flatten(2, 3).flatten(0, 1) @ v.flatten(0, 1)
    return attended.view(*shape[:-1], v.shape[-1])


class _Cut(torch.autograd.Function):
    """[A, N, ...] -> for each group [A, G, L, ...], zero behind an example's end."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, segments: Segments) -> tuple[Tensor, ...]:
        ctx.segments = segments
        return _cut(x, segments)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        return _join(grads, ctx.segments), None


class _Joined(torch.autograd.Function):
    """For each group [A, G, L, g, d] -> [N, A, g, d]; the inverse of a cut."""

    @staticmethod
    def forward(ctx: FunctionCtx, segments: Segments, *parts: Tensor) -> Tensor:
        ctx.segments = segments
        return _join(parts, segments).transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[None, *tuple[Tensor, ...]]:
        return None, *_cut(grad.transpose(0, 1), ctx.segments)


def _cut(x: Tensor, segments: Segments) -> tuple[Tensor, ...]:
    parts = []
    for members in segments.groups:
        longest = segments.longest(members)
        part = x.new_empty(x.shape[0], len(members), longest, *x.shape[2:])
        for place, member in enumerate(members):
            start, end = segments.bounds[member]
            part[:, place, : end - start] = x[:, start:end]
            part[:, place, end - start :] = 0
        parts.append(part)
    return tuple(parts)


def _join(parts: Sequence[Tensor], segments: Segments) -> Tensor:
    """[A, N, ...], lying in memory as [N, A, ...]."""
    like = parts[0]
    x = like.new_empty(segments.rows, like.shape[0], *like.shape[3:]).transpose(0, 1)
    for members, part in zip(segments.groups, parts, strict=True):
        for place, member in enumerate(members):
            start, end = segments.bounds[member]
            x[:, start:end] = part[:, place, : end - start]
    return x
