"""Each data set in batches, with those of the targets that a trial shows can be scored over it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch

from fastdean.coupling.asked import Asked
from fastdean.coupling.passes.by_example import find_by_example
from fastdean.coupling.passes.trial import find_scorable
from fastdean.coupling.subject import Subject
from fastdean.coupling.sums.holding import Holding, takes
from fastdean.coupling.targets.coverage import warn_about_coverage
from fastdean.coupling.targets.finding import asked_as_parameters
from fastdean.coupling.targets.target import Target
from fastdean.coupling.workloads.planning import plan_workload
from fastdean.coupling.workloads.scorable import Scorable
from fastdean.coupling.workloads.workload import Workload
from fastdean.models.layers.replay import recording
from fastdean.models.layers.stacks import decoder_layers
from fastdean.models.model_state import evaluation_state, frozen
from fastdean.models.trees import Path as TreePath


@dataclass(frozen=True)
class TriedSets:
    """The data sets of a job, ready to be scored.

    Attributes:
        by_name: of each the batches, and which of the targets can be scored over them; those that
            hooks score first, then those that are scored by example.
        returned: for each layer that was run with all layers before it, a sample of what it
            returned in the last trial.
    """

    by_name: dict[str, list[Scorable]]
    returned: list[dict[TreePath, torch.Tensor]]

    @property
    def all(self) -> list[tuple[str, Scorable]]:
        """Of all data sets, with their names."""
        return [(name, each) for name, of_name in self.by_name.items() for each in of_name]

    @property
    def scorables(self) -> list[Scorable]:
        return [scorable for _, scorable in self.all]


def try_sets(
    subject: Subject,
    asked: Asked,
    targets: Sequence[Target],
    loaders: Mapping[str, Any],
    reading: Mapping[str, Any],
) -> TriedSets:
    """Read the loaders and try the targets on a short batch of each.

    Args:
        reading: how loaders are read (`plan_workload`).
    Raises:
        ValueError, TypeError, RuntimeError: as `score`.
    """
    model, ranks = subject.model, subject.ranks
    with subject.beginning() as alike:
        works = {
            name: plan_workload(
                model, loader, ranks=ranks, deterministic=asked.deterministic, **reading
            )
            for name, loader in loaders.items()
        }
        with evaluation_state(model), frozen(model), torch.enable_grad():
            # Of a model that is never whole a few are left here.
            run_here = decoder_layers(model) if asked.order != "batches" else {}
            with recording(run_here) as returned:
                found = {
                    name: _tried(subject, asked, targets, work, alike)
                    for name, work in works.items()
                }
    if ranks.first:
        scored = [target for each in next(iter(found.values())) for target in each.targets]
        warn_about_coverage(model, scored, asked.target_modules, asked.granularity, subject.found)
    found = {name: [_with_holding(subject, asked, s) for s in each] for name, each in found.items()}
    # What comes after a layer that was left out was given something else.
    whole = sum(1 for _ in takewhile(run_here.__contains__, subject.layers))
    return TriedSets(found, returned[:whole])


def _tried(
    subject: Subject,
    asked: Asked,
    targets: Sequence[Target],
    work: Workload,
    alike: Mapping[str, str],
) -> list[Scorable]:
    """What is scored through hooks, and after it what is scored by example, over one data set."""
    model, modules = subject.model, asked.target_modules
    where = (subject.device, subject.ranks, alike)
    hooked = [target for target in targets if not target.by_example]
    others = [target for target in targets if target.by_example]
    found = []
    if hooked:
        otherwise = asked_as_parameters(hooked, modules)
        through_hooks = find_scorable(
            model, work, hooked, asked.granularity, modules, *where, otherwise
        )
        others += [target.unhooked() for target in through_hooks.unhooked]
        if through_hooks.targets:
            found.append(through_hooks)
    if others:
        found.append(find_by_example(model, work, others, modules, *where))
    return found


def _with_holding(subject: Subject, asked: Asked, scorable: Scorable) -> Scorable:
    """With which of its targets a window may keep the inputs and gradients of."""
    if asked.keep_top is None or asked.granularity != "weight" or scorable.by_example:
        return scorable
    work = scorable.work
    if subject.ranks.size > 1 or len(work.blocks) > 1:
        # Top entries of a rank's or a block's own examples are not those of all.
        return scorable
    pairs = {
        target.parameter: pair
        for target in scorable.targets
        if (pair := scorable.pairs.get(target.parameter))
        and takes(target, pair, subject.device, asked.impl)
    }
    holding = Holding(work.all_rows, work.num_examples, asked.keep_top, pairs, asked.signs)
    return replace(scorable, holding=holding)
