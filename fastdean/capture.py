"""The hooks of `score()`: every target's input paired with the gradient of its output.

Besides it only forward.py, which gathers the target rows, and collapse/representations.py, which
reads the last representations, hook a module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdean.accumulators import Accumulator
from fastdean.targets import Target


class Capture:
    """Hooks that pair every target's input with the gradient of its output, batch after batch.

    The graph starts at the lowest targets: where nothing below a target carries a gradient, its
    hook begins one, so that no backward pass goes deeper than the targets need.
    """

    def __init__(
        self, targets: Sequence[Target], accumulators: Mapping[str, Accumulator], granularity: str
    ) -> None:
        self._targets = targets
        self._accumulators = accumulators
        self._granularity = granularity
        self._handles: list = []
        self._fired: dict[str, int] = {}
        self._segments: Tensor | None = None
        self._rows = 0

    def __enter__(self) -> None:
        for target in self._targets:
            if self._granularity == "weight":
                handle = target.module.register_forward_hook(
                    self._forward_hook(target), with_kwargs=True
                )
            else:
                handle = target.module.register_forward_pre_hook(
                    self._unit_hook(target), with_kwargs=True
                )
            self._handles.append(handle)

    def __exit__(self, *exc_info: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def expect(self, segments: Tensor, rows: int) -> None:
        """Say how the rows that the next backward pass delivers belong to examples."""
        self._segments, self._rows, self._fired = segments, rows, {}

    def require_complete(self) -> None:
        for target in self._targets:
            times = self._fired.get(target.parameter, 0)
            if times != 1:
                raise RuntimeError(
                    f"{target.name} must take part in the loss exactly once per batch, got {times} "
                    "times; modules that are shared between layers or skipped cannot be scored, so "
                    "leave it out of target_modules"
                )

    def _forward_hook(self, target: Target) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
            x = (args[0] if args else _only(kwargs)).detach()
            if not output.requires_grad:
                # A clone, because a leaf that requires grad must not be changed in place later.
                output = output.detach().requires_grad_(True).clone()
            if output.requires_grad:
                self._listen(target, x, _unviewed(output))
            return output

        return hook

    def _unit_hook(self, target: Target) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            a = args[0] if args else _only(kwargs)
            if not a.requires_grad:
                a = a.detach().requires_grad_(True)
            if a.requires_grad:
                self._listen(target, a.detach(), a)
            return (a, *args[1:]), {} if not args else kwargs

        return hook

    def _listen(self, target: Target, x: Tensor, differentiated: Tensor) -> None:
        # Autograd keeps no copy of x for a frozen weight, and so would not notice a change to it.
        version = x._version
        # Let go of x as soon as its gradient is there: the graph, and this closure with it, lives
        # on until the end of the batch.
        held = [x]
        del x

        def deliver(g: Tensor) -> None:
            x = held.pop()
            if x._version != version:
                raise RuntimeError(
                    f"{target.name} must have an input that stays as it was until the backward "
                    "pass, got one that was changed in place; leave it out of target_modules"
                )
            self._deliver(target, x, g)

        differentiated.register_hook(deliver)

    def _deliver(self, target: Target, x: Tensor, g: Tensor) -> None:
        # Under autocast a layer computes with its input cast to the dtype of its output.
        segments, rows = self._segments, self._rows
        if x.dim() == 3 and x.shape[0] == len(segments) and _is_one_row_each(segments, rows):
            # Encoder and decoder may see different numbers of tokens of the same examples.
            starts = torch.arange(len(segments), device="cpu") * x.shape[1]
            segments, rows = torch.stack([starts, starts + x.shape[1]], dim=1), x[..., 0].numel()
        x, g = x.to(g.dtype).flatten(0, -2), g.flatten(0, -2)
        if x.shape[0] != rows:
            raise RuntimeError(
                f"{target.name} must see every token of the batch once, {rows} rows, got "
                f"{x.shape[0]}; modules behind a router or a pooling cannot be scored through "
                "hooks, so leave it out of target_modules"
            )
        self._fired[target.parameter] = self._fired.get(target.parameter, 0) + 1
        self._accumulators[target.parameter].add_(x, g, segments)


def _is_one_row_each(segments: Tensor, rows: int) -> bool:
    """Whether the examples of a batch are its rows, each of them whole."""
    width = rows // len(segments)
    starts = torch.arange(len(segments), device=segments.device) * width
    return torch.equal(segments, torch.stack([starts, starts + width], dim=1))


def _unviewed(output: Tensor) -> Tensor:
    """The product behind the view that a Linear with a bias returns.

    A hook on the view would be lost where the model goes on in place (ReLU(inplace=True), `+=`).
    """
    base = output._base
    if base is None or base.numel() != output.numel() or base.shape[-1] != output.shape[-1]:
        return output
    return base


def _only(kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a module called by keyword: `input` of a Linear, `x` of a Conv1D."""
    (value,) = kwargs.values()
    return value
