"""The sums of `score()` taken layer by layer: all batches through one layer before the next.

Forward from the first layer, then the loss, then backward from the last layer. In each backward
window a layer runs once more on what it was given, with the hooks of capture.py, and is never
needed again; so a layer's weights are in use twice, and its sums live as long as its window. The
model's own forward leads to each layer (`fastdean.models.layers.replay`).

Parameters that are scored by example have batches of one example, and leaves in place of hooks. An
example's whole gradient must come of one window: that of the layer, that of the loss, or for what
comes before the layers that of the first one, behind its layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import torch
from torch import Tensor, nn

from fastdean.coupling.layers.lookups import Lookups
from fastdean.coupling.layers.progress import SweepProgress
from fastdean.coupling.layers.states import States, multiplied
from fastdean.coupling.passes.by_example import (
    ExampleSums,
    leaves_of,
    parameter_accumulators,
    require_one_window,
)
from fastdean.coupling.passes.capture import Sums, capturing
from fastdean.coupling.passes.overflow import Gradients, WindowSums
from fastdean.coupling.resuming.milestones import Milestones
from fastdean.coupling.sums.accumulators import Accumulator, accumulators_of
from fastdean.coupling.sums.block_sums import BlockSums
from fastdean.coupling.sums.held_pairs import held_pairs
from fastdean.coupling.targets.target import Target
from fastdean.coupling.workloads.loss_check import require_finite
from fastdean.coupling.workloads.loss_scale import LossScale
from fastdean.coupling.workloads.scorable import Scorable
from fastdean.coupling.workloads.workload import BatchLosses, Pass, Workload
from fastdean.models.hooks import has_hooks
from fastdean.models.layers.replay import (
    Arguments,
    NotByLayers,
    Replay,
    Returned,
    leaves_below,
    placeholder,
    replaying,
    sample,
)
from fastdean.models.layers.windows import Windows
from fastdean.models.ranks.distributed import Ranks
from fastdean.models.trees import Path
from fastdean.precision import full_fp32_products, product_epsilon
from fastdean.wording.mendable import StateError

# Of the norm of what a layer returns, how much the second run may differ from the first: rounding
# in another order, which a CPU does not have. Dropout that is always on differs by far more.
_ROUNDING = 32
# The same over all layers above, where the device rounds as it likes.
_APART = 1e-3


@dataclass(frozen=True, eq=False)
class Set:
    """A data set of a sweep.

    Attributes:
        scorable: its batches, and which targets are scored over them.
        finished: called with some of the targets and their sums over this rank's examples.
        done: keys of targets that it was called with, also by an earlier process.
    """

    scorable: Scorable
    finished: Callable[[Sequence[Target], dict[str, Accumulator]], None]
    done: set[str] = field(default_factory=set)

    @property
    def before_or_behind(self) -> list[Target]:
        """Its parameters outside of the layers that are scored by example."""
        return [t for t in self.scorable.targets if t.by_example and t.layer_index is None]

    def finish(self, targets: Sequence[Target], sums: dict[str, Accumulator]) -> None:
        if targets:
            self.finished(targets, sums)
            self.done.update(target.key for target in targets)


@dataclass(frozen=True)
class Rehearsal:
    """A batch that goes forward with the others, since what it should come to is known.

    Layers may hand on what no argument and no result shows: attributes of an object, a list, a
    tensor that is changed in place, a module's own state. They then return something else here.

    Attributes:
        work: its first batch.
        expected: for each layer a `sample` of what it returned when the whole model ran the batch;
            of a model that was run without its last layers, for those before.
    """

    work: Workload
    expected: Sequence[Mapping[Path, Tensor]]


@dataclass
class Sweep:
    """One sweep over the layers for all data sets; `run` it once.

    Args:
        layers: name -> decoder layer, in the order in which the model calls them.
        windows: bring in a layer's weights, and those of modules outside of the layers.
        split: divides targets of a data set into groups whose sums fit into memory together.
        progress: told of every batch and window.
        rehearsal: a batch that the whole model has run, and what its layers returned.
        milestones: hears of every step that is done, and says which are left.
        signs: keep signed sums too.
        fit_scales: in fp16, fit the scale of the losses to the gradients behind the layers, where
            the trial that chose it did not run them all.
    """

    sets: Sequence[Set]
    layers: Mapping[str, nn.Module]
    windows: Windows
    granularity: str
    device: torch.device
    impl: str | None
    states: States
    ranks: Ranks
    split: Callable[[Scorable, Sequence[Target]], list[list[Target]]]
    progress: SweepProgress
    rehearsal: Rehearsal
    milestones: Milestones = field(default_factory=Milestones)
    signs: bool = False
    fit_scales: bool = False
    _lookups: Lookups = field(init=False, repr=False)

    @property
    def _used(self) -> dict[int, frozenset[int]]:
        return self.milestones.used

    def run(self) -> None:
        by_layer = [_by_layer(of.scorable.targets) for of in self.sets]
        for of in self.sets:
            require_one_window(of.scorable, list(self.layers))
        # How deep each set goes; what may lie before the layers is reached through all of them.
        ends = [
            0 if of.before_or_behind else min(groups, default=len(self.layers))
            for of, (groups, _) in zip(self.sets, by_layer, strict=True)
        ]
        lowest = min(ends)
        outside = [target for of in self.sets for target in of.before_or_behind]
        self._lookups = Lookups(
            self.windows,
            self.states,
            len(self.layers),
            without={target.module for target in outside},
        )
        with replaying(self.layers) as replay, self._lookups.answering():
            modules, steps = list(self.layers.values()), count()
            self.progress.plan(len(replay), lowest)
            for k, layer in enumerate(modules):
                if self.milestones.pending(step := next(steps)):
                    self.progress.begin("forward", k)
                    with self.windows.layer(k, k + 1):
                        self.milestones.require_same(replay.names[k], layer)
                        self.progress.weights_there()
                        self._forward(replay, k, step)
                    self.milestones.reached(step)
                    self._end_rehearsal(k)
                    self.progress.end()
            left = [
                (step, of, outside)
                for of, (_, outside) in zip(self.sets, by_layer, strict=True)
                if self.milestones.pending(step := next(steps))
            ]
            if left:
                self.progress.begin("loss", len(replay))
                for step, of, outside in left:
                    self._loss(replay, of, outside)
                    self.milestones.reached(step)
                self.progress.end()
            for k in reversed(range(lowest, len(replay))):
                todo = [
                    (step, of, group, through, through and k != end)
                    for of, (groups, _), end in zip(self.sets, by_layer, ends, strict=True)
                    if k >= end
                    for group, through in _last_marked(self._groups(of, groups, k))
                    if self.milestones.pending(step := next(steps))
                ]
                if not todo:
                    continue
                self.progress.begin("backward", k)
                with self.windows.layer(k, k - 1 if k > lowest else k):
                    self.milestones.require_same(replay.names[k], modules[k])
                    self.progress.weights_there()
                    for step, of, group, through, deeper in todo:
                        self._backward(replay, k, of, group, through=through, deeper=deeper)
                        self.milestones.reached(step)
                self.progress.end()

    def _groups(
        self, of: Set, groups: Mapping[int, Sequence[Target]], k: int
    ) -> list[list[Target]]:
        """What is scored together in the window of layer k; of the first what comes before it."""
        found = self.split(of.scorable, groups.get(k, []))
        if k == 0:
            found = found + self.split(of.scorable, of.before_or_behind)
        return [group for group in found if group] or [[]]

    def _batches(self, sets: Sequence[Set], first: int = 0) -> Iterator[tuple[int, Pass]]:
        """The batches of some of the sets, each with its number among those of all sets.

        Args:
            first: the lowest number.
        """
        number = 0
        for of in self.sets:
            work = of.scorable.work
            for b in range(len(work.batches)):
                if of in sets and number >= first:
                    with work.batch(b, self.device) as batch:
                        yield number, self._lookups.of(number, batch)
                    self.progress.passed(batch.rows)
                number += 1

    def _forward(self, replay: Replay, k: int, step: int) -> None:
        """Run layer k on every batch that is left and keep what it returns."""
        with self.ranks.running_together():
            for b, batch in self._batches(self.sets, self.milestones.batches_done(step)):
                arguments, _ = self._reach(replay, k, b, batch)
                with torch.no_grad():
                    self.states.keep(k, b, replay.run(k, _detached(arguments)))
                if k == b == 0:
                    works = [of.scorable.work for of in self.sets]
                    rows = sum(work.all_rows for work in works) + self.rehearsal.work.all_rows
                    kept = len(replay) + bool(self.windows.tables)
                    self.states.foresee(k, b, batch.rows / rows, kept)
                self.milestones.batch_done(step, b + 1)
            self._rehearse(replay, k)

    @property
    def _rehearsed(self) -> int:
        """The number of the batch that is rehearsed: the one after those of all sets."""
        return sum(len(of.scorable.work.batches) for of in self.sets)

    def _end_rehearsal(self, k: int) -> None:
        """After the last layer that is rehearsed, forget what layers returned.

        Not before the step is noted as done: a job that goes on in it needs them.
        """
        if k == len(self.rehearsal.expected) - 1:
            for j in range(k + 1):
                self.states.drop(j, self._rehearsed)
            self._lookups.forget(self._rehearsed)

    # As in the trial, which ran the whole model.
    @full_fp32_products()
    def _rehearse(self, replay: Replay, k: int) -> None:
        """Refuse a layer that returns something else than when the whole model ran."""
        expected = self.rehearsal.expected
        if k >= len(expected):
            return
        b = self._rehearsed
        with self.rehearsal.work.batch(0, self.device) as whole, torch.no_grad():
            batch = self._lookups.of(b, whole)
            arguments, _ = self._reach(replay, k, b, batch)
            returned = replay.run(k, _detached(arguments))
            self.states.keep(k, b, returned)
            if not _same_sample(expected[k], sample(returned.result)):
                # Called twice it returned something else than what is compared, and is refused so.
                answers, _ = self._answers(k + 1, b)
                on = replay.finish if k + 1 == len(replay) else replay.reach
                on(answers, batch.losses)
                raise NotByLayers(
                    f"{replay.names[k]} must compute the same when it is run by itself, got "
                    "something else than in the whole model; it is random, keeps a state of its "
                    "own, or is handed something beside what layers take and return"
                )

    def _loss(self, replay: Replay, of: Set, outside: Sequence[Target]) -> None:
        """Run what follows the layers, and backward to what the layers returned."""
        outside = [target for target in outside if target.key not in of.done]
        groups = self.split(of.scorable, outside) or [[]]
        scale, fit = of.scorable.scale, self.fit_scales
        begun = 0 if scale is None else scale.exponent
        for group in groups:
            with self._summing(of, group, scale, behind=True) as (sums, block_sums):
                for b, batch in self._batches([of]):
                    run = partial(self._loss_of_batch, replay, b, batch, sums)
                    gradients, exponent = _settled(sums, batch, begun, run, fit)
                    if fit:
                        begun, fit = exponent, False
                    if group is groups[0]:
                        self._take_gradients(b, gradients, exponent)
                    block_sums.batch_added()
                    del gradients

    def _loss_of_batch(
        self, replay: Replay, b: int, batch: Pass, sums: Sums | ExampleSums, exponent: int
    ) -> Gradients:
        answers, leaves = self._answers(len(replay), b)
        losses = replay.finish(answers, batch.losses)
        require_finite(losses.examples, losses.values.detach())
        _backward_behind_the_layers(sums, losses)
        return _gradients(leaves)

    def _backward(
        self,
        replay: Replay,
        k: int,
        of: Set,
        group: Sequence[Target],
        *,
        through: bool,
        deeper: bool,
    ) -> None:
        """Run layer k once more on every batch, now with the hooks, and backward through it.

        Args:
            through: nothing of the layer is needed afterwards.
            deeper: take the gradients to the layers below.
        """
        before = any(target.layer_index is None for target in group)
        deeper = deeper or before
        # What the loss has had the gradient of must have none here, and nothing in other windows.
        group = [target for target in group if target.key not in of.done]
        watched = [t for t in of.before_or_behind if deeper and (t.key in of.done or not before)]
        with self._summing(of, group, self._scale_of(k, of), watched) as (sums, block_sums):
            for b, batch in self._batches([of]):
                begun = self.states.exponent(k, b)
                run = partial(self._backward_of_batch, replay, k, b, batch, sums, begun, deeper)
                gradients, exponent = _settled(sums, batch, begun, run)
                self._take_gradients(b, gradients, exponent)
                block_sums.batch_added()
                del gradients
                if through:
                    self.states.drop(k, b)

    def _backward_of_batch(
        self,
        replay: Replay,
        k: int,
        b: int,
        batch: Pass,
        sums: Sums | ExampleSums,
        begun: int,
        deeper: bool,
        exponent: int,
    ) -> Gradients:
        """At 2^`exponent` of the losses' scale, where the kept gradients have 2^`begun`."""
        arguments, leaves = self._reach(replay, k, b, batch)
        below = {p: t for p, t in arguments.tensors().items() if t.requires_grad}
        # The layer may change its arguments in place, and those of a leaf must not be.
        given = {p: t.detach().requires_grad_(True) for p, t in below.items()}
        copies = {p: t.clone() for p, t in given.items()}
        returned = replay.run(k, arguments.replaced(copies))
        found = returned.tensors()
        self._require_same(replay.names[k], self.states.returned(k, b).tensors(), found)
        gradients = multiplied(self.states.gradients(k, b), exponent - begun)
        pairs = [(found[p], g) for p, g in gradients.items() if found[p].requires_grad]
        del arguments, returned, found, copies
        sums.expect(batch.segments, batch.rows)
        if pairs:
            torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
        del pairs, gradients
        if not deeper:
            sums.require_complete()
            return {}
        back = [(below[p], t.grad) for p, t in given.items() if t.grad is not None]
        if back:
            torch.autograd.backward([t for t, _ in back], [g for _, g in back])
        sums.require_complete()
        return _gradients(leaves)

    def _take_gradients(self, b: int, gradients: Gradients, exponent: int) -> None:
        for j, of_layer in gradients.items():
            self.states.add_gradients(j, b, of_layer, exponent)

    def _reach(
        self, replay: Replay, k: int, b: int, batch: Pass
    ) -> tuple[Arguments, dict[int, dict[Path, Tensor]]]:
        """The arguments of layer k, and the leaves that they were computed from, by layer."""
        if k not in self._used:
            self._used[k] = self._find_used(replay, k, b, batch)
        answers, leaves = self._answers(k, b)
        return replay.reach(answers, batch.losses), leaves

    def _find_used(self, replay: Replay, k: int, b: int, batch: Pass) -> frozenset[int]:
        """Which layers' results reach layer k other than through a layer between.

        By autograd's graph of one batch, and believed only if without the other results the
        arguments of layer k are the same bits. In another batch NaN would take their place and
        reach the loss, which is refused.
        """
        everything = frozenset(range(k))
        self._used[k] = everything
        if any(map(has_hooks, self.layers.values())):
            # Whoever watches a layer is to see what it returned, also where nobody uses it.
            return everything
        answers, leaves = self._answers(k, b)
        arguments = replay.reach(answers, batch.losses)
        looked_at = leaves_below((arguments.args, arguments.kwargs))
        used = frozenset(
            j for j, of_layer in leaves.items() if looked_at & {id(t) for t in of_layer.values()}
        )
        if used == everything:
            return everything
        self._used[k] = used
        answers, _ = self._answers(k, b)
        try:
            again = replay.reach(answers, batch.losses)
        except Exception:  # of the model's own code, about NaN or a tensor that cannot be changed
            return everything
        expected, got = arguments.tensors(), again.tensors()
        same = expected.keys() == got.keys() and all(
            torch.equal(expected[path], got[path]) for path in expected
        )
        return used if same else everything

    def _answers(self, k: int, b: int) -> tuple[list[Returned], dict[int, dict[Path, Tensor]]]:
        """What layers 0 to k-1 answer, on leaves of their own where layer k depends on them."""
        used = self._used.get(k, frozenset(range(k)))
        answers, leaves = [], {}
        for j in range(k):
            if j not in used:
                answers.append(placeholder(self.states.shapes(j, b), self.device))
                continue
            returned = self.states.returned(j, b)
            whole = returned.tensors()
            leaves[j] = {
                path: tensor.detach().requires_grad_(True)
                for path, tensor in whole.items()
                if tensor.is_floating_point()
            }
            # A model may change what a layer returned in place.
            given = {
                p: leaves[j][p].clone() if p in leaves[j] else t.clone() for p, t in whole.items()
            }
            answers.append(returned.replaced(given))
        return answers, leaves

    def _scale_of(self, k: int, of: Set) -> LossScale | None:
        """The highest scale that the gradients of layer k have in a batch of a data set."""
        if of.scorable.scale is None:
            return None
        first = sum(len(s.scorable.work.batches) for s in self.sets[: self.sets.index(of)])
        numbers = range(first, first + len(of.scorable.work.batches))
        return LossScale(max((self.states.exponent(k, b) for b in numbers), default=0))

    @contextmanager
    def _summing(
        self,
        of: Set,
        group: Sequence[Target],
        scale: LossScale | None,
        watched: Sequence[Target] = (),
        *,
        behind: bool = False,
    ) -> Iterator[tuple[Sums | ExampleSums, BlockSums]]:
        """Inside, backward passes give the sums of a window what they add up; then it is finished.

        Args:
            watched: parameters whose gradient must come of another window.
            behind: of the targets behind the layers only those are finished here that had one.
        """
        accumulators = self._accumulators(of, group)
        block_sums = BlockSums(accumulators.values(), of.scorable.work.blocks)
        collecting = self._collecting(of, group, accumulators, scale, watched)
        with self.ranks.running_together(), collecting as sums:
            yield sums, block_sums
        if isinstance(sums, WindowSums):
            sums.take_scale_off()
        of.finish(self._arrived(group, sums) if behind else group, accumulators)

    @contextmanager
    def _collecting(
        self,
        of: Set,
        group: Sequence[Target],
        accumulators: dict[str, Accumulator],
        scale: LossScale | None,
        watched: Sequence[Target],
    ) -> Iterator[Sums | ExampleSums]:
        """What takes the gradients of a window: by hooks, or from leaves."""
        sequence_first = of.scorable.sequence_first
        if not of.scorable.by_example:
            sums = Sums(accumulators, sequence_first)
            if scale is not None:
                sums = WindowSums(accumulators, sequence_first, scale, self.device)
            with capturing(group, self.granularity, sums.receive):
                yield sums
            return
        parameters = [*group, *watched]
        modules = {target.module for target in parameters}
        for name, module in self.windows.on_demand.items():
            if not modules.isdisjoint(module.modules()):
                self.windows.bring(name)
        with leaves_of(of.scorable.work.model, parameters) as leaves:
            yield ExampleSums(accumulators, leaves)

    def _arrived(self, group: Sequence[Target], sums: Sums | ExampleSums) -> list[Target]:
        """The targets behind the layers, whose gradient no other window has a part of."""
        if isinstance(sums, Sums) or not len(self.layers):
            return list(group)
        here = torch.tensor([int(t.key in sums.arrived) for t in group], dtype=torch.int64)
        self.ranks.sum_([here])
        return [target for target, number in zip(group, here.tolist(), strict=True) if number]

    def _accumulators(self, of: Set, targets: Sequence[Target]) -> dict[str, Accumulator]:
        if of.scorable.by_example:
            return dict(parameter_accumulators(targets, self.device, self.signs))
        held = held_pairs(of.scorable.holding, targets, self.device, self.impl)
        return accumulators_of(targets, self.granularity, self.device, self.impl, self.signs, held)

    def _require_same(
        self, name: str, first: Mapping[Path, Tensor], second: Mapping[Path, Tensor]
    ) -> None:
        for path, before in first.items():
            after = second.get(path)
            if after is None or not _nearly_equal(before, after.detach()):
                raise NotByLayers(
                    f"{name} must compute the same when it is run again, got something else; it is "
                    "random or keeps a state of its own"
                )


def _by_layer(targets: Sequence[Target]) -> tuple[dict[int, list[Target]], list[Target]]:
    """The targets by the position of their layer, and those in none."""
    by_layer: dict[int, list[Target]] = {}
    outside = []
    for target in targets:
        if target.layer_index is None:
            outside.append(target)
        else:
            by_layer.setdefault(target.layer_index, []).append(target)
    return by_layer, outside


def _last_marked(groups: Sequence[list[Target]]) -> Iterator[tuple[list[Target], bool]]:
    """Each group, and whether it is the last."""
    for number, group in enumerate(groups, start=1):
        yield group, number == len(groups)


def _settled(
    sums: Sums | ExampleSums,
    batch: Pass,
    exponent: int,
    run: Callable[[int], Gradients],
    fit: bool = False,
) -> tuple[Gradients, int]:
    """What a batch's backward pass gives the layers below, and at which scale."""
    if isinstance(sums, WindowSums):
        return sums.settled(batch, exponent, run, fit)
    return run(exponent), exponent


def _gradients(leaves: Mapping[int, Mapping[Path, Tensor]]) -> Gradients:
    return {
        j: {path: tensor.grad for path, tensor in of_layer.items() if tensor.grad is not None}
        for j, of_layer in leaves.items()
    }


def _detached(arguments: Arguments) -> Arguments:
    return arguments.replaced({p: t.detach() for p, t in arguments.tensors().items()})


def _nearly_equal(before: Tensor, after: Tensor, elsewhere: float = 0.0) -> bool:
    """Whether two tensors differ by rounding alone.

    Args:
        elsewhere: of the norm, what may differ on other devices than a CPU, if that is more.
    """
    if before.shape != after.shape or before.dtype != after.dtype:
        return False
    if torch.equal(before, after):
        return True
    if not before.is_floating_point():
        return False
    allowed = _ROUNDING * product_epsilon(before.device, before.dtype)
    if before.device.type != "cpu":
        allowed = max(allowed, elsewhere)
    before, after = before.float(), after.float()
    return bool((before - after).norm() <= allowed * before.norm())


def _same_sample(expected: Mapping[Path, Tensor], found: Mapping[Path, Tensor]) -> bool:
    return all(p in found and _nearly_equal(t, found[p], _APART) for p, t in expected.items())


def _backward_behind_the_layers(sums: Sums | ExampleSums, losses: BatchLosses) -> None:
    try:
        sums.backward(losses)
    except StateError as error:
        raise NotByLayers(
            "order='layers' must find every target in a decoder layer or behind all of them: "
            f"{error}"
        ) from error
