"""The hooks of `score()`: every target's input paired with the gradient of its output.

Modules of fused experts have no hook that sees their products; they run through
`fastdean.models.experts.products` meanwhile, which hands them over.

`Sums` adds the pairs up; the trial (trial.py) compares them with autograd's gradients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastdean.coupling.sums.accumulators import Accumulator, ExpertAccumulator
from fastdean.coupling.targets.target import Target
from fastdean.coupling.workloads.workload import BatchLosses
from fastdean.models.experts.products import Compare, Listener, Routing, Stand, listening_to_experts
from fastdean.models.hooks import forward_hooks, forward_pre_hooks
from fastdean.precision import product_epsilon
from fastdean.wording.mendable import StateError

# A target, its input [N, C] and the gradient [N, R] of its product; of experts [S, C] and [S, R],
# with whose these rows are.
Receiver = Callable[[Target, Tensor, Tensor, Routing | None], None]

# Of the norm of what experts return, how far their own implementation may be from what runs here:
# rounding in another order.
_ROUNDING = 8


@contextmanager
def capturing(
    targets: Sequence[Target],
    granularity: str,
    receive: Receiver,
    *,
    again: bool = False,
    compare: Compare | None = None,
    stand: Stand | None = None,
) -> Iterator[None]:
    """Inside, hooks pair every target's input with the gradient of its own product.

    A forward hook of the user may return something else than the product, and the model goes on
    with that; the pair stays that of the product, which is what the weight made.

    The graph starts at the lowest targets: where nothing below a target carries a gradient, its
    hook begins one, so that no backward pass goes deeper than the targets need.

    Args:
        receive: called with the target, its input [..., C] and the gradient [..., R], during the
            backward pass.
        again: keep the inputs for further backward passes over the same graph.
        compare: told what experts compute here, and what their own implementation computes.
        stand: asked for what stands for the matrix of an expert in its product.
    """
    experts = _listeners([t for t in targets if t.stacked], receive, again)
    hook, attached = (
        (_weight_hook, forward_hooks)
        if granularity == "weight"
        else (_unit_hook, forward_pre_hooks)
    )
    hooks = {t.module: hook(t, receive, again) for t in targets if not t.stacked}
    with attached(hooks), listening_to_experts(experts, compare, stand):
        yield


def _listeners(
    targets: Sequence[Target], receive: Receiver, again: bool
) -> dict[nn.Module, Listener]:
    """A listener for each module, whose weights need not all be targets."""
    by_module: dict[nn.Module, dict[str, Target]] = {}
    for target in targets:
        by_module.setdefault(target.module, {})[target.leaf] = target

    def of_module(wanted: dict[str, Target]) -> Listener:
        def listener(leaf: str, x: Tensor, product: Tensor, routing: Routing) -> Tensor:
            if leaf not in wanted:
                return product
            if not product.requires_grad:
                product = product.detach().requires_grad_(True).clone()
            if product.requires_grad:
                _listen(wanted[leaf], x.detach(), product, receive, again, routing)
            return product

        return listener

    return {module: of_module(wanted) for module, wanted in by_module.items()}


def require_same_experts(module: nn.Module, ours: Tensor, own: Tensor) -> None:
    """Refuse experts that compute something else than their structure says."""
    allowed = max(_ROUNDING * product_epsilon(own.device, own.dtype), 1e-4) * own.float().norm()
    same = ours.shape == own.shape and (ours.float() - own.float()).norm() <= allowed
    # What is not finite is for the loss to say.
    if not same and bool(own.isfinite().all()):
        raise StateError(
            f"{type(module).__name__} must compute act(x W_up) W_down of each expert, weighted by "
            "its router, got something else; leave it out of target_modules"
        )


def _weight_hook(target: Target, receive: Receiver, again: bool) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        if not isinstance(output, Tensor):
            raise StateError(
                f"{target.name} must return a tensor, got {type(output).__name__}; leave it out of "
                "target_modules"
            )
        x = (args[0] if args else _only(kwargs)).detach()
        if not output.requires_grad:
            # A clone, because a leaf that requires grad must not be changed in place later.
            output = output.detach().requires_grad_(True).clone()
        if not output.requires_grad:
            return output
        product = _unviewed(output)
        _listen(target, x, product, receive, again)
        # Whoever comes later puts hooks of his own on another tensor, whose gradient is passed on
        # to the product only once they are through with it.
        return output.view_as(output) if product is output else output

    return hook


def _unit_hook(target: Target, receive: Receiver, again: bool) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        a = args[0] if args else _only(kwargs)
        if not a.requires_grad:
            a = a.detach().requires_grad_(True)
        if a.requires_grad:
            _listen(target, a.detach(), a, receive, again, axis=target.input_axis)
        return (a, *args[1:]), {} if not args else kwargs

    return hook


def _listen(
    target: Target,
    x: Tensor,
    differentiated: Tensor,
    receive: Receiver,
    again: bool,
    routing: Routing | None = None,
    axis: int | None = None,
) -> None:
    """Call `receive` with x and the gradient, in the backward pass.

    Args:
        axis: that of the weight which the gradient goes along; None: that of its outputs.
    """
    axis = target.output_axis if axis is None else axis
    # Autograd keeps no copy of x for a frozen weight, and so would not notice a change to it.
    version = x._version
    # Let go of x as soon as its gradient is there: the graph, and this closure with it, lives on
    # until the end of the batch.
    held = [x]
    del x

    def deliver(g: Tensor) -> None:
        x = held[0] if again else held.pop()
        if x._version != version:
            raise StateError(
                f"{target.name} must have an input that stays as it was until the backward pass, "
                "got one that was changed in place; leave it out of target_modules"
            )
        if target.block is not None:
            # The others of the team have theirs.
            x = target.block.features(x, target.input_axis)
            g = target.block.features(g, axis)
        if g.numel() * x.shape[-1] == x.numel() * g.shape[-1]:
            # The product behind a view is [B x T, R] where the input is [B, T, C].
            g = g.reshape(*x.shape[:-1], g.shape[-1])
        # Under autocast a layer computes with its input cast to the dtype of its output; where a
        # model is spread over devices it may fetch its input itself.
        x = x.to(g)
        if routing is None:
            receive(target, x, g, None)
        else:
            receive(target, *routing.chosen(x, g))

    differentiated.register_hook(deliver)


class Sums:
    """Adds the pairs of one batch after the other to the accumulators of their targets.

    Args:
        sequence_first: parameters of the targets that see [T, B, ...] where the batch is [B, T].
    """

    def __init__(
        self, accumulators: Mapping[str, Accumulator], sequence_first: Collection[str] = ()
    ) -> None:
        self.accumulators = accumulators
        self.segments = torch.empty((0, 2), dtype=torch.int64, device="cpu")
        self._sequence_first = sequence_first
        self._rows = 0
        # Whether the batch has not been counted before.
        self._counts_tokens = True
        self._times: Counter[str] = Counter()

    def backward(self, batch: BatchLosses) -> None:
        """Run the backward pass of a batch, in which the hooks deliver its pairs.

        Raises:
            RuntimeError: a target did not deliver exactly one.
        """
        self.expect(batch.segments, batch.rows)
        loss = self.loss(batch)
        if loss.requires_grad:
            loss.backward()
        self.require_complete()

    def expect(self, segments: Tensor, rows: int) -> None:
        """Say where the examples lie in what the hooks deliver next (`BatchLosses`)."""
        self.segments, self._rows, self._times = segments, rows, Counter()

    def require_complete(self) -> None:
        """Raise RuntimeError unless every target has delivered exactly one pair since."""
        for key in self.accumulators:
            if self._times[key] != 1:
                # Of stacked weights the key is the name.
                name = key.removesuffix(".weight")
                raise StateError(wrong_times_message(name, self._times[key]))

    def loss(self, batch: BatchLosses) -> Tensor:
        """What is differentiated: the sum of the examples' losses."""
        return batch.values.sum()

    def receive(self, target: Target, x: Tensor, g: Tensor, routing: Routing | None = None) -> None:
        """Take a pair of the batch from a hook."""
        if routing is not None:
            if routing.total != self._rows:
                raise StateError(wrong_rows_message(target, self._rows, routing.total))
            self._times[target.key] += 1
            self.add_routed(target, x, g, routing)
            return
        if target.parameter in self._sequence_first:
            x, g = (batch_first(rows, len(self.segments)) for rows in (x, g))
        segments = segments_in(x, self.segments, self._rows)
        x, g = x.flatten(0, -2), g.flatten(0, -2)
        if segments is None:
            raise StateError(wrong_rows_message(target, self._rows, x.shape[0]))
        self._times[target.key] += 1
        self.add(target, x, g, segments)

    def add(self, target: Target, x: Tensor, g: Tensor, segments: Tensor) -> None:
        """Add rows x [N, C] and g [N, R], of which `segments` says whose they are."""
        self.accumulators[target.key].add_(x, g, segments)

    def add_routed(self, target: Target, x: Tensor, g: Tensor, routing: Routing) -> None:
        """Add rows of experts, x [S, C] and g [S, R]."""
        if target.part is not None:
            first, end = target.part
            kept = (routing.experts >= first) & (routing.experts < end)
            x, g, routing = x[kept], g[kept], routing.only(kept)
        segments, experts = routing.segments(self.segments)
        experts = experts - target.experts.start
        accumulator = self.accumulators[target.key]
        assert isinstance(accumulator, ExpertAccumulator)  # Of a stacked weight.
        accumulator.add_(x, g, segments, experts)
        if self._counts_tokens:
            accumulator.count_(segments, experts)


def batch_first(rows: Tensor, examples: int) -> Tensor:
    """Rows [T, B, ...] of a batch of B examples as [B, T, ...]; others as they are.

    The last dimension holds features.
    """
    if rows.dim() != 3 or rows.shape[1] != examples:
        return rows
    return rows.transpose(0, 1)


def segments_in(x: Tensor, segments: Tensor, rows: int) -> Tensor | None:
    """Where the examples of a batch lie in the rows of `x` [..., C], or None if that is unknown.

    Usually where they lie in the batch. Where each example is a row of the batch, a module may see
    other tokens of it, and another number of them: the encoder's beside the decoder's, or more
    padding up to a window of attention.

    Args:
        segments, rows: of the batch (`BatchLosses`).
    """
    if x[..., 0].numel() == rows:
        return segments
    width = rows // len(segments)
    starts = torch.arange(len(segments), device="cpu")[:, None]
    steps = torch.tensor([[0, 1]], device="cpu")
    if x.dim() != 3 or len(x) != len(segments):
        return None
    row_by_row = (starts + steps) * width
    if not torch.equal(segments[:, 0], row_by_row[:, 0]) or (segments > row_by_row)[:, 1].any():
        return None
    return (starts + steps) * x.shape[1]


def wrong_rows_message(target: Target, expected: int, got: int) -> str:
    return (
        f"{target.name} must see every token of the batch once, {expected} rows, got {got}; "
        "modules behind a router or a pooling cannot be scored through hooks, so leave it out of "
        "target_modules"
    )


def wrong_times_message(name: str, times: int) -> str:
    return (
        f"{name} must take part in the loss exactly once per batch, got {times} times; modules "
        "that are shared between layers or skipped cannot be scored, so leave it out of "
        "target_modules"
    )


def _unviewed(output: Tensor) -> Tensor:
    """The product behind the view that a Linear with a bias returns.

    A hook on the view would be lost where the model goes on in place (ReLU(inplace=True), `+=`).
    """
    base = output._base
    # What tensor parallel hands on is a view of a tensor that autograd does not know.
    if base is None or not base.requires_grad:
        return output
    if base.numel() != output.numel() or base.shape[-1] != output.shape[-1]:
        return output
    return base


def _only(kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a module called by keyword: `input` of a Linear, `x` of a Conv1D."""
    (value,) = kwargs.values()
    return value
