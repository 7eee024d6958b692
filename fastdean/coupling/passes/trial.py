"""What the hooks of `score()` capture, tried on a short batch before it is believed.

Three things are measured for every target. It takes part in the loss once. The gradient of one
example's loss lies in the rows that are taken for that example's, and in no others. And the sum
over these rows, G^T X, is the gradient of the weight as autograd knows it, compared along random
directions. Nothing is looked up by the kind of a model.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fastdean.coupling.passes.capture import (
    batch_first,
    capturing,
    require_same_experts,
    segments_in,
    wrong_rows_message,
    wrong_times_message,
)
from fastdean.coupling.passes.team_trial import require_same_losses, require_same_targets
from fastdean.coupling.sums.holding import Pair
from fastdean.coupling.targets.target import Target
from fastdean.coupling.workloads.loss_scale import LossScale, initial_scale
from fastdean.coupling.workloads.scorable import Scorable
from fastdean.coupling.workloads.workload import Workload
from fastdean.models.experts.products import Routing
from fastdean.models.hooks import take_gradients
from fastdean.models.model_state import fresh_leaves
from fastdean.models.ranks.distributed import Ranks
from fastdean.models.ranks.shards import placed_like
from fastdean.precision import full_fp32_products, product_epsilon
from fastdean.wording.log import logger
from fastdean.wording.mendable import StateError

_DIRECTIONS = 8
_SEED = 17
# Of the norm of a gradient's rows, what may lie outside its example's; rounding leaves nothing.
_STRAY = 1e-5
# How often a loss scale is lowered before an overflow is taken for the model's own.
_SCALES = 4


def find_scorable(
    model: nn.Module,
    work: Workload,
    targets: Sequence[Target],
    granularity: str,
    target_modules: str | Sequence[str],
    device: torch.device,
    ranks: Ranks,
    alike: Mapping[str, str] | None = None,
    otherwise: Collection[str] = (),
) -> Scorable:
    """Which of the targets can be scored over `work`, with examples together or one by one.

    What cannot is left out with a warning.

    Args:
        otherwise: parameters that are scored by example where hooks cannot.
        alike: where some layers alone are in the model: name of each layer -> that of one of its
            kind which is, whose targets are tried in place of its own.

    Raises:
        RuntimeError: none can, or none of those named by a suffix in `target_modules`; or a
            captured pair does not give the gradient of its weight.
    """

    def tried(work: Workload, targets: Sequence[Target]) -> Scorable:
        """With the largest loss scale at which nothing overflows."""
        scale = initial_scale(model, device)
        if ranks.teams and scale is not None:
            # An overflow on one rank would have it run its batch again, without the others.
            raise ValueError(
                "model must not compute in float16 where tensor parallel splits it over ranks; "
                "load it in bfloat16 or float32"
            )
        found = _try_out(model, work, targets, granularity, device, scale, otherwise)
        for _ in range(_SCALES):
            if scale is None or found.conclusive:
                break
            scale = scale.lower()
            found = _try_out(model, work, targets, granularity, device, scale, otherwise)
        return found

    everything, targets = targets, standing_for_all(model, targets, alike or {})
    # In full: what is compared agrees to the rounding of fp32, which TF32 is far above.
    with ranks.running_together(), full_fp32_products():
        excerpt = work.excerpt()
        if ranks.teams:
            require_same_losses(excerpt, device, ranks)
        found = tried(excerpt, targets)
        if not found.targets:
            # Windows of attention, for one, pad a short text to their own width.
            excerpt = work.excerpt(whole=True)
            found = tried(excerpt, targets)
        alone = found.alone
        if alone is not None:
            require_losses_of_their_own(excerpt, device, alone)
            together, found = found, tried(excerpt.alone(), found.targets)
            if found.alone is not None:
                raise StateError(
                    f"{found.alone} must see the tokens of an example in that example's rows, got "
                    "gradients in others, also with one example at a time; leave it out of "
                    "target_modules"
                )
            found = replace(found, left_out=together.left_out | found.left_out)
            work = work.alone()
        if not found.targets and any(t.parameter not in otherwise for t in targets):
            raise StateError(next(iter(found.left_out.values())))
        scale = None if found.scale is None else found.scale.fitted(found.largest)
        found = replace(found, work=work, alone=alone, scale=scale, tried=found.work)
        found = _without_unhooked(for_all(found, everything, alike or {}), everything, otherwise)
        require_each_suffix(found, target_modules)
        if ranks.teams:
            require_same_targets(found, ranks)
    if found.left_out and ranks.first:
        logger.warning(
            "%d matched modules are left out of the scores: %s",
            len(found.left_out),
            next(iter(found.left_out.values())),
        )
    if alone is not None and ranks.first:
        logger.warning(
            "examples are scored one at a time: in a batch of several, the rows of %s could not be "
            "told apart by example",
            alone,
        )
    return found


def standing_for_all(
    model: nn.Module, targets: Sequence[Target], alike: Mapping[str, str]
) -> Sequence[Target]:
    """The modules that stand for the targets, which need not be targets themselves."""
    standing: dict[str, Target] = {}
    for target in targets:
        name = _in_kind(target.name, alike)
        if name == target.name:
            standing[name] = target
        else:
            standing.setdefault(name, target.in_place_of(name, model))
    return list(standing.values())


def _in_kind(name: str, alike: Mapping[str, str]) -> str:
    """The module at the same place in the layer that stands for a module's own."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        layer = ".".join(parts[:end])
        if layer in alike:
            return alike[layer] + name[len(layer) :]
    return name


def for_all(found: Scorable, targets: Sequence[Target], alike: Mapping[str, str]) -> Scorable:
    """What was found of some layers, said of all layers of their kinds."""
    if not alike:
        return found
    scored = {target.name for target in found.targets}
    kinds = {target.name: _in_kind(target.name, alike) for target in targets}
    return replace(
        found,
        targets=[target for target in targets if kinds[target.name] in scored],
        left_out={
            name: found.left_out[kind].replace(kind, name)
            for name, kind in kinds.items()
            if kind in found.left_out
        },
        sequence_first=frozenset(
            target.parameter
            for target in targets
            if target.parameter_called(kinds[target.name]) in found.sequence_first
        ),
        pairs={
            target.parameter: found.pairs[kind]
            for target in targets
            if (kind := target.parameter_called(kinds[target.name])) in found.pairs
        },
    )


def _without_unhooked(
    found: Scorable, targets: Sequence[Target], otherwise: Collection[str]
) -> Scorable:
    unhooked = [t for t in targets if t.name in found.left_out and t.parameter in otherwise]
    names = {target.name for target in unhooked}
    left_out = {name: why for name, why in found.left_out.items() if name not in names}
    return replace(found, left_out=left_out, unhooked=unhooked)


def require_each_suffix(found: Scorable, target_modules: str | Sequence[str]) -> None:
    """A group may lose modules, a suffix that was named must keep one."""
    if isinstance(target_modules, str):
        target_modules = target_modules.replace(",", " ").split()
    for suffix in target_modules:

        def is_meant(name: str, suffix: str = suffix) -> bool:
            # A parameter by its whole name, a module by its own or by that of its weight.
            ending = f".{suffix}"
            return any(f".{each}".endswith(ending) for each in (name, f"{name}.weight"))

        reasons = [reason for name, reason in found.left_out.items() if is_meant(name)]
        if reasons and not any(is_meant(target.name) for target in found.targets):
            raise StateError(reasons[0])


@torch.no_grad()
def require_losses_of_their_own(work: Workload, device: torch.device, name: str) -> None:
    """Examples may be taken out of their batch only if their losses stay what they are."""
    together, alone = (
        torch.cat([batch.values.float() for batch in each.losses(device)])
        for each in (work, work.alone())
    )
    if not bool(together.isfinite().all() & alone.isfinite().all()):
        # For the loss to say.
        return
    # The losses may be fp32 where the model computes in less.
    epsilon = max(product_epsilon(each.device, each.dtype) for each in _floating(work.model))
    if not (together - alone).norm() <= max(1e-3, 6 * epsilon) * together.norm():
        who, remedy = work.of_its_own
        raise StateError(
            f"{who} must give each example a loss of its own, got other losses for one example "
            f"at a time, which {name} needs; {remedy}"
        )


def _floating(model: nn.Module) -> Iterator[Tensor]:
    return (each for each in model.parameters() if each.is_floating_point())


@dataclass
class _Pass:
    """What the backward pass of one example's loss showed of one target.

    Attributes:
        times: how often the target took part.
        rows, dtype: of its gradient.
        largest: the largest absolute entry of the gradient.
        total: squared norm of the gradient; None where the examples' rows are unknown.
        inside: squared norm of the example's rows, were they batch-first and sequence-first.
        captured: u^T (G^T X) v over these rows, likewise; [K], of experts [E, K].
        expected: u^T (dL/dW) v from autograd, likewise; None where it gave no gradient.
    """

    times: int = 0
    rows: int = 0
    dtype: torch.dtype = torch.float32
    largest: float = 0.0
    total: float | None = None
    inside: list[float] = field(default_factory=list)
    captured: list[Tensor] = field(default_factory=list)
    expected: Tensor | None = None

    def is_finite(self) -> bool:
        known = self.expected is None or bool(self.expected.isfinite().all())
        return known and math.isfinite(self.total or 0.0)


def _try_out(
    model: nn.Module,
    work: Workload,
    targets: Sequence[Target],
    granularity: str,
    device: torch.device,
    scale: LossScale | None,
    otherwise: Collection[str] = (),
) -> Scorable:
    """Run the first batch forward, and backward once for its first and once for its last example.

    Raises:
        RuntimeError: a captured pair does not give the gradient of its weight.
    """
    # An offloaded weight has no gradient here, and a unit's needs none.
    weights = [t for t in targets if granularity == "weight" and not t.weight.is_meta]
    seen = _Observer(targets, {target.parameter for target in weights})
    stacked = {(t.module, t.leaf): t for t in weights if t.stacked}

    def stand(module: nn.Module, leaf: str, expert: int, matrix: Tensor) -> Tensor:
        """A leaf for each matrix: a gradient of the whole stack may be larger than a layer."""
        target = stacked.get((module, leaf))
        if target is None:
            return matrix
        own = matrix.detach().requires_grad_(True)
        seen.stands(target, expert)
        take_gradients([own], lambda _, gradient: seen.gradient(target, gradient, expert))
        return own

    with (
        capturing(
            targets,
            granularity,
            seen.pair,
            again=True,
            compare=require_same_experts,
            stand=stand,
        ),
        # Of a stack, what reaches its leaf was made beside the products of its experts.
        fresh_leaves(model, [target.weight for target in weights]) as leaves,
        closing(work.losses(device)) as batches,
    ):
        take_gradients(leaves, lambda i, gradient: seen.gradient(weights[i], gradient))
        batch = next(batches)
        rows, last = batch.rows, len(batch.segments) - 1
        conclusive = bool(batch.values.detach().isfinite().all())
        for b in sorted({0, last}) if conclusive else []:
            seen.begin(batch.segments, rows, b)
            if batch.values.requires_grad:
                loss = batch.values[b]
                if scale is not None:
                    loss = loss.float() * float(scale.of_losses(batch.averaged)[b])
                loss.backward(retain_graph=b != last)
                del loss
        del batch
    tried = Scorable(list(targets), work, scale, conclusive=conclusive)
    return seen.judged(rows, tried, otherwise)


class _Observer:
    """Notes what the hooks see of each backward pass.

    Args:
        compared: parameters whose pairs are compared with autograd's gradient.
    """

    def __init__(self, targets: Sequence[Target], compared: set[str]) -> None:
        self._compared = compared
        self._passes: dict[str, list[_Pass]] = {target.parameter: [] for target in targets}
        self._directions = {t.parameter: _directions(t, seed) for seed, t in enumerate(targets)}
        # Experts whose matrices autograd differentiates by.
        self._standing: dict[str, set[int]] = {t.parameter: set() for t in targets if t.stacked}
        # Held, so that no other tensor comes to lie where one of them was.
        self._inputs: dict[str, Tensor] = {}

    def begin(self, segments: Tensor, rows: int, example: int) -> None:
        """Say that the next backward pass is that of one example's loss."""
        self._segments, self._rows, self._example = segments, rows, example
        for passes in self._passes.values():
            passes.append(_Pass())

    def pair(self, target: Target, x: Tensor, g: Tensor, routing: Routing | None = None) -> None:
        seen = self._passes[target.parameter][-1]
        seen.times += 1
        seen.rows, seen.dtype = g.numel() // g.shape[-1], g.dtype
        if routing is not None:
            seen.rows = routing.total
            if seen.times == 1 and routing.total == self._rows:
                seen.largest = float(g.abs().max()) if g.numel() else 0.0
                seen.total = _squared_norm(g.float())
                inside, captured = self._routed_rows(target, x, g, routing)
                # In whatever order the batch is: it has no other rows.
                seen.inside, seen.captured = [inside] * 2, [captured] * 2
            return
        examples = len(self._segments)
        orders = [(x, g), (batch_first(x, examples), batch_first(g, examples))]
        segments = [segments_in(turned, self._segments, self._rows) for turned, _ in orders]
        if seen.times > 1 or all(each is None for each in segments):
            return
        seen.largest = float(g.abs().max()) if g.numel() else 0.0
        seen.total = _squared_norm(g.flatten(0, -2).float())
        self._inputs[target.parameter] = x
        for (x, g), of_order in zip(orders, segments, strict=True):
            inside, captured = self._in_rows(target, x, g, of_order)
            seen.inside.append(inside)
            seen.captured.append(captured)

    def _in_rows(
        self, target: Target, x: Tensor, g: Tensor, segments: Tensor | None
    ) -> tuple[float, Tensor]:
        """Squared norm of the example's rows of `g`, and u^T (G^T X) v of them."""
        if segments is None:
            return -math.inf, torch.zeros(_DIRECTIONS)
        rows = slice(*segments[self._example].tolist())
        x, g = (each.flatten(0, -2)[rows].float() for each in (x, g))
        inside = _squared_norm(g)
        if target.parameter not in self._compared:
            return inside, torch.zeros(_DIRECTIONS)
        u, v = (each.to(g.device) for each in self._directions[target.parameter])
        return inside, (_product(g, u) * _product(x, v)).sum(0).cpu()

    def _routed_rows(
        self, target: Target, x: Tensor, g: Tensor, routing: Routing
    ) -> tuple[float, Tensor]:
        """As `_in_rows`, with what is captured of each expert, [E, K]."""
        first, end = self._segments[self._example].tolist()
        kept = (routing.rows >= first) & (routing.rows < end)
        x, g, experts = x[kept].float(), g[kept].float(), routing.experts[kept]
        inside = _squared_norm(g)
        if target.parameter not in self._compared:
            return inside, torch.zeros(_DIRECTIONS)
        u, v = (each.to(g.device) for each in self._directions[target.parameter])
        captured = _of_no_expert(target)
        return inside, captured.index_add(0, experts.cpu(), (_product(g, u) * _product(x, v)).cpu())

    def stands(self, target: Target, expert: int) -> None:
        """Say that the gradient of this expert's matrix will be noted by itself."""
        self._standing[target.parameter].add(expert)

    def gradient(self, target: Target, gradient: Tensor, expert: int | None = None) -> None:
        """Note a gradient of the weight, of a stacked one that of all experts or of one.

        Those of one pass add up.
        """
        u, v = (each.to(gradient.device) for each in self._directions[target.parameter])
        gradient = placed_like(gradient, target.weight)
        gradient = gradient.float().mT if target.transposed else gradient.float()
        along = (_product(gradient, v) * u).sum(-2).cpu()
        if expert is not None:
            of_one, along = along, _of_no_expert(target)
            along[expert] = of_one
        seen = self._passes[target.parameter][-1]
        seen.expected = along if seen.expected is None else seen.expected + along

    def judged(self, rows: int, tried: Scorable, otherwise: Collection[str] = ()) -> Scorable:
        """What came of a batch of so many rows; `tried.conclusive` if its losses were finite.

        Args:
            otherwise: parameters that need not be scored through hooks.

        Raises:
            RuntimeError: a captured pair does not give the gradient of its weight.
        """
        everything = [seen for passes in self._passes.values() for seen in passes]
        conclusive = tried.conclusive and all(seen.is_finite() for seen in everything)
        largest = max((seen.largest for seen in everything), default=0.0)
        tried = replace(tried, conclusive=conclusive, largest=largest)
        if not conclusive:
            return tried
        scored, left_out, sequence_first, mixed = [], {}, set(), None
        for target in tried.targets:
            passes = self._passes[target.parameter]
            times = next((seen.times for seen in passes if seen.times != 1), 1)
            if times != 1:
                left_out[target.name] = wrong_times_message(target.name, times)
                continue
            if any(seen.total is None for seen in passes):
                left_out[target.name] = wrong_rows_message(target, rows, passes[-1].rows)
                continue
            order = next((order for order in (0, 1) if _apart(passes, order)), None)
            if order is not None and target.parameter in self._compared:
                try:
                    standing = self._standing.get(target.parameter)
                    _require_gradient(target, passes, order, standing)
                except StateError as error:
                    if target.parameter not in otherwise:
                        raise
                    left_out[target.name] = str(error)
                    continue
            scored.append(target)
            if order is None:
                mixed = mixed or target.name
            elif order == 1:
                sequence_first.add(target.parameter)
        return replace(
            tried,
            targets=scored,
            left_out=left_out,
            sequence_first=frozenset(sequence_first),
            alone=mixed,
            pairs=self._pairs_of(scored, rows, sequence_first),
        )

    def _pairs_of(
        self, targets: Sequence[Target], rows: int, sequence_first: Collection[str]
    ) -> dict[str, Pair]:
        """What was seen of each target, with a number for each tensor that they were given."""
        sources: dict[tuple[int | None, int], Tensor] = {}
        found = {}
        for number, target in enumerate(targets):
            if target.stacked:
                # Rows of experts are copies, and nothing holds them until the end of a window.
                continue
            name, x = target.parameter, self._inputs[target.parameter]
            source = number
            # Turned around, its rows are copies of each target's own.
            if name not in sequence_first:
                same = (
                    other
                    for (layer, other), given in sources.items()
                    if layer == target.layer_index and given.is_set_to(x)
                )
                source = next(same, number)
                sources.setdefault((target.layer_index, source), x)
            seen = self._passes[name][-1]
            found[name] = Pair(seen.dtype, seen.rows == rows, source)
        return found


def _apart(passes: Sequence[_Pass], order: int) -> bool:
    """Whether the gradient of every example lies in its own rows."""
    norms = ((seen.total or 0.0, seen.inside[order]) for seen in passes)
    return all(total - inside <= _STRAY**2 * total for total, inside in norms)


def _squared_norm(rows: Tensor) -> float:
    """Row by row and then in float64, so that a few rows are not lost in the rounding of others."""
    return float(rows.square().sum(1).cpu().double().sum())


def _directions(target: Target, seed: int) -> tuple[Tensor, Tensor]:
    """Random vectors of the outputs [R, K] and of the inputs [C, K]."""
    generator = torch.Generator("cpu").manual_seed(_SEED + seed)
    sizes = (target.num_outputs, target.num_inputs)
    # In fp32 whatever the caller's default is: the rows that they are multiplied with are.
    u, v = (
        torch.randn(n, _DIRECTIONS, generator=generator, device="cpu", dtype=torch.float32)
        for n in sizes
    )
    return u, v


def _product(rows: Tensor, directions: Tensor) -> Tensor:
    """In fp32 also where the backward pass runs inside of the caller's autocast."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ directions


def _of_no_expert(target: Target) -> Tensor:
    """Zeros for each expert and direction, [E, K]."""
    shape = (target.shape[0], _DIRECTIONS)
    return torch.zeros(shape, device="cpu", dtype=torch.float32)


def _require_gradient(
    target: Target, passes: Sequence[_Pass], order: int, standing: Collection[int] | None
) -> None:
    """Raises: RuntimeError unless what was captured is what autograd gave.

    Args:
        standing: of a stacked weight the experts whose own gradient autograd gave. Of the others
            it knows what the weight is used for beside their products, which must be nothing.
    """
    for seen in passes:
        # What autograd rounds each entry of the gradient to, and where it flushes to zero.
        info = torch.finfo(seen.dtype)
        size = target.num_outputs * target.num_inputs
        smallest = info.smallest_normal * info.eps * size**0.5
        captured = seen.captured[order]
        expected = torch.zeros_like(captured) if seen.expected is None else seen.expected
        if standing is not None:
            others = torch.ones(len(captured), 1, dtype=torch.bool, device="cpu")
            others[list(standing)] = False
            expected = expected + captured.where(others, 0)
        # Of experts each by itself, so that none can hide behind the others.
        off, scale = (captured - expected).norm(dim=-1), expected.norm(dim=-1)
        allowed = max(1e-3, 4 * info.eps) * scale + 4 * smallest * _DIRECTIONS**0.5
        if seen.expected is None or not bool((off <= allowed).all()):
            worst = (off / scale).nan_to_num(0.0).max()
            share = "no gradient" if seen.expected is None else f"one that is {worst:.2g} off"
            raise StateError(
                f"{target.name} must get the gradient of its weight from its input and the "
                f"gradient of its output, got {share} of what autograd gives; a forward of its "
                "own, a quantised weight or one that is used elsewhere too cannot be scored "
                "through hooks, so leave it out of target_modules"
            )
