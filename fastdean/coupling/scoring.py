"""`score()`: importance of every weight on a set of examples, in one pass over them.

Find the targets, make batches, and for each batch run the model forward, take each example's loss
and run it backward; hooks hand every target's input and gradient to its accumulator. At the end the
sums become entries of `Scores`. README.md says which file does what.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdean.coupling.asked import Asked
from fastdean.coupling.layers.window_memory import WindowMemory
from fastdean.coupling.order import choose_order
from fastdean.coupling.results.scores import Scores
from fastdean.coupling.same_job import require_same_arguments, require_same_weights
from fastdean.coupling.scoring_job import ScoringJob
from fastdean.coupling.subject import Subject
from fastdean.coupling.tried_sets import try_sets
from fastdean.coupling.workloads.custom_loss import LossFunction
from fastdean.default_device import cpu_by_default
from fastdean.models.experts.products import running_experts_alike
from fastdean.models.layers.streaming import StreamedModel
from fastdean.models.model_state import eager, evaluation_state, frozen, strict_determinism
from fastdean.models.ranks.distributed import Ranks, check_rank_timeout, failing_together
from fastdean.wording.granularity import checked_granularity
from fastdean.wording.log import logger
from fastdean.wording.mendable import InputTypeError


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

    `model` and `loss_fn` run with the CPU as the default device, whatever
    `torch.set_default_device` was called with: they must say where else a tensor is to lie.

    Args:
        model: a Hugging Face causal or masked language model, or with `loss_fn` any module. The
            name of a folder or hub id, or a `StreamedModel`, is scored layer by layer, its weights
            read from their files; no more than one layer of them is in memory (and embedding, norms
            and head).
        loader: batches, single examples, a `datasets.Dataset`, or rows of text
            (`fastdean.data.read_examples`).
        granularity: "weight" or "unit".
        target_modules: "mlp", "self_attn", "all", a regular expression or a list of name suffixes
            (`fastdean.coupling.targets.finding.find_targets`); of parameters that are no matrix of
            a Linear layer too, by their names ("input_layernorm.weight"), or "every" parameter.
            Those cost a forward and backward pass for each example, in a batch of its own.
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
            what is not is named. A rank has a folder of its own in it; another number of ranks
            takes over what is finished. A finished job removes it.
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
            different examples, models or arguments.
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


@cpu_by_default
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
    _require_names(loaders)
    ranks = Ranks.current()
    check_rank_timeout(rank_timeout)
    ranks.limit_waiting(rank_timeout)
    asked = Asked(
        granularity=checked_granularity(granularity),
        target_modules=target_modules,
        keep_top=keep_top,
        expert_scope=expert_scope,
        memory_budget=memory_budget,
        order=order,
        states=states,
        states_budget=states_budget,
        resume=resume,
        signs=signs,
        deterministic=deterministic,
        impl=impl,
    )
    subject = Subject.of(model, ranks)
    require_same_arguments(asked, len(loaders), subject, ranks)
    if ranks.size > 1 and ranks.first:
        logger.info("scoring on %s", subject.ranks.described())
    asked = subject.fitting(asked)
    targets = subject.targets(asked)
    require_same_weights(targets, subject, ranks)
    reading = dict(subject.with_tokenizer(reading, loaders))
    subject.require_room(asked, targets, len(loaders))
    stacks = {target.module for target in targets if target.stacked}
    with (
        strict_determinism(deterministic),
        running_experts_alike(stacks if deterministic else ()),
        eager(),
        subject.own_autocast(),
        subject.outside_layers(),
    ):
        sets = try_sets(subject, asked, targets, loaders, reading)
        with evaluation_state(subject.model), frozen(subject.model), torch.enable_grad():
            works = [scorable.work for scorable in sets.scorables]
            layers = list(subject.layers.values())
            job = ScoringJob(
                subject=subject,
                asked=asked,
                targets=targets,
                sets=sets,
                windows=WindowMemory.of(subject.model, layers, works, subject.ranks),
                shown=progress and ranks.first,
                finished=finished,
                step=step,
            )
            chosen = choose_order(
                asked, subject.order, sets.scorables, job.windows, subject.device, subject.ranks
            )
            return job.run(chosen)


def _require_names(loaders: Mapping[str, Any]) -> None:
    if not loaders:
        raise ValueError("loaders must have at least one data set, got none; name one")
    for name in loaders:
        if not isinstance(name, str):
            raise InputTypeError(
                f"description must be a text, which names the data set, got {type(name).__name__}"
            )
