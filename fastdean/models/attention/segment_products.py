"""softmax(Q K^T) V of every packed example by itself, through batched products.

    O_s = softmax(scaling * Q_s K_s^T + mask_s) V_s     for each example s

Examples of like length share a product. Their rows are gathered into it, and the results gathered
back, by one lookup each. Nothing of the size of the attention weights is kept for the backward
pass, which computes them again: with P = softmax(S), S = scaling * Q K^T + mask,

    dV = P^T dO              dP = dO V^T             dS = P * (dP - sum_k P dP)
    dQ = scaling * dS K      dK = scaling * dS^T Q

Products and softmax are in fp32 for bf16 and fp16, as fused attention has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from fastdean.data.batching import send
from fastdean.models.attention.segment_masks import SegmentMask

# Examples share a product where the shortest has at least this share of the longest's tokens.
_LIKE_LENGTH = 0.75
# Masks of a batch that are looked up once for all layers. Models have one for each kind of layer; a
# model that makes one for every layer shares none.
_SHARED_MASKS = 4


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
    _lookups: dict[tuple[int | str, ...], Lookup] = field(default_factory=dict, compare=False)
    _scratch: dict[str, Tensor] = field(default_factory=dict, compare=False)
    _offsets: dict[torch.device, Tensor] = field(default_factory=dict, compare=False)
    _masks: list[SegmentMask] = field(default_factory=list, compare=False)

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

    def longest(self, members: Sequence[int] | None = None) -> int:
        members = range(len(self.bounds)) if members is None else members
        return max(self.bounds[i][1] - self.bounds[i][0] for i in members)

    def lookup(
        self, heads: int, shared_by: int, strides: tuple[int, int], device: torch.device
    ) -> Lookup:
        """Where the rows of `heads` heads stand, `shared_by` of them side by side.

        Args:
            strides: of a token and of a head, in rows.
        """
        key = (heads, shared_by, *strides, str(device))
        if key not in self._lookups:
            self._lookups[key] = Lookup.of(self, heads, shared_by, strides).to(device)
        return self._lookups[key]

    def offsets(self, device: torch.device) -> Tensor:
        """int32 [S + 1] on `device`: where each example starts, and N."""
        if device not in self._offsets:
            offsets = torch.tensor([0, *(end for _, end in self.bounds)], dtype=torch.int32)
            self._offsets[device] = send(offsets, device)
        return self._offsets[device]

    def mask(self, values: Tensor) -> SegmentMask:
        """What this mask [S, 1, L, L] says; the same object for every layer that gets it."""
        found = next((mask for mask in self._masks if mask.is_of(values)), None)
        if found is None:
            shared = len(self._masks) < _SHARED_MASKS
            found = SegmentMask(values, [e - s for s, e in self.bounds], shared=shared)
            if shared:
                self._masks.append(found)
        return found

    def scratch(self, name: str, like: Tensor, shape: Sequence[int]) -> Tensor:
        """Memory for what no layer needs after its own pass; the last one's under this name."""
        size = 1
        for n in shape:
            size *= n
        kept = self._scratch.get(name)
        of_like = like.dtype, like.device
        if kept is None or (kept.dtype, kept.device) != of_like or kept.numel() < size:
            kept = self._scratch[name] = like.new_empty(size)
        return kept[:size].view(*shape)


def _of_like_length(lengths: Sequence[int]) -> Iterator[tuple[int, ...]]:
    left = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while left:
        like = [i for i in left if lengths[i] >= _LIKE_LENGTH * lengths[left[0]]]
        yield tuple(like)
        left = left[len(like) :]


@dataclass(frozen=True)
class Lookup:
    """Between the rows of a batch, one for each token and head, and the rows of its products.

    A product's rows are ordered by example, by group of heads that share a key, by token, by head
    of the group. Examples shorter than the longest of their product end with copies of their last
    row.

    Attributes:
        rows: int64 [P], for each row of all products the batch's.
        places: int64 [N * heads], for each row of the batch, by token and head, the products'.
        copies: int64, those rows of the products that are copies.
    """

    rows: Tensor
    places: Tensor
    copies: Tensor

    @classmethod
    def of(cls, segments: Segments, heads: int, shared_by: int, strides: tuple[int, int]) -> Lookup:
        head = torch.arange(heads).view(1, heads // shared_by, 1, shared_by)
        tokens, insides = [], []
        for members in segments.groups:
            bounds = torch.tensor([segments.bounds[i] for i in members]).view(-1, 2, 1, 1, 1)
            start, length = bounds[:, 0], bounds[:, 1] - bounds[:, 0]
            step = torch.arange(segments.longest(members)).view(1, 1, -1, 1)
            shape = (len(members), heads // shared_by, step.numel(), shared_by)
            token = start + step.minimum(length - 1)
            tokens.append(torch.stack([token.expand(shape), head.expand(shape)]).flatten(1))
            insides.append((step < length).expand(shape).flatten())
        token, head = torch.cat(tokens, dim=1)
        inside = torch.cat(insides)
        places = torch.empty(segments.rows * heads, dtype=torch.int64)
        places[(token * heads + head)[inside]] = inside.nonzero().squeeze(1)
        by_token, by_head = strides
        return cls(token * by_token + head * by_head, places, (~inside).nonzero().squeeze(1))

    def to(self, device: torch.device) -> Lookup:
        return Lookup(*(send(part, device) for part in (self.rows, self.places, self.copies)))


class _Kept(FunctionCtx):
    """What the forward pass leaves to the backward pass."""

    saved_tensors: tuple[Tensor, ...]
    rest: tuple[SegmentMask, Segments, float, float | None]


class SegmentAttention(torch.autograd.Function):
    """q [1, H, N, d], k [1, H_kv, N, d], v [1, H_kv, N, d_v] -> [1, N, H, d_v].

    The other arguments are those of `attention.segment_attention`.
    """

    @staticmethod
    def forward(
        ctx: _Kept,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        mask: SegmentMask,
        segments: Segments,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        layer = _Layer(segments, q, k, v, sinks, mask, scaling, softcap)
        rows = layer.scratch("o", (len(layer.of_q.rows), v.shape[-1]))
        for group in layer.groups():
            torch.bmm(group.weights()[0], group.v, out=group.q_like(rows))
        # torch takes None too, which its annotation leaves out.
        ctx.save_for_backward(q, k, v, sinks)  # type: ignore[arg-type]
        ctx.rest = mask, segments, scaling, softcap
        attended = rows.index_select(0, layer.of_q.places).to(v.dtype)
        return attended.view(1, q.shape[2], q.shape[1], v.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: _Kept, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks = ctx.saved_tensors
        mask, segments, scaling, softcap = ctx.rest
        layer = _Layer(segments, q, k, v, sinks, mask, scaling, softcap)
        grad_rows = layer.gathered("do", grad.transpose(1, 2), layer.shared_by)
        # What the last row's copies would add is not asked for.
        grad_rows.index_fill_(0, layer.of_q.copies, 0)
        dq, dk, dv = (
            layer.scratch(name, (len(lookup.rows), x.shape[-1]))
            for name, lookup, x in (
                ("dq", layer.of_q, q),
                ("dk", layer.of_k, k),
                ("dv", layer.of_k, v),
            )
        )
        grad_sinks = None if sinks is None else torch.zeros_like(sinks, dtype=layer.dtype)
        for group in layer.groups():
            weights, sink_weights = group.weights()
            d_o = group.q_like(grad_rows)
            torch.bmm(weights.transpose(1, 2), d_o, out=group.k_like(dv))
            d_s = torch.bmm(d_o, group.v.transpose(1, 2), out=group.scratch("dp"))
            share = torch.mul(weights, d_s, out=group.scratch("share")).sum(-1, keepdim=True)
            d_s.sub_(share).mul_(weights)
            if grad_sinks is not None and sink_weights is not None:
                by_head = (sink_weights * share).view(*group.shape[:4]).sum((0, 2))
                grad_sinks -= by_head.view(sinks.shape)
            slope = group.slope_of_softcap()
            if slope is not None:
                d_s.mul_(slope)
            for out, factor, of in (
                (group.q_like(dq), d_s, group.k),
                (group.k_like(dk), d_s.transpose(1, 2), group.q),
            ):
                torch.baddbmm(out, factor, of, beta=0, alpha=layer.scaling, out=out)
        wanted = zip((dq, dk, dv), (layer.of_q, layer.of_k, layer.of_k), (q, k, v), strict=True)
        found = [
            rows.index_select(0, lookup.places)
            .to(x.dtype)
            .view(1, x.shape[2], x.shape[1], x.shape[3])
            .transpose(1, 2)
            for rows, lookup, x in wanted
        ]
        return *found, None if grad_sinks is None else grad_sinks.to(sinks.dtype), *[None] * 4


class _Layer:
    """One call of the attention: its inputs as rows of products."""

    def __init__(
        self,
        segments: Segments,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        mask: SegmentMask,
        scaling: float,
        softcap: float | None,
    ) -> None:
        self.segments = segments
        self.mask, self.sinks = mask, sinks
        self.scaling, self.softcap = scaling, softcap
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self._like = q.new_empty(0, dtype=self.dtype)
        self.kv_heads, self.shared_by = k.shape[1], q.shape[1] // k.shape[1]
        self.of_q = self._lookup(q.shape[1], self.shared_by, (q.shape[1], 1), q.device)
        self.of_k = self._lookup(k.shape[1], 1, (k.shape[1], 1), k.device)
        self.q = self.gathered("q", q, self.shared_by)
        self.k, self.v = self.gathered("k", k, 1), self.gathered("v", v, 1)

    def _lookup(
        self, heads: int, shared_by: int, strides: tuple[int, int], device: torch.device
    ) -> Lookup:
        return self.segments.lookup(heads, shared_by, strides, device)

    def scratch(self, name: str, shape: Sequence[int]) -> Tensor:
        return self.segments.scratch(name, self._like, shape)

    def gathered(self, name: str, x: Tensor, shared_by: int) -> Tensor:
        """The rows [P, d] of the products, of x [1, A, N, d] in any layout."""
        rows, strides = _as_rows(x)
        lookup = self._lookup(x.shape[1], shared_by, strides, x.device)
        out = self.scratch(name, (len(lookup.rows), x.shape[-1]))
        if rows.dtype == out.dtype:
            return torch.index_select(rows, 0, lookup.rows, out=out)
        return out.copy_(rows.index_select(0, lookup.rows))

    def groups(self) -> Iterator[_Group]:
        first = 0
        for members in self.segments.groups:
            yield _Group(self, members, first)
            first += len(members) * self.kv_heads * self.segments.longest(members)


def _as_rows(x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """x [1, A, N, d] as rows of d, and by how many of them tokens and heads lie apart."""
    width = x.shape[-1]
    by_head, by_token = x.stride(1), x.stride(2)
    if x.stride(3) != 1 or by_head % width or by_token % width or min(by_head, by_token) <= 0:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
        by_head, by_token = x.stride(1), x.stride(2)
    by_head, by_token = by_head // width, by_token // width
    number = (x.shape[1] - 1) * by_head + (x.shape[2] - 1) * by_token + 1
    return x.as_strided((number, width), (width, 1)), (by_token, by_head)


class _Group:
    """The examples that share a product: [B, R, L] with B = examples x key heads, R = L x g."""

    def __init__(self, layer: _Layer, members: tuple[int, ...], first: int) -> None:
        self._layer = layer
        longest = layer.segments.longest(members)
        self._batch, self._longest = len(members) * layer.kv_heads, longest
        self._first = first
        self.shape = (len(members), layer.kv_heads, longest, layer.shared_by, longest)
        self.q, self.k, self.v = self.q_like(layer.q), self.k_like(layer.k), self.k_like(layer.v)
        self._mask = layer.mask.part(members).unsqueeze(3)
        self._tanh: Tensor | None = None

    def k_like(self, rows: Tensor) -> Tensor:
        return self._rows(rows, 1)

    def q_like(self, rows: Tensor) -> Tensor:
        return self._rows(rows, self._layer.shared_by)

    def _rows(self, rows: Tensor, shared_by: int) -> Tensor:
        number = self._batch * self._longest * shared_by
        first = self._first * shared_by
        return rows[first : first + number].view(self._batch, self._longest * shared_by, -1)

    def scratch(self, name: str, further: int = 0) -> Tensor:
        longest = self._longest
        shape = (self._batch, longest * self._layer.shared_by, longest + further)
        return self._layer.scratch(name, shape)

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """P [B, R, L], and the share of the sinks [B, R, 1], or None."""
        layer = self._layer
        sinks = layer.sinks
        scores = self.scratch("scores", 0 if sinks is None else 1)
        own = scores if sinks is None else scores[..., :-1]
        torch.baddbmm(own, self.q, self.k.transpose(1, 2), beta=0, alpha=layer.scaling, out=own)
        if layer.softcap is not None:
            self._tanh = own.div_(layer.softcap).tanh_().clone()
            own.mul_(layer.softcap)
        own.unflatten(1, self.shape[2:4]).unflatten(0, self.shape[:2]).add_(self._mask)
        if sinks is not None:
            by_head = sinks.to(layer.dtype).view(1, layer.kv_heads, 1, layer.shared_by, 1)
            scores[..., -1:].view(*self.shape[:4], 1).copy_(by_head.expand(*self.shape[:4], 1))
        weights = self.scratch("weights", 0 if sinks is None else 1)
        torch.softmax(scores, -1, out=weights)
        return (weights, None) if sinks is None else (weights[..., :-1], weights[..., -1:])

    def slope_of_softcap(self) -> Tensor | None:
        """d(cap tanh(s / cap)) / ds, after `weights`."""
        return None if self._tanh is None else 1 - self._tanh.square()
