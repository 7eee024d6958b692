"""The passes of a scoring in either order, and the `Scores` made of their sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from fastdean.coupling.asked import Asked
from fastdean.coupling.entries import finish
from fastdean.coupling.layers.by_layers import Rehearsal, Set, Sweep
from fastdean.coupling.layers.homes import Home, states_home
from fastdean.coupling.layers.progress import sweep_progress
from fastdean.coupling.layers.states import States
from fastdean.coupling.layers.window_memory import WindowMemory
from fastdean.coupling.manifest import score_manifest, warn_about_unseen
from fastdean.coupling.order import Order, reserved_bytes
from fastdean.coupling.passes.by_batches import run_pass
from fastdean.coupling.passes.expert_parts import joined
from fastdean.coupling.results.score_entry import ScoreEntry
from fastdean.coupling.results.scores import Scores
from fastdean.coupling.resuming.job_parts import job_parts
from fastdean.coupling.resuming.kept_entries import entries_bytes, keep_entries, kept_entries
from fastdean.coupling.resuming.kept_files import KeptFiles
from fastdean.coupling.resuming.milestones import Milestones
from fastdean.coupling.resuming.resumable import discard, resumable
from fastdean.coupling.same_job import require_same_bits
from fastdean.coupling.subject import Subject
from fastdean.coupling.sums.accumulators import Accumulator, split_by_memory
from fastdean.coupling.targets.target import Target
from fastdean.coupling.tried_sets import TriedSets
from fastdean.coupling.workloads.scorable import Scorable
from fastdean.models.available_memory import peak_memory
from fastdean.models.identity import json_digest
from fastdean.models.layers.replay import NotByLayers
from fastdean.wording.doing import titled
from fastdean.wording.log import logger
from fastdean.wording.printable import one_line


@dataclass(frozen=True, kw_only=True)
class ScoringJob:
    """Data sets that are ready to be scored, in either order; `by_layers` may be tried first.

    Attributes:
        subject, asked: which model, and what of it.
        targets: the modules that were matched.
        sets: with those of the targets that can be scored.
        windows: what each window holds beside its sums, layer by layer.
        shown: whether progress bars are.
        finished, step: as `score_sets` takes them.
    """

    subject: Subject
    asked: Asked
    targets: list[Target]
    sets: TriedSets
    windows: WindowMemory
    shown: bool
    finished: Callable[[str, Scores], object]
    step: Callable[[Sequence[str]], AbstractContextManager]

    def run(self, order: Order) -> dict[str, Scores]:
        """The scores of every data set, by name."""
        if order.by_layers:
            try:
                return self.by_layers(order)
            except NotByLayers as error:
                order = self._by_batches_after_all(error)
        if self.asked.states != "auto" and self.subject.ranks.first:
            logger.warning(
                "states=%r is not used: batch by batch no states are kept", str(self.asked.states)
            )
        return self.by_batches(order)

    def _by_batches_after_all(self, error: NotByLayers) -> Order:
        """The other order, where "auto" leaves the choice and one process knows of the error."""
        if self.subject.parts is not None:
            remedy = "load the model first, as a whole, for order='batches'"
            raise NotByLayers(f"{error}; {remedy}") from error
        if self.asked.order != "auto" or self.subject.ranks.size > 1:
            raise NotByLayers(f"{error}; use order='batches'") from error
        logger.warning("batch by batch after all: %s", error)
        if self.asked.resume is not None:
            discard(self.asked.resume)
        return Order(False, f"not layer by layer: {error}")

    def by_batches(self, order: Order) -> dict[str, Scores]:
        """Every batch through the whole model, one data set after the other."""
        asked, subject = self.asked, self.subject
        size = asked.sums_bytes(subject.ranks)
        made = {}
        for name, scorables in self.sets.by_name.items():
            passes = [
                (scorable, group)
                for scorable in scorables
                for group in split_by_memory(scorable.targets, size, asked.memory_budget)
            ]
            entries: dict[str, ScoreEntry] = {}
            total = sum(scorable.work.examples_here for scorable, _ in passes)
            with self.step([name]), _progress_bar(total, "ex", name, self.shown) as bar:
                for scorable, group in passes:
                    with subject.ranks.running_together():
                        sums = run_pass(
                            scorable,
                            group,
                            asked.granularity,
                            subject.device,
                            asked.impl,
                            bar,
                            asked.signs,
                        )
                    entries |= self._entries(scorable, group, sums)
            made[name] = self._scores(name, entries, order)
        return made

    def by_layers(self, order: Order) -> dict[str, Scores]:
        """All batches of all data sets through one layer before the next.

        Raises:
            NotByLayers: the model cannot be run like this; nothing was scored.
        """
        names, subject = list(self.sets.by_name), self.subject
        entries: dict[str, dict[str, ScoreEntry]] = {name: {} for name in names}
        _, last = self.sets.all[-1]
        with (
            self.step(names),
            sweep_progress(", ".join(names), shown=self.shown) as progress,
            self._keeping() as (home, milestones),
        ):

            def of_set(number: int, name: str, scorable: Scorable) -> Set:
                kept = {}
                if isinstance(home, KeptFiles):
                    own = subject.parts is None and not subject.ranks.teams
                    kept = kept_entries(home, number, scorable.targets, weights=own)
                    entries[name] |= kept

                def finished(group: Sequence[Target], sums: dict[str, Accumulator]) -> None:
                    made = self._entries(scorable, group, sums)
                    entries[name].update(made)
                    if isinstance(home, KeptFiles):
                        keep_entries(home, number, made)

                return Set(scorable, finished, set(kept))

            Sweep(
                [of_set(n, name, scorable) for n, (name, scorable) in enumerate(self.sets.all)],
                subject.layers,
                subject.windows,
                granularity=self.asked.granularity,
                device=subject.device,
                impl=self.asked.impl,
                states=States.of(home) if isinstance(home, KeptFiles) else States(home),
                ranks=subject.ranks,
                split=self._split,
                progress=progress,
                rehearsal=Rehearsal(last.tried or last.work, self.sets.returned),
                milestones=milestones,
                signs=self.asked.signs,
                # Of a model that is never whole the trial has run the first layers.
                fit_scales=subject.parts is not None,
            ).run()
            used, read = home.used(), milestones.bytes_read + subject.bytes_read
            return {
                name: self._scores(name, entries.pop(name), order, used, read) for name in names
            }

    @contextmanager
    def _keeping(self) -> Iterator[tuple[Home, Milestones]]:
        """Where states are kept, and who hears of the progress."""
        asked, subject, sets = self.asked, self.subject, self.sets.scorables
        if asked.resume is None:
            reserve = reserved_bytes(asked, sets, self.windows, subject.ranks)
            budget = asked.states_budget
            with states_home(asked.states, budget, subject.device, reserve) as home:
                yield home, Milestones()
            return
        modules = asked.target_modules
        options = {
            "granularity": asked.granularity,
            "target_modules": modules if isinstance(modules, str) else list(modules),
            "keep_top": asked.keep_top,
            "expert_scope": asked.expert_scope,
            "memory_budget": asked.memory_budget,
            "impl": asked.impl,
            "signs": asked.signs,
            # Steps follow from it.
            "matrices that are held": json_digest([sorted(self._held(each)) for each in sets]),
        }
        named = {
            # Outside of the quotes, as a set may be called "a, by example".
            f"{name!r}, by example" if scorable.by_example else repr(name): scorable
            for name, scorable in self.sets.all
        }
        parts = job_parts(
            subject.model,
            subject.layers,
            self.targets,
            named,
            options,
            subject.ranks,
            subject.device,
        )
        results = sum(
            entries_bytes(s.targets, asked.granularity, asked.keep_top, asked.signs) for s in sets
        )
        # Parameters that are scored by example are finished in the windows that they are found in.
        worth = {
            (number, target.parameter): target.device(subject.device)
            for number, scorable in enumerate(sets)
            for target in scorable.targets
            if not scorable.by_example
        }
        with resumable(
            asked.resume,
            parts,
            subject.layers,
            subject.windows,
            subject.resident,
            subject.ranks,
            results,
            worth,
            lambda: subject.bytes_read,
        ) as job:
            yield job.home, job

    def _split(self, scorable: Scorable, targets: Sequence[Target]) -> list[list[Target]]:
        size = self.asked.together_bytes(scorable.holding, self.subject.ranks)
        return self.windows.split(targets, size, self.asked.memory_budget)

    def _held(self, scorable: Scorable) -> set[str]:
        """Parameters whose inputs and gradients the windows keep, in place of sums."""
        if scorable.holding is None:
            return set()
        by_layer: dict[int | None, list[Target]] = {}
        for target in scorable.targets:
            by_layer.setdefault(target.layer_index, []).append(target)
        return {
            parameter
            for targets in by_layer.values()
            for group in self._split(scorable, targets)
            for parameter in scorable.holding.held(group)
        }

    def _entries(
        self, scorable: Scorable, group: Sequence[Target], sums: dict[str, Accumulator]
    ) -> dict[str, ScoreEntry]:
        made = finish(
            sums,
            group,
            self.subject.ranks,
            scorable.work.num_examples,
            self.asked.keep_top,
            self.asked.expert_scope,
            self.asked.memory_budget is not None,
            lambda target: self.subject.weight(target, self.asked),
        )
        if self.subject.parts is not None and self.asked.granularity == "unit":
            # The weight is gone when its layer is through.
            made = {name: replace(entry, weight=None) for name, entry in made.items()}
        return made

    def _scores(
        self,
        name: str,
        entries: dict[str, ScoreEntry],
        order: Order,
        used: Mapping[str, int] | None = None,
        read: int = 0,
    ) -> Scores:
        asked, subject, scorables = self.asked, self.subject, self.sets.by_name[name]
        num_examples = scorables[0].work.num_examples
        entries = {
            target.parameter: joined(
                target, entries, num_examples, asked.keep_top, asked.expert_scope
            ).with_weightless(target.weightless)
            for scorable in scorables
            for target in scorable.targets
        }
        require_same_bits(entries, subject.ranks)
        manifest = score_manifest(
            subject.model,
            self.targets,
            scorables,
            entries,
            asked.granularity,
            asked.target_modules,
            asked.keep_top,
            asked.expert_scope,
            subject.ranks,
            subject.found,
            subject.device,
        )
        warn_about_unseen(entries)
        described = order.described(used)
        if order.by_layers:
            held = sum(len(self._held(scorable)) for scorable in scorables)
            described["matrices"] = {"held": held, "summed": len(entries) - held}
        if subject.stream is not None:
            described["bytes_of_weights_read"] = read
        peak = peak_memory(subject.device)
        if peak is not None and subject.ranks.first:
            logger.info("%s: at most %.2f GB of memory so far", name, peak / 1e9)
        scores = Scores(
            entries,
            granularity=asked.granularity,
            num_examples=num_examples,
            keep_top=asked.keep_top,
            expert_scope=asked.expert_scope,
            manifest=manifest | {"order": described, "costs": {"peak_memory": peak}},
        )
        self.finished(name, scores)
        return scores


def _progress_bar(total: int, unit: str, description: str, shown: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=one_line(titled(description)), unit=unit, disable=not shown)
