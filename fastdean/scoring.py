"""`score()`: importance of every weight on a set of examples, in one pass over them.

The order of things: read the examples and plan batches (workloads.py), freeze the model so that
autograd computes the forward pass and activation gradients only (model_state.py), hook the targets
(capture.py), and let each hook hand its pair (input, output gradient) to an accumulator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastdean._logging import logger
from fastdean.accumulators import ACCUMULATORS, Accumulator, accumulator_bytes
from fastdean.capture import Capture
from fastdean.distributed import Ranks
from fastdean.model_state import (
    eager,
    evaluation_state,
    execution_device,
    frozen,
    input_device,
    materialised_weight,
    strict_determinism,
    unwrap,
)
from fastdean.printable import one_line
from fastdean.scores import ScoreEntry, Scores, check_keep_top, keep_entry
from fastdean.targets import Target, coverage, find_targets
from fastdean.workloads import BatchLosses, LossFunction, Workload, plan_workload


@torch.inference_mode(False)
def score(
    model: nn.Module,
    loader: Any,
    *,
    granularity: str = "weight",
    target_modules: str | Sequence[str] = "mlp",
    tokenizer: Any = None,
    template: str = "raw",
    max_length: int | None = None,
    tokens_per_batch: int | None = None,
    loss_fn: LossFunction | None = None,
    keep_top: float | None = None,
    memory_budget: int | None = None,
    deterministic: bool = False,
    impl: str | None = None,
    progress: bool = True,
    description: str = "score",
) -> Scores:
    """Score every weight (or MLP unit) of a model by its first-order effect on the loss.

    granularity="weight":  I_ij = E_x | W_ij * dL_x / dW_ij |
    granularity="neuron":  I_j  = E_x | sum_t a_tj * dL_x / da_tj |

    with a the inputs of each MLP's down projection, one per unit.

    L_x is the cross-entropy of one example, the mean over its own target tokens, in nats; the
    absolute value is taken per example, before the mean over examples. The result does not depend
    on how examples are batched, padded or ordered, beyond rounding. The model comes back as it was
    (modes, requires_grad, config, hooks), also after an exception.

    Under `torch.distributed` every rank passes the same loader; the examples are split over the
    ranks, the sums are reduced once, and every rank returns the whole result.

    Args:
        model: a Hugging Face causal or masked language model, or with `loss_fn` any module.
        loader: batches, single examples, a `datasets.Dataset`, or rows of text
            (`fastdean.data.read_examples`).
        granularity: "weight" or "neuron".
        target_modules: "mlp", "self_attn", "all", a regular expression or a list of name suffixes
            (`fastdean.targets.find_targets`).
        tokenizer, template, max_length: how rows of text become tokens (`fastdean.data.encode`).
        tokens_per_batch: tokens in one forward pass; None: 2048 on a GPU, 192 on a CPU.
        loss_fn: `(outputs, batch) -> [B]` losses of the examples of a batch. The loader's batches
            are then passed to the model as they come, less `labels`.
        keep_top: keep only each matrix's top `keep_top` share of entries (sparse scores).
        memory_budget: bytes the sums may take at a time; the targets are split over several passes,
            with the same result. Of use with `keep_top`, or where the sums of a GPU model are to
            lie on the CPU.
        deterministic: run under `torch.use_deterministic_algorithms(True)`.
        impl: implementation of the accumulation: None (by device), or one of
            `fastdean.ops._dispatch.IMPLEMENTATIONS`.
        progress: show a progress bar, labelled `description`.
    Returns:
        Scores, one entry per target weight.
    Raises:
        ValueError: no target matches, an example has no target token, a loss is NaN or infinite, or
            the ranks of a distributed job were given different examples.
        TypeError: `model` is no module, or `loader` yields something else than dictionaries.
        RuntimeError: a target did not take part exactly once in a batch, or cannot be scored here.
    Source:
        DEAN (arXiv 2410.16672), importance score; unit granularity is the activation x gradient
        form.
    """
    model = unwrap(model)
    check_keep_top(keep_top)
    targets = find_targets(model, target_modules, granularity)
    passes = _split_by_memory(targets, granularity, memory_budget)
    _warn_about_unscorable(coverage(model, targets))
    ranks = Ranks.current()
    device = input_device(model)

    with ExitStack() as stack:
        stack.enter_context(strict_determinism(deterministic))
        stack.enter_context(eager())
        work = plan_workload(
            model,
            loader,
            loss_fn=loss_fn,
            tokenizer=tokenizer,
            template=template,
            max_length=max_length,
            tokens_per_batch=tokens_per_batch,
            ranks=ranks,
        )
        stack.enter_context(evaluation_state(model))
        stack.enter_context(frozen(model))
        stack.enter_context(torch.enable_grad())
        total = work.examples_here * len(passes)
        bar = stack.enter_context(_progress_bar(total, description, progress and ranks.first))
        entries: dict[str, ScoreEntry] = {}
        for group in passes:
            with ranks.failing_together():
                accumulators = _run_pass(model, group, granularity, work, device, impl, bar)
            for accumulator in accumulators.values():
                ranks.sum_(accumulator.tensors())
            for target in group:
                entry = accumulators.pop(target.parameter).entry(materialised_weight(target.module))
                if keep_top is not None:
                    entry = keep_entry(target.parameter, entry, work.num_examples, keep_top)
                elif memory_budget is not None:
                    entry = replace(entry, sums=entry.sums.cpu())
                entries[target.parameter] = entry

    covered = coverage(model, targets, entries)
    manifest = _manifest(model, work, covered, granularity, target_modules, ranks)
    return Scores(
        entries,
        granularity=granularity,
        num_examples=work.num_examples,
        keep_top=keep_top,
        manifest=manifest | ({} if keep_top is None else {"keep_top": keep_top}),
    )


def _run_pass(
    model: nn.Module,
    targets: Sequence[Target],
    granularity: str,
    work: Workload,
    device: torch.device,
    impl: str | None,
    bar: Any,
) -> dict[str, Accumulator]:
    """The sums of the targets over this rank's examples, by parameter name."""
    kind = ACCUMULATORS[granularity]
    accumulators = {
        target.parameter: kind(target, execution_device(target.module, device), impl)
        for target in targets
    }
    capture = Capture(targets, accumulators, granularity)
    check = _LaggedCheck(bar)
    with capture, closing(work.losses(device)) as batches:
        for batch in batches:
            losses = _LossesUnderway(batch)
            capture.expect(batch.segments, batch.rows)
            if batch.values.requires_grad:
                batch.values.sum().backward()
            capture.require_complete()
            # Before the next forward pass, not after it: the losses hold this batch's graph.
            del batch
            check.queued(losses)
        check.finish()
    return accumulators


class _LossesUnderway:
    """A batch's losses on their way to the host, which goes on meanwhile."""

    def __init__(self, batch: BatchLosses) -> None:
        values = batch.values.detach()
        on_cuda = values.device.type == "cuda"
        self._examples = batch.examples
        # Asynchronous copies from CUDA arrive in pinned memory; of other devices none is promised.
        self._values = values.to("cpu", non_blocking=on_cuda)
        self._arrival = torch.cuda.Event() if on_cuda else None
        if self._arrival is not None:
            self._arrival.record(torch.cuda.current_stream(values.device))

    def require_finite(self) -> int:
        """Wait for the losses and return how many they are; ValueError names one's example."""
        if self._arrival is not None:
            self._arrival.synchronize()
        losses = self._values.tolist()
        for example, loss in zip(self._examples, losses, strict=True):
            if not math.isfinite(loss):
                raise ValueError(
                    f"loss must be finite, got {loss} for example {example}; check the model's "
                    "weights and dtype, and that example's tokens"
                )
        return len(losses)


class _LaggedCheck:
    """Looks at the losses of a batch once the next one is on the device's queue.

    The device then always has a batch to work on while the host looks, and the host is never more
    than one batch ahead. The progress bar shows what was looked at.
    """

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._last: _LossesUnderway | None = None

    def queued(self, losses: _LossesUnderway) -> None:
        """Say that a whole batch has been queued; check the one before it."""
        self.finish()
        self._last = losses

    def finish(self) -> None:
        """Check what has not been checked."""
        last, self._last = self._last, None
        if last is not None:
            self._bar.update(last.require_finite())


@contextmanager
def _progress_bar(total: int, description: str, shown: bool) -> Iterator[Any]:
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=one_line(description), unit="ex", disable=not shown) as bar:
        yield bar


def _split_by_memory(
    targets: Sequence[Target], granularity: str, memory_budget: int | None
) -> list[list[Target]]:
    if memory_budget is None:
        return [list(targets)]
    passes: list[list[Target]] = []
    used = 0
    for target in targets:
        size = accumulator_bytes(target, granularity)
        if size > memory_budget:
            raise ValueError(
                f"memory_budget must hold the sums of at least one matrix, {size:,} bytes for "
                f"{target.parameter}, got {memory_budget:,}; raise it or leave it out"
            )
        if not passes or used + size > memory_budget:
            passes.append([])
            used = 0
        passes[-1].append(target)
        used += size
    return passes


def _warn_about_unscorable(covered: Mapping[str, Any]) -> None:
    missed = sum(covered["unscorable"].values())
    if missed > 0.05 * covered["model_parameters"]:
        names = list(covered["unscorable"])
        logger.warning(
            "%.0f %% of the model's parameters lie in its layers outside any Linear module and are "
            "not scored (%d tensors, such as %s)",
            100 * missed / covered["model_parameters"],
            len(names),
            names[0],
        )


def _manifest(
    model: nn.Module,
    work: Workload,
    covered: dict[str, Any],
    granularity: str,
    target_modules: str | Sequence[str],
    ranks: Ranks,
) -> dict[str, Any]:
    from fastdean.provenance import now, public_name, versions

    config = getattr(model, "config", None)
    return {
        "created": now(),
        "model": {
            # A manifest travels with the mask.
            "name": public_name(getattr(config, "_name_or_path", None) or "")
            or type(model).__name__,
            "class": type(model).__name__,
            "parameters": covered["model_parameters"],
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        },
        "granularity": granularity,
        "target_modules": target_modules
        if isinstance(target_modules, str)
        else list(target_modules),
        "coverage": covered,
        "importance": "mean over examples of the per-example absolute value",
        "accumulation": "float32",
        "ranks": ranks.size,
        "versions": versions(),
        **work.describe(),
    }
