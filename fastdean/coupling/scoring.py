"""`score()`: importance of every weight on a set of examples, in one pass over them.

The order of things: read the examples and plan batches (workloads.py), freeze the model so that
autograd computes the forward pass and activation gradients only (model_state.py), try what the
hooks capture (trial.py), hook the targets (capture.py), and let each hook hand its pair (input,
output gradient) to an accumulator.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdean.coupling.accumulators import ACCUMULATORS, Accumulator, accumulator_bytes
from fastdean.coupling.capture import Sums, capturing
from fastdean.coupling.loss_scale import LossScale, row_factors
from fastdean.coupling.scores import ScoreEntry, Scores, check_keep_top, keep_entry
from fastdean.coupling.targets import Target, coverage, find_targets
from fastdean.coupling.trial import Settled, settle
from fastdean.coupling.workloads import BatchLosses, LossFunction, Workload, plan_workload
from fastdean.data.batching import send
from fastdean.models.adapters import require_no_prompts
from fastdean.models.distributed import Ranks
from fastdean.models.model_state import (
    eager,
    evaluation_state,
    execution_device,
    frozen,
    input_device,
    materialised_weight,
    strict_determinism,
    unwrap,
)
from fastdean.wording.doing import titled
from fastdean.wording.log import logger
from fastdean.wording.mendable import StateError
from fastdean.wording.printable import one_line

# How often the scale of a batch that overflowed is lowered.
_LOWERED = 4


@torch.inference_mode(False)
def score(
    model: nn.Module,
    loader: Any,
    *,
    granularity: str = "weight",
    target_modules: str | Sequence[str] = "mlp",
    tokenizer: Any = None,
    template: str | None = None,
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

    Before the pass the hooks are tried on a short batch (trial.py). Of a group or pattern, modules
    that do not take part in it exactly once are left out, with a warning and a line in the
    manifest's `coverage["left_out"]`; a suffix of a list must keep one at least.

    Under `torch.distributed` every rank passes the same loader; the examples are split over the
    ranks, the sums are reduced once, and every rank returns the whole result.

    Args:
        model: a Hugging Face causal or masked language model, or with `loss_fn` any module.
        loader: batches, single examples, a `datasets.Dataset`, or rows of text
            (`fastdean.data.read_examples`).
        granularity: "weight" or "neuron".
        target_modules: "mlp", "self_attn", "all", a regular expression or a list of name suffixes
            (`fastdean.coupling.targets.find_targets`).
        tokenizer, template, max_length: how rows of text become tokens (`fastdean.data.encode`).
        tokens_per_batch: tokens in one forward pass; None: 2048 on a GPU, 192 to 2048 on a CPU, by
            the shapes of the model's weights (`fastdean.data.batching.default_tokens_per_batch`).
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
        ValueError: no target matches or its weight is computed from others, an example has no
            target token, a loss is NaN or infinite, or the ranks of a distributed job were given
            different examples.
        TypeError: `model` is no module, or `loader` yields something else than dictionaries.
        RuntimeError: a target did not take part exactly once in a batch, or what is captured of it
            is not the gradient of its weight.
    Source:
        DEAN (arXiv 2410.16672), importance score; unit granularity is the activation x gradient
        form.
    """
    model = unwrap(model)
    require_no_prompts(model)
    check_keep_top(keep_top)
    targets = find_targets(model, target_modules, granularity)
    _require_weights_of_their_own(model, targets)
    _split_by_memory(targets, granularity, memory_budget)
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
        with ranks.failing_together():
            settled = settle(model, work, targets, granularity, device)
            _require_each_wanted(settled, target_modules)
        _say_what_was_found(settled, ranks)
        work = settled.work
        passes = _split_by_memory(settled.targets, granularity, memory_budget)
        total = work.examples_here * len(passes)
        bar = stack.enter_context(_progress_bar(total, description, progress and ranks.first))
        entries: dict[str, ScoreEntry] = {}
        for group in passes:
            with ranks.failing_together():
                accumulators = _run_pass(settled, group, granularity, device, impl, bar)
            for accumulator in accumulators.values():
                ranks.sum_(accumulator.tensors())
            for target in group:
                entry = accumulators.pop(target.parameter).entry(materialised_weight(target.module))
                if keep_top is not None:
                    entry = keep_entry(target.parameter, entry, work.num_examples, keep_top)
                elif memory_budget is not None:
                    entry = replace(entry, sums=entry.sums.cpu())
                entries[target.parameter] = entry

    covered = coverage(model, targets, entries) | {"left_out": settled.left_out}
    manifest = _manifest(model, work, covered, granularity, target_modules, ranks)
    return Scores(
        entries,
        granularity=granularity,
        num_examples=work.num_examples,
        keep_top=keep_top,
        manifest=manifest
        | ({} if keep_top is None else {"keep_top": keep_top})
        | ({} if settled.scale is None else {"loss_scale": settled.scale.factor})
        | ({} if settled.alone is None else {"one_example_per_batch": settled.alone}),
    )


def _run_pass(
    settled: Settled,
    targets: Sequence[Target],
    granularity: str,
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
    sums = Sums(accumulators, settled.sequence_first)
    check = _LaggedCheck(bar)
    finite: list[Tensor] = []
    with (
        capturing(targets, granularity, sums.receive),
        closing(settled.work.losses(device)) as batches,
    ):
        for batch in batches:
            losses = _LossesUnderway(batch)
            _differentiate(batch, sums, settled.scale)
            if settled.scale is not None:
                finite.append(_together(sums.finite(), accumulators, batch.values.device))
            # Before the next forward pass, not after it: the losses hold this batch's graph.
            del batch
            check.queued(losses)
        check.finish()
    if settled.scale is not None:
        _add_what_overflowed(settled, targets, granularity, sums, finite, device)
        for accumulator in accumulators.values():
            for tensor in accumulator.tensors():
                tensor.mul_(1 / settled.scale.factor)
    return accumulators


def _differentiate(
    batch: BatchLosses,
    sums: Sums,
    scale: LossScale | None,
    lowered: LossScale | None = None,
    wanted: Collection[str] | None = None,
) -> None:
    """Run the backward pass of a batch, from which the hooks add to the sums.

    Args:
        lowered, wanted: another scale for this batch, and the parameters that it is for.
    """
    if scale is None:
        sums.expect(batch.segments, batch.rows)
        loss = batch.values.sum()
    else:
        device = batch.values.device
        for_x, for_g = row_factors(batch.segments, batch.averaged, batch.rows)
        if lowered is None:
            # Powers of two: exact in half precision, in which the products stay.
            for_x, for_g = for_x.half(), for_g.half()
        else:
            for_g = for_g * (scale.factor / lowered.factor)
        sums.expect(batch.segments, batch.rows, (send(for_x, device), send(for_g, device)), wanted)
        factors = (lowered or scale).of_losses(batch.averaged)
        loss = (batch.values.float() * send(factors, device)).sum()
    if loss.requires_grad:
        loss.backward()
    sums.require_complete()


def _add_what_overflowed(
    settled: Settled,
    targets: Sequence[Target],
    granularity: str,
    sums: Sums,
    finite: Sequence[Tensor],
    device: torch.device,
) -> None:
    """Do those batches again, with less and less of a scale, for the targets they left out.

    Each pair of a batch and a target is added once, at the first scale that leaves it finite.
    """
    names = [target.parameter for target in targets]
    missing = {
        number: {name for name, whole in zip(names, flags, strict=True) if not whole}
        for number, flags in enumerate(torch.stack(list(finite)).tolist() if finite else ())
        if not all(flags)
    }
    for number, wanted in missing.items():
        scale = settled.scale
        for _ in range(_LOWERED):
            scale = scale.lower()
            with (
                capturing(targets, granularity, sums.receive),
                closing(settled.work.only([number]).losses(device)) as batches,
            ):
                batch = next(batches)
                example = batch.examples[0]
                _differentiate(batch, sums, settled.scale, scale, wanted)
                del batch
                wanted = {name for name, whole in sums.finite().items() if not bool(whole)}
            if not wanted:
                break
        else:
            raise StateError(
                f"gradients must be finite in float16, got others in the batch of example "
                f"{example} for {min(wanted)}, whatever the loss is multiplied by; load the model "
                "in bfloat16 or float32"
            )


def _together(flags: Mapping[str, Tensor], names: Iterable[str], device: torch.device) -> Tensor:
    """The flags as one tensor, in the order of the names."""
    return torch.stack([flags[name].to(device) for name in names])


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

    with tqdm(total=total, desc=one_line(titled(description)), unit="ex", disable=not shown) as bar:
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


def _require_weights_of_their_own(model: nn.Module, targets: Sequence[Target]) -> None:
    """Refuse what can be neither differentiated here nor edited later."""
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ValueError(
                f"model must have parameters that autograd can use, got {name}, made under "
                "torch.inference_mode(); load the model outside of it"
            )
    for target in targets:
        if target.module._parameters.get("weight") is None:
            raise ValueError(
                f"{target.parameter} must be a parameter, got a tensor that is computed from "
                "others (a parametrization, weight or spectral norm, pruning); make it permanent, "
                "for example with torch.nn.utils.parametrize.remove_parametrizations"
            )


def _require_each_wanted(settled: Settled, target_modules: str | Sequence[str]) -> None:
    """Whoever names a group gets what of it can be scored; nothing that was named goes missing."""
    text = isinstance(target_modules, str)
    for suffix in target_modules.replace(",", " ").split() if text else target_modules:
        names = [target.name for target in settled.targets]
        if not any(name == suffix or name.endswith(f".{suffix}") for name in names):
            for name, reason in settled.left_out.items():
                if name == suffix or name.endswith(f".{suffix}"):
                    raise StateError(reason)


def _say_what_was_found(settled: Settled, ranks: Ranks) -> None:
    if settled.left_out and ranks.first:
        logger.warning(
            "%d matched modules are left out of the scores: %s",
            len(settled.left_out),
            next(iter(settled.left_out.values())),
        )
    if settled.alone is not None and ranks.first:
        logger.warning(
            "examples are scored one at a time: in a batch of several, the rows of %s could not be "
            "told apart by example",
            settled.alone,
        )


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
    from fastdean.files.provenance import now, public_name, versions

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
