"""Parameters that no hook scores, from their own gradient: one backward pass for each example.

A hook on a matrix product sees what each example makes of the matrix, whatever is in its batch.
Of any other parameter (a norm's weight, a bias, a router, an embedding, a convolution) autograd
knows the gradient of a whole batch alone. So every example is a batch of its own here, and what
autograd gives is its gradient: right for any shape, and for a parameter that is used several times
or under several names, as autograd adds up the uses. It is rounded as autograd rounds it, to the
parameter's dtype; its absolute value is added in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdean.coupling.passes.overflow import LOWERED, never_finite_error
from fastdean.coupling.passes.trial import (
    for_all,
    require_each_suffix,
    require_losses_of_their_own,
    standing_for_all,
)
from fastdean.coupling.results.score_entry import ScoreEntry
from fastdean.coupling.targets.target import Target
from fastdean.coupling.workloads.loss_check import run_checked
from fastdean.coupling.workloads.loss_scale import LossScale, initial_scale
from fastdean.coupling.workloads.scorable import Scorable
from fastdean.coupling.workloads.workload import BatchLosses, Workload
from fastdean.data.batching import send
from fastdean.models.layers.replay import NotByLayers
from fastdean.models.model_state import fresh_leaves
from fastdean.models.ranks.distributed import Ranks
from fastdean.precision import full_fp32_products
from fastdean.wording.log import logger
from fastdean.wording.mendable import StateError


class ParameterAccumulator:
    """sum_b |dL_b/dW| of one parameter, in its shape; with `signs` sum_b dL_b/dW too."""

    def __init__(self, target: Target, device: torch.device, signs: bool = False) -> None:
        shape = tuple(target.weight.shape)
        self._sums = torch.zeros(shape, dtype=torch.float32, device=device)
        self._signed = torch.zeros_like(self._sums) if signs else None

    def add_(self, x: Tensor, g: Tensor, segments: Tensor) -> None:
        raise AssertionError("no hook delivers pairs of a parameter that is scored by example")

    def add_gradient_(self, gradient: Tensor, factor: float) -> None:
        """Add the gradient of one example, in any dtype, times a power of two."""
        if gradient.layout != torch.strided:
            # An embedding may give the rows that were looked up alone.
            gradient = gradient.to_dense()
        if gradient.dtype != torch.float64:
            gradient = gradient.float()
        if factor != 1:
            gradient = gradient * factor
        self._sums += gradient.abs()
        if self._signed is not None:
            self._signed += gradient

    def tensors(self) -> list[Tensor]:
        return [each for each in (self._sums, self._signed) if each is not None]

    def multiply_(self, factor: float) -> None:
        for tensor in self.tensors():
            tensor.mul_(factor)

    def entry(self, weight: Tensor) -> ScoreEntry:
        return ScoreEntry.of(self._sums, weight, signed=self._signed)


class ExampleSums:
    """Adds what one example after the other leaves in the leaves that stand for the parameters.

    Attributes:
        arrived: keys of the parameters that had a gradient of any example.
    """

    def __init__(
        self,
        accumulators: Mapping[str, Any],
        leaves: Mapping[str, Tensor],
        scale: LossScale | None = None,
    ) -> None:
        self.arrived: set[str] = set()
        self._accumulators, self._leaves, self._scale = accumulators, leaves, scale

    def backward(self, batch: BatchLosses) -> None:
        """Run the backward pass of a batch of one example, and add its gradients.

        Raises:
            RuntimeError: in fp16 a gradient is not finite at any scale.
        """
        assert len(batch.values) == 1
        if not batch.values.requires_grad:
            return
        scale = self._scale
        if scale is None:
            batch.values.sum().backward()
            self.take()
            return
        for left in reversed(range(LOWERED + 1)):
            factor = scale.of_losses(batch.averaged)
            loss = (batch.values.float() * send(factor, batch.values.device)).sum()
            loss.backward(retain_graph=left > 0)
            gradients = self._gradients()
            if all(bool(gradient.isfinite().all()) for gradient in gradients.values()):
                self._add(gradients, 1 / float(factor))
                return
            worst = next(k for k, g in gradients.items() if not bool(g.isfinite().all()))
            scale = scale.lower()
        raise never_finite_error(batch.examples[0], worst)

    def take(self) -> None:
        """Add the gradients that backward passes over one example have left."""
        self._add(self._gradients(), 1.0)

    def expect(self, segments: Tensor, rows: int) -> None:
        """As of `Sums`: what comes next is of the one example of this batch."""
        assert len(segments) == 1

    def require_complete(self) -> None:
        """As of `Sums`: the backward passes of the batch are done.

        Raises:
            NotByLayers: a parameter has a gradient that another window has had a part of.
        """
        self.take()

    def _gradients(self) -> dict[str, Tensor]:
        found = {}
        for key, leaf in self._leaves.items():
            if leaf.grad is not None:
                found[key], leaf.grad = leaf.grad, None
        return found

    def _add(self, gradients: Mapping[str, Tensor], factor: float) -> None:
        for key, gradient in gradients.items():
            if key not in self._accumulators:
                raise NotByLayers(
                    "order='layers' must find the whole gradient of a parameter in one window, got "
                    f"parts of that of {key} in several"
                )
            self._accumulators[key].add_gradient_(gradient, factor)
        self.arrived |= gradients.keys()


def parameter_accumulators(
    targets: Sequence[Target], device: torch.device, signs: bool
) -> dict[str, ParameterAccumulator]:
    """By key; `device` is that of offloaded weights that do not say where they compute."""
    return {t.key: ParameterAccumulator(t, t.device(device), signs) for t in targets}


@contextmanager
def leaves_of(model: nn.Module, targets: Sequence[Target]) -> Iterator[dict[str, Tensor]]:
    """Inside, leaves that take gradients stand for the parameters, under all of their names."""
    with fresh_leaves(model, [target.weight for target in targets]) as leaves:
        yield {target.key: leaf for target, leaf in zip(targets, leaves, strict=True)}


def require_one_window(scorable: Scorable, layers: Sequence[str]) -> None:
    """Refuse parameters that several layers share, or that have several names outside of them.

    Args:
        layers: names of the decoder layers.
    Raises:
        NotByLayers: with the name of the first; or the model computes in fp16.
    """
    if not scorable.by_example:
        return
    if scorable.scale is not None:
        # A window that overflows does its batch again at a lower scale, by the gradients that its
        # hooks deliver (`WindowSums`). Leaves have them only when the window is through.
        raise NotByLayers(
            "order='layers' must have a model in bfloat16 or float32 for parameters that no hook "
            f"scores, got float16 with {scorable.targets[0].parameter}"
        )
    for target in scorable.targets:
        if not target.aliases:
            continue
        owners = {
            next((layer for layer in layers if name.startswith(f"{layer}.")), None)
            for name in (target.parameter, *target.aliases)
        }
        if len(owners) > 1 or None in owners:
            # |a + b| is not |a| + |b|: of a table that is the head too, what the loss leaves would
            # have to wait for what the first window adds. For each example that is a number for
            # every entry of the table, or the loss a second time in that window, of states that
            # are gone by then and that a job which goes on does not keep.
            raise NotByLayers(
                "order='layers' must find the whole gradient of a parameter in one window, got "
                f"{target.parameter}, which is {target.aliases[0]} too"
            )


def require_in_memory(targets: Sequence[Target]) -> None:
    """Refuse offloaded parameters, of which a pass through the whole model gives no gradient.

    Raises:
        ValueError: with the name of the first.
    """
    for target in targets:
        if target.weight.is_meta:
            raise ValueError(
                "target_modules must name parameters that are in memory where batches go through "
                f"the whole model and no hook scores them, got {target.parameter}, which is "
                "offloaded; use order='layers', or load the model without offloading"
            )


def add_examples(
    work: Workload,
    targets: Sequence[Target],
    accumulators: Mapping[str, Any],
    scale: LossScale | None,
    device: torch.device,
    bar: Any,
) -> None:
    """Add the importance of parameters over examples, each through the whole model."""
    with leaves_of(work.model, targets) as leaves:
        run_checked(work, ExampleSums(accumulators, leaves, scale).backward, device, bar)


def find_by_example(
    model: nn.Module,
    work: Workload,
    targets: Sequence[Target],
    target_modules: str | Sequence[str],
    device: torch.device,
    ranks: Ranks,
    alike: Mapping[str, str] | None = None,
) -> Scorable:
    """Which parameters take part in the losses, with every example in a batch of its own.

    Two short examples are tried, as in `find_scorable`. What has no gradient of either is left out
    with a warning.

    Args:
        alike: as for `find_scorable`.
    Raises:
        RuntimeError: none takes part, or none of those that `target_modules` names; or `loss_fn`
            gives an example another loss when it is alone.
    """
    with ranks.running_together(), full_fp32_products():
        excerpt = work.excerpt()
        require_losses_of_their_own(excerpt, device, targets[0].parameter)
        standing = standing_for_all(model, targets, alike or {})
        found = _tried(model, excerpt.alone(), standing, device)
        if not found.targets:
            raise StateError(next(iter(found.left_out.values())))
        found = for_all(found, targets, alike or {})
        require_each_suffix(found, target_modules)
    if found.left_out and ranks.first:
        logger.warning(
            "%d parameters are left out of the scores: %s",
            len(found.left_out),
            next(iter(found.left_out.values())),
        )
    return replace(found, work=work.alone())


def _tried(
    model: nn.Module, work: Workload, targets: Sequence[Target], device: torch.device
) -> Scorable:
    # An offloaded weight has no gradient here.
    here = [target for target in targets if not target.weight.is_meta]
    scale = initial_scale(model, device)
    for _ in range(LOWERED + 1):
        largest = {target.key: -1.0 for target in here}
        with leaves_of(model, here) as leaves, closing(work.losses(device)) as batches:
            for batch in batches:
                loss = batch.values.sum()
                if scale is not None:
                    loss = loss.float() * float(scale.of_losses(batch.averaged))
                if loss.requires_grad:
                    loss.backward()
                del batch, loss
                for key, leaf in leaves.items():
                    if leaf.grad is not None:
                        gradient = leaf.grad
                        if gradient.layout != torch.strided:
                            gradient = gradient.coalesce().values()
                        top = float(gradient.abs().max()) if gradient.numel() else 0.0
                        largest[key] = max(largest[key], math.inf if math.isnan(top) else top)
                        leaf.grad = None
        if scale is None or all(map(math.isfinite, largest.values())):
            break
        scale = scale.lower()
    if scale is not None:
        scale = scale.fitted(max(largest.values(), default=0.0))
    return Scorable(
        targets=[target for target in targets if largest.get(target.key, 0.0) >= 0],
        left_out={
            target.name: f"{target.parameter} must take part in the loss, got no gradient of it "
            "on a short batch; leave it out of target_modules"
            for target in targets
            if largest.get(target.key, 0.0) < 0
        },
        work=work,
        scale=scale,
        # The batch that the model ran last.
        tried=work.only([len(work.batches) - 1]),
    )
