"""What the hooks of `score()` capture, tried on a short batch before it is believed.

Three things are measured for every target. It takes part in the loss once. The gradient of one
example's loss lies in the rows that are taken for that example's, and in no others. And the sum
over these rows, G^T X, is the gradient of the weight as autograd knows it, compared along random
directions. Nothing is looked up by the kind of a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastdean.coupling.capture import batch_first, capturing, segments_in, wrong_rows, wrong_times
from fastdean.coupling.loss_scale import LossScale, initial_scale
from fastdean.coupling.targets import Target
from fastdean.coupling.workloads import BatchLosses, Workload
from fastdean.models.hooks import take_gradients
from fastdean.models.model_state import fresh_leaves
from fastdean.wording.mendable import StateError

_DIRECTIONS = 8
_SEED = 17
# Of the norm of a gradient's rows, what may lie outside its example's; rounding leaves nothing.
_STRAY = 1e-5
# How often a loss scale is lowered before an overflow is taken for the model's own.
_SCALES = 4


@dataclass(frozen=True)
class Trial:
    """What was found.

    Attributes:
        targets: those that can be scored.
        left_out: name -> why each of the others cannot be.
        sequence_first: parameters of the targets that see [T, B, ...] where the batch is [B, T].
        mixed: name of a target whose rows could not be told apart by example in a batch of several,
            or None.
        conclusive: False where a loss or a gradient was not finite.
        largest: the largest absolute gradient of a product, with the losses so scaled.
        scale: what the losses were multiplied by.
    """

    targets: list[Target]
    left_out: dict[str, str]
    sequence_first: frozenset[str]
    mixed: str | None
    conclusive: bool
    largest: float
    scale: LossScale | None


@dataclass
class _Found:
    """One target in the backward passes of the trial: one entry per pass."""

    times: list[int] = field(default_factory=list)
    rows: int | None = None
    dtype: torch.dtype = torch.float32
    # Squared norms of the gradient: all rows, the example's rows batch-first and sequence-first.
    total: list[float] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)
    inside_sequence_first: list[float] = field(default_factory=list)
    captured: list[Tensor] = field(default_factory=list)
    captured_sequence_first: list[Tensor] = field(default_factory=list)
    # None where autograd gave the weight no gradient; not looked at where `compared` is False.
    expected: list[Tensor | None] = field(default_factory=list)
    compared: bool = True
    largest: float = 0.0

    def finite(self) -> bool:
        gradients = (gradient for gradient in self.expected if gradient is not None)
        return all(map(math.isfinite, self.total)) and all(
            bool(gradient.isfinite().all()) for gradient in gradients
        )


@dataclass(frozen=True)
class Settled:
    """What is scored, over which batches.

    Attributes:
        targets, left_out, sequence_first: as in `Trial`.
        work: the workload, with every example alone where `alone` says so.
        alone: the target for which no two examples may share a batch, or None.
        scale: what the losses are multiplied by; None for models that do not compute in fp16.
    """

    targets: list[Target]
    left_out: dict[str, str]
    sequence_first: frozenset[str]
    work: Workload
    alone: str | None
    scale: LossScale | None


def settle(
    model: nn.Module,
    work: Workload,
    targets: Sequence[Target],
    granularity: str,
    device: torch.device,
) -> Settled:
    """Which of the targets can be scored over `work`, with examples together or one by one.

    Raises:
        RuntimeError: none can, or a captured pair does not give the gradient of its weight.
    """
    excerpt = work.excerpt()
    found = _try_scales(model, excerpt, targets, granularity, device)
    if not found.targets:
        # Windows of attention, for one, pad a short text to their own width.
        excerpt = work.excerpt(whole=True)
        found = _try_scales(model, excerpt, targets, granularity, device)
    left_out, alone = found.left_out, None
    if found.mixed is not None:
        alone = found.mixed
        _require_losses_of_their_own(excerpt, device, alone)
        found = _try_scales(model, excerpt.alone(), found.targets, granularity, device)
        left_out = left_out | found.left_out
        if found.mixed is not None:
            raise StateError(
                f"{found.mixed} must see the tokens of an example in that example's rows, got "
                "gradients in others, also with one example at a time; leave it out of "
                "target_modules"
            )
        work = work.alone()
    if not found.targets:
        raise StateError(next(iter(left_out.values())))
    scale = None if found.scale is None else found.scale.fitted(found.largest)
    return Settled(found.targets, left_out, found.sequence_first, work, alone, scale)


def _try_scales(
    model: nn.Module,
    work: Workload,
    targets: Sequence[Target],
    granularity: str,
    device: torch.device,
) -> Trial:
    """The trial with the largest loss scale at which nothing overflows."""
    scale = initial_scale(model, device)
    found = try_out(model, work, targets, granularity, device, scale)
    for _ in range(_SCALES if scale is not None else 0):
        if found.conclusive:
            break
        scale = scale.lower()
        found = try_out(model, work, targets, granularity, device, scale)
    return found


@torch.no_grad()
def _require_losses_of_their_own(work: Workload, device: torch.device, name: str) -> None:
    """Examples may be taken out of their batch only if their losses stay what they are."""
    together, alone = (
        torch.cat([batch.values.float() for batch in each.losses(device)])
        for each in (work, work.alone())
    )
    allowed = max(1e-3, 6 * torch.finfo(together.dtype).eps) * together.norm()
    if not (together - alone).norm() <= allowed:
        raise StateError(
            f"loss_fn must give each example a loss of its own, got other losses for one example "
            f"at a time, which {name} needs; pass batches of one example"
        )


def try_out(
    model: nn.Module,
    work: Workload,
    targets: Sequence[Target],
    granularity: str,
    device: torch.device,
    scale: LossScale | None = None,
) -> Trial:
    """Run one batch forward, and backward once for its first and once for its last example.

    Args:
        work: its first batch is taken.
        scale: what the losses are multiplied by.
    Raises:
        RuntimeError: a captured pair does not give the gradient of its weight.
    """
    found = {target.parameter: _Found() for target in targets}
    # An offloaded weight has no gradient here, and a unit's needs none.
    weights = [t for t in targets if granularity == "weight" and not t.module.weight.is_meta]
    for target in targets:
        found[target.parameter].compared = target in weights
    directions = {t.parameter: _directions(t, seed) for seed, t in enumerate(targets)}
    looking = _Looking(found, directions)
    with (
        capturing(targets, granularity, looking.at_pair, again=True),
        fresh_leaves(model, [target.module.weight for target in weights]) as leaves,
        closing(work.losses(device)) as batches,
    ):
        take_gradients(leaves, lambda i, gradient: looking.at_gradient(weights[i], gradient))
        batch = next(batches)
        number = batch.rows
        last = len(batch.segments) - 1
        conclusive = bool(batch.values.detach().isfinite().all())
        examples = sorted({0, last}) if conclusive else []
        for b in examples:
            looking.begin(batch, b)
            if batch.values.requires_grad:
                loss = batch.values[b]
                if scale is not None:
                    loss = loss.float() * float(scale.of_losses(batch.averaged)[b])
                loss.backward(retain_graph=b != last)
                del loss
            looking.end()
        del batch
    conclusive = conclusive and all(of.finite() for of in found.values())
    return _judge(targets, found, number, conclusive, scale)


class _Looking:
    """Notes what the hooks see of each backward pass."""

    def __init__(
        self, found: dict[str, _Found], directions: dict[str, tuple[Tensor, Tensor]]
    ) -> None:
        self._found = found
        self._directions = directions
        self._batch: BatchLosses | None = None
        self._example = 0

    def begin(self, batch: BatchLosses, example: int) -> None:
        """Say that the next backward pass is that of one example's loss."""
        self._batch, self._example = batch, example
        for found in self._found.values():
            found.times.append(0)
            found.expected.append(None)

    def end(self) -> None:
        self._batch = None

    def at_pair(self, target: Target, x: Tensor, g: Tensor) -> None:
        found = self._found[target.parameter]
        found.times[-1] += 1
        number, examples = self._batch.rows, len(self._batch.segments)
        found.rows, found.dtype = g.numel() // g.shape[-1], g.dtype
        turned = tuple(batch_first(each, examples) for each in (x, g))
        as_it_is, sequence_first = (
            segments_in(each, self._batch.segments, number) for each in (x, turned[0])
        )
        if found.times[-1] > 1 or (as_it_is is None and sequence_first is None):
            return
        found.largest = max(found.largest, float(g.abs().max()) if g.numel() else 0.0)
        found.total.append(_squared_norm(g.flatten(0, -2).float()))
        inside, captured = self._at_rows(target, x, g, as_it_is)
        found.inside.append(inside)
        found.captured.append(captured)
        inside, captured = self._at_rows(target, *turned, sequence_first)
        found.inside_sequence_first.append(inside)
        found.captured_sequence_first.append(captured)

    def _at_rows(
        self, target: Target, x: Tensor, g: Tensor, segments: Tensor | None
    ) -> tuple[float, Tensor]:
        """Squared norm of the example's rows of `g`, and u^T (G^T X) v of them."""
        if segments is None:
            return -math.inf, torch.zeros(_DIRECTIONS)
        rows = slice(*segments[self._example].tolist())
        x, g = (each.flatten(0, -2)[rows].float() for each in (x, g))
        inside = _squared_norm(g)
        if not self._found[target.parameter].compared:
            return inside, torch.zeros(_DIRECTIONS)
        u, v = (each.to(g.device) for each in self._directions[target.parameter])
        return inside, ((g @ u) * (x @ v)).sum(0).cpu()

    def at_gradient(self, target: Target, gradient: Tensor) -> None:
        u, v = (each.to(gradient.device) for each in self._directions[target.parameter])
        gradient = gradient.float()
        if target.transposed:
            gradient = gradient.T
        self._found[target.parameter].expected[-1] = ((gradient @ v) * u).sum(0).cpu()


def _squared_norm(rows: Tensor) -> float:
    """Row by row and then in float64, so that a few rows are not lost in the rounding of others."""
    return float(rows.square().sum(1).cpu().double().sum())


def _directions(target: Target, seed: int) -> tuple[Tensor, Tensor]:
    """Random vectors of the outputs [R, K] and of the inputs [C, K]."""
    generator = torch.Generator("cpu").manual_seed(_SEED + seed)
    sizes = (target.num_outputs, target.num_inputs)
    # In fp32 whatever the caller's default is: the rows that they are multiplied with are.
    options = {"generator": generator, "device": "cpu", "dtype": torch.float32}
    u, v = (torch.randn(n, _DIRECTIONS, **options) for n in sizes)
    return u, v


def _judge(
    targets: Sequence[Target],
    found: dict[str, _Found],
    number: int,
    conclusive: bool,
    scale: LossScale | None,
) -> Trial:
    scored, left_out, sequence_first, mixed = [], {}, set(), None
    for target in targets:
        of = found[target.parameter]
        times = next((n for n in of.times if n != 1), 1)
        if not conclusive:
            scored.append(target)
            continue
        if times != 1:
            left_out[target.name] = wrong_times(target.name, times)
            continue
        if len(of.total) < len(of.times):
            left_out[target.name] = wrong_rows(target, number, of.rows)
            continue
        scored.append(target)
        if _apart(of.total, of.inside):
            captured = of.captured
        elif _apart(of.total, of.inside_sequence_first):
            captured = of.captured_sequence_first
            sequence_first.add(target.parameter)
        else:
            mixed = mixed or target.name
            continue
        if of.compared:
            _require_gradient(target, of, captured)
    largest = max((f.largest for f in found.values()), default=0.0)
    return Trial(scored, left_out, frozenset(sequence_first), mixed, conclusive, largest, scale)


def _apart(total: Sequence[float], inside: Sequence[float]) -> bool:
    """Whether the gradient of every example lies in its own rows."""
    return all(whole - own <= _STRAY**2 * whole for whole, own in zip(total, inside, strict=True))


def _require_gradient(target: Target, found: _Found, captured: Sequence[Tensor]) -> None:
    # What autograd rounds each entry of the gradient to, and where it flushes to zero.
    info = torch.finfo(found.dtype)
    smallest = info.smallest_normal * info.eps * target.module.weight.numel() ** 0.5
    for value, expected in zip(captured, found.expected, strict=True):
        off = math.inf if expected is None else float((value - expected).norm())
        scale = 0.0 if expected is None else float(expected.norm())
        allowed = max(1e-3, 4 * info.eps) * scale + 4 * smallest * _DIRECTIONS**0.5
        if not off <= allowed:
            share = "no gradient" if expected is None else f"one that is {off / scale:.2g} off"
            raise StateError(
                f"{target.name} must get the gradient of its weight from its input and the "
                f"gradient of its output, got {share} of what autograd gives; a forward of its "
                "own, a quantised weight or one that is used elsewhere too cannot be scored "
                "through hooks, so leave it out of target_modules"
            )
