"""`score()`: importance of every weight on a set of examples, in one pass over them.

Find the targets, make batches, and for each batch run the model forward, take each example's loss
and run it backward; hooks hand every target's input and gradient to its accumulator. At the end the
sums become entries of `Scores`. README.md says which file does what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdean.coupling.accumulators import Accumulator, all_sums_bytes, split_by_memory
from fastdean.coupling.block_sums import sums_at_a_time
from fastdean.coupling.by_batches import run_pass
from fastdean.coupling.by_example import find_by_example
from fastdean.coupling.by_layers import Rehearsal, Set, Sweep
from fastdean.coupling.expert_parts import joined, placed, weight_of_part
from fastdean.coupling.holding import Holding, least_held_bytes, takes, together_bytes
from fastdean.coupling.homes import Home, states_home
from fastdean.coupling.job_parts import job_parts
from fastdean.coupling.kept_entries import entries_bytes, keep_entries, kept_entries
from fastdean.coupling.kept_files import KeptFiles
from fastdean.coupling.manifest import score_manifest, warn_about_unseen
from fastdean.coupling.milestones import Milestones
from fastdean.coupling.order import (
    Order,
    choose_order,
    order_in_teams,
    require_order,
    require_room_for_dense,
    require_shardable,
    require_streamable,
    reserved_bytes,
)
from fastdean.coupling.progress import sweep_progress
from fastdean.coupling.reduction import Top, reduced_entry
from fastdean.coupling.resumable import discard, holds_job, resumable
from fastdean.coupling.scores import (
    ScoreEntry,
    Scores,
    check_expert_scope,
    check_keep_top,
    fingerprint,
    keep_entry,
    naming_matrix,
)
from fastdean.coupling.states import States
from fastdean.coupling.targets import (
    Survey,
    Target,
    asked_as_parameters,
    find_targets,
    require_own_parameters,
    survey,
    warn_about_coverage,
)
from fastdean.coupling.team_entries import (
    in_blocks,
    require_even_blocks,
    team_entry,
    team_fingerprint,
)
from fastdean.coupling.trial import Scorable, find_scorable
from fastdean.coupling.window_memory import WindowMemory
from fastdean.coupling.workloads import LossFunction, Workload, blocks_of_a_rank, plan_workload
from fastdean.data.examples import Example
from fastdean.models.adapters import require_no_prompts
from fastdean.models.available_memory import peak_memory
from fastdean.models.distributed import Ranks, check_rank_timeout, failing_together
from fastdean.models.identity import json_digest
from fastdean.models.model_state import (
    eager,
    evaluation_state,
    frozen,
    input_device,
    strict_determinism,
    unwrap,
)
from fastdean.models.replay import NotByLayers, recording
from fastdean.models.sharded import ShardedModel, resharded
from fastdean.models.stacks import decoder_layers
from fastdean.models.streaming import StreamedModel
from fastdean.models.tensor_parallel import in_teams, is_split
from fastdean.models.trees import Path as TreePath
from fastdean.models.windows import (
    OffloadedModel,
    Windows,
    beginning,
    outside_layers,
    resident_layers,
    stream_of,
)
from fastdean.wording.doing import titled
from fastdean.wording.granularity import checked_granularity
from fastdean.wording.log import logger
from fastdean.wording.numbers import require_flag, require_real
from fastdean.wording.printable import one_line


@torch.inference_mode(False)
def score(
    model: nn.Module | StreamedModel | str | Path,
    loader: Any,
    *,
    granularity: str = "weight",
    target_modules: str | Sequence[str] = "mlp",
    tokenizer: Any = None,
    template: str | None = None,
    max_length: int | None = None,
    tokens_per_batch: int | None = None,
    skip_bad_rows: bool = False,
    loss_fn: LossFunction | None = None,
    keep_top: float | None = None,
    expert_scope: str = "expert",
    memory_budget: int | None = None,
    order: str = "auto",
    states: str | Path = "auto",
    states_budget: int | None = None,
    resume: str | Path | None = None,
    signs: bool = False,
    deterministic: bool = False,
    rank_timeout: float | None = None,
    impl: str | None = None,
    progress: bool = True,
    description: str = "score",
) -> Scores:
    """Score every weight (or MLP unit) of a model by its first-order effect on the loss.

    granularity="weight":  I_ij = E_x | W_ij * dL_x / dW_ij |
    granularity="unit":    I_j  = E_x | sum_t a_tj * dL_x / da_tj |

    with a the inputs of each MLP's down projection, one per unit.

    L_x is the cross-entropy of one example, the mean over its own target tokens, in nats; the
    absolute value is taken per example, before the mean over examples. The result does not depend
    on how examples are batched, padded or ordered, beyond rounding. The model comes back as it was
    (modes, requires_grad, config, hooks), also after an exception.

    Before the pass the hooks are tried on a short batch. Of a group or pattern, modules that do not
    take part in it exactly once are left out, with a warning and a line in the manifest's
    `coverage["left_out"]`; a suffix of a list must keep one at least.

    Under `torch.distributed` every rank passes the same loader; the examples are split over the
    ranks by their tokens, the sums are reduced once, and every rank returns the whole result. A
    model that FSDP2 (`fully_shard`) shards over all ranks is scored layer by layer: a layer's
    weights are gathered for its windows alone. It is left sharded. The ranks over which tensor
    parallel splits a model are given the same examples, and each sums what it has of the weights.

    Args:
        model: a Hugging Face causal or masked language model, or with `loss_fn` any module. The
            name of a folder or hub id, or a `StreamedModel`, is scored layer by layer, its weights
            read from their files; no more than one layer of them is in memory (and embedding, norms
            and head).
        loader: batches, single examples, a `datasets.Dataset`, or rows of text
            (`fastdean.data.read_examples`).
        granularity: "weight" or "unit".
        target_modules: "mlp", "self_attn", "all", a regular expression or a list of name suffixes
            (`fastdean.coupling.targets.find_targets`); of parameters that are no matrix of a Linear
            layer too, by their names ("input_layernorm.weight"), or "every" parameter. Those cost a
            forward and backward pass for each example, in a batch of its own.
        tokenizer, template, max_length: how rows of text become tokens (`fastdean.data.encode`).
        tokens_per_batch: tokens in one forward pass; None: 2048 on a GPU, 192 to 2048 on a CPU, by
            the shapes of the model's weights (`fastdean.data.batching.default_tokens_per_batch`).
        skip_bad_rows: leave out rows of text that cannot be tokenised, and examples without a
            target or longer than the model's positions, rather than refuse the first. A warning
            and the manifest's `data["skipped_rows"]` count them, by their number from 0.
        loss_fn: `(outputs, batch) -> [B]` losses of the examples of a batch. The loader's batches
            are then passed to the model as they come, less `labels`.
        keep_top: keep only each matrix's top `keep_top` share of entries (sparse scores). By
            "layers" it must be given unless the sums of all targets fit into `memory_budget`, or
            without one into the memory there is.
        expert_scope: of fused experts, whose stacked weights are one matrix of a layer: whether
            `keep_top` is a share of each expert's part ("expert") or of all of it ("tensor"). Their
            scores have the stacked shape, and flat indices count in it.
        memory_budget: bytes the sums may take at a time; the targets are split over several passes,
            with the same result. By "batches" it bounds the sums alone, of all layers in a pass.
            By "layers" it bounds the sums of a window, a part of one layer, together with what the
            window holds of one batch (inputs, activations and gradients, by the shapes of the
            weights). What it cannot hold is refused with the least that would do. Of use with
            `keep_top`, or where the sums of a GPU model are to lie on the CPU.
        order: "batches": every batch through the whole model. "layers": all batches through one
            decoder layer before the next, with the same result; sums live for one layer, the layer
            runs twice, and what it returned is kept meanwhile (`states`). "auto": "layers" where
            the sums and a batch do not fit into the memory there is, or weights are offloaded;
            else "batches". A model that FSDP2 shards has no other order than "layers".
        states: where "layers" keeps what the layers returned: "device", "host", or a folder, in
            files that are gone at the end. "auto": on the device while there is room, then in the
            memory of a GPU's host, then in files of a temporary folder (`tempfile`, TMPDIR). The
            result has the same bits.
        states_budget: the most bytes of states on the device, and of those on the host; None: with
            "auto" what the memory there is allows. "device" and "host" refuse more, "auto" goes on
            in the next place.
        resume: a folder for a job layer by layer that may be killed. Called again with it, the job
            goes on in the layer it was in, with the bits of a job that was not interrupted (on
            CUDA with `deterministic=True`). Model, data, options and versions must be the same;
            what is not is named. A rank has a folder of its own in it. A finished job removes it.
            Where nothing else handles SIGTERM, it ends the process with exit code 143.
        signs: keep the sum of the gradients beside that of their absolute values, for
            `Scores.signs` and `couple(..., signs=)`. Dense sums, also those while scoring runs,
            take twice the memory, which budgets count; entries of `keep_top` take 4 bytes more
            each.
        deterministic: run under `torch.use_deterministic_algorithms(True)`, and add the examples up
            in 16 blocks in a fixed order, so that the bits are the same on 1, 2, 4, 8 and 16 ranks
            (on any other number, those of that number). A batch has examples of one block, and of
            16 / ranks blocks up to 5 sums live at a time, which budgets count.
        rank_timeout: seconds that a rank waits for another one, before it ends with an error that
            names it; None: as long as the process group waits. A rank that is killed is noticed
            before. Ranks have about as much to do, but may read their weights one after the other.
        impl: implementation of the accumulation: None (by device), or one of
            `fastdean.ops._dispatch.IMPLEMENTATIONS`.
        progress: show a progress bar, labelled `description`; by "layers" a line for each layer
            where stderr is no terminal.
    Returns:
        Scores, one entry per target weight. Of a mixture of experts the manifest's "expert_load"
        says how many tokens each expert was given.
    Raises:
        ValueError: no target matches or its weight is computed from others, an example has no
            target token, a loss is NaN or infinite, or the ranks of a distributed job were given
            different examples.
        TypeError: `model` is no module, or `loader` yields something else than dictionaries.
        RuntimeError: a target did not take part exactly once in a batch, what is captured of it is
            not the gradient of its weight, or a rank has failed, has ended or hangs.
    Source:
        DEAN (arXiv 2410.16672), importance score; unit granularity is the activation x gradient
        form.
    """
    return score_sets(
        model,
        {description: loader},
        granularity=granularity,
        target_modules=target_modules,
        tokenizer=tokenizer,
        template=template,
        max_length=max_length,
        tokens_per_batch=tokens_per_batch,
        skip_bad_rows=skip_bad_rows,
        loss_fn=loss_fn,
        keep_top=keep_top,
        expert_scope=expert_scope,
        memory_budget=memory_budget,
        order=order,
        states=states,
        states_budget=states_budget,
        resume=resume,
        signs=signs,
        deterministic=deterministic,
        rank_timeout=rank_timeout,
        impl=impl,
        progress=progress,
    )[description]


@torch.inference_mode(False)
@failing_together()
def score_sets(
    model: nn.Module | StreamedModel | str | Path,
    loaders: Mapping[str, Any],
    *,
    granularity: str = "weight",
    target_modules: str | Sequence[str] = "mlp",
    keep_top: float | None = None,
    expert_scope: str = "expert",
    memory_budget: int | None = None,
    order: str = "auto",
    states: str | Path = "auto",
    states_budget: int | None = None,
    resume: str | Path | None = None,
    signs: bool = False,
    deterministic: bool = False,
    rank_timeout: float | None = None,
    impl: str | None = None,
    progress: bool = True,
    finished: Callable[[str, Scores], object] = lambda name, scores: None,
    step: Callable[[Sequence[str]], AbstractContextManager] = lambda names: nullcontext(),
    **reading: Any,
) -> dict[str, Scores]:
    """Score several data sets; layer by layer all of them in one sweep.

    Args:
        loaders: by the name of the data set, which its progress bar shows.
        finished: called with the name and the scores of each data set as soon as they are complete.
        step: entered around the passes over the data sets of these names: batch by batch each by
            itself, layer by layer all of them.
        granularity, target_modules, keep_top, expert_scope, memory_budget, order, states,
            states_budget, resume, signs, deterministic, rank_timeout, impl, progress, reading: as
            `score` takes them.
    Returns:
        By name, in the order of `loaders`.
    Raises:
        ValueError, TypeError, RuntimeError: as `score`.
    """
    ranks = Ranks.current()
    check_rank_timeout(rank_timeout)
    ranks.limit_waiting(rank_timeout)
    given: Any = model
    stream = stream_of(given)
    model = unwrap(given) if stream is None else stream.model
    require_no_prompts(model)
    check_keep_top(keep_top)
    require_flag("signs", signs)
    require_flag("deterministic", deterministic)
    check_expert_scope(expert_scope)
    require_order(order, states, states_budget, resume)
    granularity = checked_granularity(granularity)
    is_sharded = stream is None and isinstance(model, nn.Module) and resharded(model)
    in_team = is_sharded and is_split(model)
    is_sharded = is_sharded and not in_team
    if is_sharded:
        require_shardable(order, resume, keep_top, granularity)
    if in_team:
        order = order_in_teams(order, resume, keep_top, granularity)
        ranks = in_teams(model, ranks)
    found = survey(model)
    sharded = ShardedModel(model, found.layers, ranks) if is_sharded else None
    targets = find_targets(model, target_modules, granularity, found)
    require_own_parameters(model, targets)
    if in_team:
        with ranks.failing_together():
            targets = in_blocks(targets)
        if memory_budget is not None:
            require_even_blocks(targets, ranks)
    at_a_time = sums_at_a_time(blocks_of_a_rank(ranks, deterministic))
    all_sums = all_sums_bytes(granularity, signs, at_a_time)
    # A budget that is too small is refused before anything runs. Layer by layer more is needed than
    # the sums, or less, and all of it is told at once, when the batches are known.
    may_hold = order == "auto" and keep_top is not None and granularity == "weight"
    may_hold = may_hold and at_a_time == 1
    least = least_held_bytes if may_hold else all_sums
    if memory_budget is not None:
        require_real("memory_budget", memory_budget, "a number of bytes")
        by_layers = order == "layers" or stream is not None or is_sharded
        if not by_layers and not all(least([target]) <= memory_budget for target in targets):
            split_by_memory(targets, all_sums, memory_budget)
    if stream is not None:
        require_streamable(order, keep_top, granularity)
        texts = not all(map(_read_already, loaders.values()))
        if texts and reading.get("tokenizer") is None:
            reading["tokenizer"] = stream.tokenizer
    parts: ShardedModel | StreamedModel | None = sharded or stream
    device = input_device(model) if parts is None else parts.device
    read_before = 0 if stream is None else stream.bytes_read
    dense = len(loaders) * all_sums_bytes(granularity, signs)(targets)
    if is_sharded and granularity == "weight":
        # Which are gone when their windows close.
        dense += len(loaders) * sum(target.weight.nbytes for target in targets)
    require_room_for_dense(
        "layers" if is_sharded else order, dense, keep_top, memory_budget, device
    )
    with strict_determinism(deterministic), eager(), outside_layers(parts):
        with beginning(parts) as alike:
            works = {
                name: plan_workload(
                    model, loader, ranks=ranks, deterministic=deterministic, **reading
                )
                for name, loader in loaders.items()
            }
            with evaluation_state(model), frozen(model), torch.enable_grad():
                # Of a model that is never whole a few are left here.
                run_here = decoder_layers(model) if order != "batches" else {}
                with recording(run_here) as returned:
                    sets = {
                        name: _find_scorables(
                            model, work, targets, granularity, target_modules, device, ranks, alike
                        )
                        for name, work in works.items()
                    }
        if ranks.first:
            scored = [target for each in next(iter(sets.values())) for target in each.targets]
            warn_about_coverage(model, scored, target_modules, granularity, found)
        with evaluation_state(model), frozen(model), torch.enable_grad():
            if keep_top is not None and granularity == "weight":
                sets = {
                    name: [_with_holding(s, keep_top, device, impl, ranks, signs) for s in each]
                    for name, each in sets.items()
                }
            scorables = [each for of_name in sets.values() for each in of_name]
            layers = found.layers
            # What comes after a layer that was left out was given something else.
            whole = sum(1 for _ in takewhile(run_here.__contains__, layers))
            if order == "auto" and resume is not None and ranks.agree(holds_job(resume)):
                order = "layers"
            # The same on all ranks, which must split their targets alike.
            windows = WindowMemory.of(
                model, list(layers.values()), [each.work for each in scorables], ranks
            )
            chosen = choose_order(
                order if parts is None else "layers",
                scorables,
                granularity,
                keep_top,
                memory_budget,
                windows,
                device,
                ranks,
                signs,
                at_a_time,
            )
            if parts is not None:
                chosen = Order(True, _why_by_layers(parts))
                # Who streams a model knows.
                if order == "auto" and ranks.first and sharded is not None:
                    logger.info("order='layers': %s", chosen.why)
            job = _Scoring(
                model=model,
                found=found,
                targets=targets,
                target_modules=target_modules,
                granularity=granularity,
                keep_top=keep_top,
                expert_scope=expert_scope,
                memory_budget=memory_budget,
                windows=windows,
                sets=sets,
                device=device,
                impl=impl,
                signs=signs,
                sums_at_a_time=at_a_time,
                ranks=ranks,
                shown=progress and ranks.first,
                finished=finished,
                stream=stream,
                sharded=sharded,
                read_before=read_before,
                step=step,
                returned=returned[:whole],
            )
            if chosen.by_layers:
                try:
                    return job.by_layers(chosen, states, states_budget, resume)
                except NotByLayers as error:
                    # Ranks without examples would not know of it.
                    if parts is not None:
                        raise NotByLayers(
                            f"{error}; load the model first, as a whole, for order='batches'"
                        ) from error
                    if order != "auto" or ranks.size > 1:
                        raise NotByLayers(f"{error}; use order='batches'") from error
                    logger.warning("batch by batch after all: %s", error)
                    if resume is not None:
                        discard(resume)
                    chosen = Order(False, f"not layer by layer: {error}")
            if states != "auto" and ranks.first:
                logger.warning(
                    "states=%r is not used: batch by batch no states are kept", str(states)
                )
            return job.by_batches(chosen)


def _read_already(loader: Any) -> bool:
    return isinstance(loader, Sequence) and all(isinstance(each, Example) for each in loader)


def _find_scorables(
    model: nn.Module,
    work: Workload,
    targets: Sequence[Target],
    granularity: str,
    target_modules: str | Sequence[str],
    device: torch.device,
    ranks: Ranks,
    alike: Mapping[str, str],
) -> list[Scorable]:
    """What is scored through hooks, and after it what is scored by example, over one data set."""
    hooked = [target for target in targets if not target.by_example]
    others = [target for target in targets if target.by_example]
    found = []
    if hooked:
        options = (granularity, target_modules, device, ranks, alike)
        otherwise = asked_as_parameters(hooked, target_modules)
        through_hooks = find_scorable(model, work, hooked, *options, otherwise)
        others += [target.unhooked() for target in through_hooks.unhooked]
        if through_hooks.targets:
            found.append(through_hooks)
    if others:
        found.append(find_by_example(model, work, others, target_modules, device, ranks, alike))
    return found


@dataclass(frozen=True, kw_only=True)
class _Scoring:
    """Data sets that are ready to be scored, in either order; `by_layers` may be tried first.

    Attributes:
        found: what the model is made of.
        targets: the modules that were matched.
        windows: what each window holds beside its sums, layer by layer.
        sets: of each data set the batches, and which of the targets can be scored over them; those
            that hooks score first, then those that are scored by example.
        shown: whether progress bars are.
        stream, sharded: the model, where its weights stay in their files, or are sharded over
            ranks.
        read_before: bytes of weights that the stream had read before the job.
        returned: for each layer that was run with all layers before it, a sample of what it
            returned in the last trial.
        others: as `score_sets` takes them.
    """

    model: nn.Module
    found: Survey
    targets: list[Target]
    target_modules: str | Sequence[str]
    granularity: str
    keep_top: float | None
    expert_scope: str
    memory_budget: int | None
    windows: WindowMemory
    sets: dict[str, list[Scorable]]
    device: torch.device
    impl: str | None
    signs: bool
    sums_at_a_time: int
    ranks: Ranks
    shown: bool
    finished: Callable[[str, Scores], object]
    stream: StreamedModel | None
    sharded: ShardedModel | None
    read_before: int
    step: Callable[[Sequence[str]], AbstractContextManager]
    returned: list[dict[TreePath, torch.Tensor]]

    def by_batches(self, order: Order) -> dict[str, Scores]:
        made = {}
        size = all_sums_bytes(self.granularity, self.signs, self.sums_at_a_time)
        for name, scorables in self.sets.items():
            passes = [
                (scorable, group)
                for scorable in scorables
                for group in split_by_memory(scorable.targets, size, self.memory_budget)
            ]
            entries: dict[str, ScoreEntry] = {}
            total = sum(scorable.work.examples_here for scorable, _ in passes)
            with self.step([name]), _progress_bar(total, "ex", name, self.shown) as bar:
                for scorable, group in passes:
                    with self.ranks.running_together():
                        sums = run_pass(
                            scorable,
                            group,
                            self.granularity,
                            self.device,
                            self.impl,
                            bar,
                            self.signs,
                        )
                    entries |= self._entries(scorable, group, sums)
            made[name] = self._scores(name, entries, order)
        return made

    @property
    def _scorables(self) -> list[tuple[str, Scorable]]:
        """Of all data sets, with their names."""
        return [(name, each) for name, of_name in self.sets.items() for each in of_name]

    def by_layers(
        self,
        order: Order,
        states: str | Path,
        states_budget: int | None,
        resume: str | Path | None,
    ) -> dict[str, Scores]:
        entries: dict[str, dict[str, ScoreEntry]] = {name: {} for name in self.sets}
        layers = self.found.layers
        scorables = self._scorables
        _, last = scorables[-1]
        with (
            self.step(list(self.sets)),
            sweep_progress(", ".join(self.sets), shown=self.shown) as progress,
            self._keeping(layers, states, states_budget, resume) as (home, milestones),
        ):

            def of_set(number: int, name: str, scorable: Scorable) -> Set:
                kept = {}
                if isinstance(home, KeptFiles):
                    own = self.stream is None and self.sharded is None and not self.ranks.teams
                    kept = kept_entries(home, number, scorable.targets, weights=own)
                    entries[name] |= kept

                def finished(group: Sequence[Target], sums: dict[str, Accumulator]) -> None:
                    made = self._entries(scorable, group, sums)
                    entries[name].update(made)
                    if isinstance(home, KeptFiles):
                        keep_entries(home, number, made)

                return Set(scorable, finished, set(kept))

            Sweep(
                [of_set(n, name, scorable) for n, (name, scorable) in enumerate(scorables)],
                layers,
                self._windows(layers),
                granularity=self.granularity,
                device=self.device,
                impl=self.impl,
                states=States.of(home) if isinstance(home, KeptFiles) else States(home),
                ranks=self.ranks,
                split=self._split,
                progress=progress,
                rehearsal=Rehearsal(last.tried or last.work, self.returned),
                milestones=milestones,
                signs=self.signs,
                fit_scales=self.stream is not None,
            ).run()
            used, read = home.used(), milestones.bytes_read + self._read_here()
            return {
                name: self._scores(name, entries.pop(name), order, used, read) for name in self.sets
            }

    @contextmanager
    def _keeping(
        self,
        layers: Mapping[str, nn.Module],
        states: str | Path,
        states_budget: int | None,
        resume: str | Path | None,
    ) -> Iterator[tuple[Home, Milestones]]:
        """Where states are kept, and who hears of the progress."""
        sets = [scorable for _, scorable in self._scorables]
        if resume is None:
            reserve = reserved_bytes(
                self.windows,
                sets,
                self.granularity,
                self.memory_budget,
                dense=self.keep_top is None,
                signs=self.signs,
                sums_at_a_time=self.sums_at_a_time,
            )
            with states_home(states, states_budget, self.device, reserve) as home:
                yield home, Milestones()
            return
        modules = self.target_modules
        options = {
            "granularity": self.granularity,
            "target_modules": modules if isinstance(modules, str) else list(modules),
            "keep_top": self.keep_top,
            "expert_scope": self.expert_scope,
            "memory_budget": self.memory_budget,
            "impl": self.impl,
            "signs": self.signs,
            # Steps follow from it.
            "matrices that are held": json_digest([sorted(self._held(each)) for each in sets]),
        }
        named = {
            f"{name}, by example" if scorable.by_example else name: scorable
            for name, scorable in self._scorables
        }
        parts = job_parts(self.model, layers, self.targets, named, options, self.ranks)
        results = sum(
            entries_bytes(s.targets, self.granularity, self.keep_top, self.signs) for s in sets
        )
        windows = self._windows(layers)
        whole = self.stream is None and self.sharded is None
        resident = resident_layers(layers) if whole else ()
        with resumable(
            resume, parts, layers, windows, resident, self.ranks, results, self._read_here
        ) as job:
            yield job.home, job

    def _read_here(self) -> int:
        """Bytes of streamed weights that this process has read for the job."""
        return 0 if self.stream is None else self.stream.bytes_read - self.read_before

    def _split(self, scorable: Scorable, targets: Sequence[Target]) -> list[list[Target]]:
        size = together_bytes(scorable.holding, self.granularity, self.signs, self.sums_at_a_time)
        return self.windows.split(targets, size, self.memory_budget)

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

    def _windows(self, layers: Mapping[str, nn.Module]) -> Windows:
        return self.sharded or self.stream or OffloadedModel(self.model, layers)

    def _entries(
        self, scorable: Scorable, group: Sequence[Target], sums: dict[str, Accumulator]
    ) -> dict[str, ScoreEntry]:
        off_device = self.memory_budget is not None
        made = finish(
            sums,
            group,
            self.ranks,
            scorable.work.num_examples,
            self.keep_top,
            self.expert_scope,
            off_device,
            self._weight,
        )
        if (self.stream or self.sharded) and self.granularity == "unit":
            # The weight is gone when its layer is through.
            made = {name: replace(entry, weight=None) for name, entry in made.items()}
        return made

    def _weight(self, target: Target) -> torch.Tensor:
        """The weight of a target, whose window is open, as its score is to have it."""
        if self.sharded is None:
            return target.materialised()
        weight = self.sharded.original(target.module, target.leaf)
        if self.keep_top is not None or self.granularity == "unit":
            return weight
        # It outlives its window with the dense sums, and goes where they do.
        return weight.to("cpu" if self.memory_budget is not None else weight.device, copy=True)

    def _scores(
        self,
        name: str,
        entries: dict[str, ScoreEntry],
        order: Order,
        used: Mapping[str, int] | None = None,
        read: int = 0,
    ) -> Scores:
        scorables = self.sets[name]
        num_examples = scorables[0].work.num_examples
        entries = {
            target.parameter: joined(
                target, entries, num_examples, self.keep_top, self.expert_scope
            )
            for scorable in scorables
            for target in scorable.targets
        }
        manifest = score_manifest(
            self.model,
            self.targets,
            scorables,
            entries,
            self.granularity,
            self.target_modules,
            self.keep_top,
            self.expert_scope,
            self.ranks,
            self.found,
        )
        warn_about_unseen(entries)
        described = order.described(used)
        if order.by_layers:
            held = sum(len(self._held(scorable)) for scorable in scorables)
            described["matrices"] = {"held": held, "summed": len(entries) - held}
        if self.stream is not None:
            described["bytes_of_weights_read"] = read
        peak = peak_memory(self.device)
        if peak is not None and self.ranks.first:
            logger.info("%s: at most %.2f GB of memory so far", name, peak / 1e9)
        scores = Scores(
            entries,
            granularity=self.granularity,
            num_examples=num_examples,
            keep_top=self.keep_top,
            expert_scope=self.expert_scope,
            manifest=manifest | {"order": described, "costs": {"peak_memory": peak}},
        )
        self.finished(name, scores)
        return scores


def _why_by_layers(parts: ShardedModel | StreamedModel) -> str:
    if isinstance(parts, ShardedModel):
        return "its weights are sharded over the ranks, and a layer's are gathered twice"
    return "its weights stay in their files"


def _with_holding(
    scorable: Scorable,
    keep_top: float,
    device: torch.device,
    impl: str | None,
    ranks: Ranks,
    signs: bool,
) -> Scorable:
    """With which of its targets a window may keep the inputs and gradients of."""
    if ranks.size > 1 or len(scorable.work.blocks) > 1 or scorable.by_example:
        # Top entries of a rank's or a block's own examples are not those of all.
        return scorable
    pairs = {
        target.parameter: pair
        for target in scorable.targets
        if (pair := scorable.pairs.get(target.parameter)) and takes(target, pair, device, impl)
    }
    work = scorable.work
    holding = Holding(work.all_rows, work.num_examples, keep_top, pairs, signs)
    return replace(scorable, holding=holding)


def finish(
    accumulators: dict[str, Accumulator],
    targets: Sequence[Target],
    ranks: Ranks,
    num_examples: int,
    keep_top: float | None,
    expert_scope: str,
    off_device: bool,
    weight_of: Callable[[Target], torch.Tensor] = Target.materialised,
) -> dict[str, ScoreEntry]:
    """Sum over the ranks and keep each matrix's top entries; empties `accumulators`.

    By the targets' keys: experts of one tensor may come in parts.

    Args:
        off_device: dense sums go to the CPU.
        weight_of: the weight of a target.
    """
    entries = {}
    for target in targets:
        weight = weight_of(target)
        of = weight.numel() if expert_scope == "tensor" and target.stacked else None
        top = (
            None
            if keep_top is None
            else Top(num_examples, keep_top, expert_scope, target.stacked, of)
        )
        with naming_matrix(target.parameter):
            accumulator = accumulators.pop(target.key)
            if ranks.teams:
                entry = team_entry(accumulator, target, ranks, top)
            else:
                part = weight_of_part(target, weight)
                entry = reduced_entry(accumulator, part, ranks, top)
        if keep_top is not None and entry.index is None:
            entry = keep_entry(
                target.parameter, entry.scoped(expert_scope), num_examples, keep_top, of
            )
        elif off_device:
            signed = None if entry.signed is None else entry.signed.cpu()
            entry = replace(entry, sums=entry.sums.cpu(), signed=signed)
        summed = partial(team_fingerprint, ranks) if ranks.teams else fingerprint
        entries[target.key] = placed(entry, target, weight, summed)
    return entries


def _progress_bar(total: int, unit: str, description: str, shown: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=one_line(titled(description)), unit=unit, disable=not shown)
