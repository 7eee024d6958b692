"""`score()`: importance of every weight on a set of examples, in one pass over them.

The order of things: read the examples, plan batches, freeze the model so that autograd computes the
forward pass and activation gradients only, hook the targets, and let each hook hand its pair
(input, output gradient) to an accumulator. With collapse.py and forward.py the only code that hooks
a module.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdean._logging import logger
from fastdean.accumulators import ACCUMULATORS, Accumulator, accumulator_bytes
from fastdean.batching import (
    Batch,
    default_tokens_per_batch,
    plan_batches,
    require_targets,
)
from fastdean.data import IGNORE_INDEX, Example, read_examples
from fastdean.distributed import Ranks
from fastdean.forward import (
    TargetLogits,
    evaluation_state,
    input_device,
    label_shift,
    packing_is_exact,
    target_losses,
    unwrap,
)
from fastdean.scores import ScoreEntry, Scores, check_keep_top, examples_digest, keep_entry
from fastdean.targets import Target, coverage, find_targets

LossFunction = Callable[[Any, Mapping[str, Any]], Tensor]


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
        tokens_per_batch: tokens in one forward pass; None: 2048 on a GPU, 384 on a CPU.
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
    covered = coverage(model, targets)
    _warn_about_unscorable(covered)
    ranks = Ranks.current()
    device = input_device(model)

    entries: dict[str, ScoreEntry] = {}
    with ExitStack() as stack:
        stack.enter_context(_strict_determinism(deterministic))
        stack.enter_context(_eager())
        with ranks.failing_together():
            if loss_fn is None:
                work = _LanguageModelling.plan(
                    model, loader, tokenizer, template, max_length, tokens_per_batch, ranks
                )
            else:
                work = _CustomLoss.plan(model, loader, loss_fn, ranks)
        _require_same_examples(work, ranks)
        stack.enter_context(evaluation_state(model))
        stack.enter_context(_frozen(model))
        stack.enter_context(torch.enable_grad())
        bar = stack.enter_context(
            _progress_bar(work.examples_here * len(passes), description, progress and ranks.first)
        )
        for group in passes:
            with ranks.failing_together():
                accumulators = {
                    target.parameter: ACCUMULATORS[granularity](
                        target, _device_of(target, device), impl
                    )
                    for target in group
                }
                _run_pass(model, group, accumulators, granularity, work, device, bar)
            for accumulator in accumulators.values():
                ranks.sum_(accumulator.tensors())
            for target in group:
                entry = accumulators.pop(target.parameter).entry(_weight_of(target))
                if keep_top is not None:
                    entry = keep_entry(target.parameter, entry, work.num_examples, keep_top)
                elif memory_budget is not None:
                    entry = _on_cpu(entry)
                entries[target.parameter] = entry

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
    accumulators: Mapping[str, Accumulator],
    granularity: str,
    work: _LanguageModelling | _CustomLoss,
    device: torch.device,
    bar: Any,
) -> None:
    capture = _Capture(targets, accumulators, granularity)
    with capture, work.open():
        for losses, segments, rows in work.losses(device):
            capture.expect(segments, rows)
            if losses.requires_grad:
                losses.sum().backward()
            capture.require_complete()
            work.check(losses)
            bar.update(losses.numel())


class _Capture:
    """Hooks that pair every target's input with the gradient of its output, batch after batch.

    The graph starts at the lowest targets: where nothing below a target carries a gradient, its
    hook begins one, so that no backward pass goes deeper than the targets need.
    """

    def __init__(
        self, targets: Sequence[Target], accumulators: Mapping[str, Accumulator], granularity: str
    ) -> None:
        self._targets = targets
        self._accumulators = accumulators
        self._granularity = granularity
        self._handles: list = []
        self._fired: dict[str, int] = {}
        self._segments: Tensor | None = None
        self._rows = 0

    def __enter__(self) -> None:
        for target in self._targets:
            if self._granularity == "weight":
                handle = target.module.register_forward_hook(
                    self._forward_hook(target), with_kwargs=True
                )
            else:
                handle = target.module.register_forward_pre_hook(
                    self._unit_hook(target), with_kwargs=True
                )
            self._handles.append(handle)

    def __exit__(self, *exc_info: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def expect(self, segments: Tensor, rows: int) -> None:
        """Say how the rows that the next backward pass delivers belong to examples."""
        self._segments, self._rows, self._fired = segments, rows, {}

    def require_complete(self) -> None:
        for target in self._targets:
            times = self._fired.get(target.parameter, 0)
            if times != 1:
                raise RuntimeError(
                    f"{target.name} must take part in the loss exactly once per batch, got {times} "
                    "times; modules that are shared between layers or skipped cannot be scored, so "
                    "leave it out of target_modules"
                )

    def _forward_hook(self, target: Target) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
            x = (args[0] if args else _only(kwargs)).detach()
            if not output.requires_grad:
                # A clone, because a leaf that requires grad must not be changed in place later.
                output = output.detach().requires_grad_(True).clone()
            if output.requires_grad:
                self._listen(target, x, _unviewed(output))
            return output

        return hook

    def _unit_hook(self, target: Target) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            a = args[0] if args else _only(kwargs)
            if not a.requires_grad:
                a = a.detach().requires_grad_(True)
            if a.requires_grad:
                self._listen(target, a.detach(), a)
            return (a, *args[1:]), {} if not args else kwargs

        return hook

    def _listen(self, target: Target, x: Tensor, differentiated: Tensor) -> None:
        # Autograd keeps no copy of x for a frozen weight, and so would not notice a change to it.
        version = x._version

        def deliver(g: Tensor) -> None:
            if x._version != version:
                raise RuntimeError(
                    f"{target.name} must have an input that stays as it was until the backward "
                    "pass, got one that was changed in place; leave it out of target_modules"
                )
            self._deliver(target, x, g)

        differentiated.register_hook(deliver)

    def _deliver(self, target: Target, x: Tensor, g: Tensor) -> None:
        # Under autocast a layer computes with its input cast to the dtype of its output.
        x, g = x.to(g.dtype).flatten(0, -2), g.flatten(0, -2)
        if x.shape[0] != self._rows:
            raise RuntimeError(
                f"{target.name} must see every token of the batch once, {self._rows} rows, got "
                f"{x.shape[0]}; modules behind a router or a pooling cannot be scored through "
                "hooks, so leave it out of target_modules"
            )
        self._fired[target.parameter] = self._fired.get(target.parameter, 0) + 1
        self._accumulators[target.parameter].add_(x, g, self._segments)


def _unviewed(output: Tensor) -> Tensor:
    """The product behind the view that a Linear with a bias returns.

    A hook on the view would be lost where the model goes on in place (ReLU(inplace=True), `+=`).
    """
    base = output._base
    if base is None or base.numel() != output.numel() or base.shape[-1] != output.shape[-1]:
        return output
    return base


def _only(kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a module called by keyword: `input` of a Linear, `x` of a Conv1D."""
    (value,) = kwargs.values()
    return value


@dataclass
class _LanguageModelling:
    """Causal and masked language models: our own loss, our own batches."""

    model: nn.Module
    examples: list[Example]
    batches: list[Batch]
    shift: int
    packed: bool
    tokens_per_batch: int
    examples_here: int
    mine: list[int]

    @classmethod
    def plan(
        cls,
        model: nn.Module,
        loader: Any,
        tokenizer: Any,
        template: str,
        max_length: int | None,
        tokens_per_batch: int | None,
        ranks: Ranks,
    ) -> _LanguageModelling:
        shift = label_shift(model)
        examples = read_examples(
            loader, tokenizer=tokenizer, template=template, max_length=max_length
        )
        _check_tokens(model, examples)
        # On all examples, so that a bad one is refused under its own number on every rank alike.
        require_targets(examples, shift)
        if tokens_per_batch is None:
            tokens_per_batch = default_tokens_per_batch(input_device(model))
        mine = list(range(len(examples)))[ranks.rank :: ranks.size]
        packed = packing_is_exact(model, examples)
        batches = plan_batches(
            [examples[i] for i in mine],
            shift=shift,
            packed=packed,
            tokens_per_batch=tokens_per_batch,
        )
        return cls(model, examples, batches, shift, packed, tokens_per_batch, len(mine), mine)

    @property
    def num_examples(self) -> int:
        return len(self.examples)

    @contextmanager
    def open(self) -> Iterator[None]:
        with TargetLogits(self.model) as self._head:
            yield

    def losses(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Per batch: losses [B] with a graph, the examples' segments, the number of token rows."""
        for batch in self.batches:
            batch = batch.to(device)
            self._current = batch
            per_token = target_losses(self._head(batch), batch)
            owner = batch.target_example.to(per_token.device)
            totals = per_token.new_zeros(batch.num_examples).index_add(0, owner, per_token)
            counts = torch.bincount(owner, minlength=batch.num_examples)
            yield totals / counts, batch.segments, batch.input_ids.numel()

    def check(self, losses: Tensor) -> None:
        for index, value in zip(self._current.example_index, losses.tolist(), strict=True):
            _require_finite(value, self.mine[index])

    def describe(self) -> dict[str, Any]:
        return {
            "data": {
                "examples": len(self.examples),
                "tokens": sum(len(example) for example in self.examples),
                "target_tokens": sum(example.num_targets(self.shift) for example in self.examples),
                "sha256": examples_digest(_digest(e.input_ids, e.labels) for e in self.examples),
            },
            "loss": "cross-entropy in nats, mean over an example's target tokens",
            "label_shift": self.shift,
            "batching": {"packed": self.packed, "tokens_per_batch": self.tokens_per_batch},
        }


@dataclass
class _CustomLoss:
    """Any other model: the caller's batches, the caller's per-example losses."""

    model: nn.Module
    loss_fn: LossFunction
    batches: list[Mapping[str, Any]]
    num_examples: int
    examples_here: int
    digest: str
    _first: int = 0

    @classmethod
    def plan(
        cls, model: nn.Module, loader: Any, loss_fn: LossFunction, ranks: Ranks
    ) -> _CustomLoss:
        batches = [loader] if isinstance(loader, Mapping) else list(loader)
        for position, batch in enumerate(batches):
            _require_batch(batch, position)
        if not batches:
            raise ValueError(
                "loader must yield at least one batch, got none; check the source and its filter"
            )
        mine = batches[ranks.rank :: ranks.size]
        sizes = [batch["input_ids"].shape[0] for batch in batches]
        digest = examples_digest(_digest(batch["input_ids"]) for batch in batches)
        return cls(model, loss_fn, mine, sum(sizes), sum(sizes[ranks.rank :: ranks.size]), digest)

    @contextmanager
    def open(self) -> Iterator[None]:
        self._first = 0
        yield

    def losses(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor, int]]:
        accepted = _accepted_inputs(self.model)
        for batch in self.batches:
            batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            size, width = batch["input_ids"].shape
            inputs = {k: v for k, v in batch.items() if k != "labels" and accepted(k)}
            losses = self.loss_fn(self.model(**inputs), batch)
            if not isinstance(losses, Tensor) or tuple(losses.shape) != (size,):
                got = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
                raise ValueError(
                    f"loss_fn must return one loss per example, [{size}], got {got}; "
                    "reduce over tokens only"
                )
            starts = torch.arange(size) * width
            yield losses, torch.stack([starts, starts + width], dim=1), size * width

    def check(self, losses: Tensor) -> None:
        for value in losses.tolist():
            _require_finite(value, self._first)
            self._first += 1

    def describe(self) -> dict[str, Any]:
        return {
            "data": {"examples": self.num_examples, "sha256": self.digest},
            "loss": "loss_fn of the caller",
        }


def _require_batch(batch: Any, position: int) -> None:
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        got = type(batch).__name__ if ids is None else getattr(ids, "shape", type(ids).__name__)
        raise ValueError(
            "loader must yield dictionaries with a tensor input_ids [B, T] when loss_fn is given, "
            f"got {got} at item {position}; collate the batches as the model takes them"
        )


def _accepted_inputs(model: nn.Module) -> Callable[[str], bool]:
    """Which entries of a batch the model's forward names; all of them where it names none."""
    parameters = inspect.signature(model.forward).parameters
    if "input_ids" in parameters:
        return parameters.__contains__
    return lambda name: True


def _require_same_examples(work: _LanguageModelling | _CustomLoss, ranks: Ranks) -> None:
    """Loaders that already shard (DistributedSampler) would have most examples never scored."""
    digest = work.describe()["data"]["sha256"] if ranks.size > 1 else "0"
    if not ranks.hold_the_same(int(digest[:15], 16)):
        raise ValueError(
            "loader must give every rank the same examples, got different ones; leave out the "
            "distributed sampler, score() splits the examples itself"
        )


def _require_finite(loss: float, example: int) -> None:
    if not math.isfinite(loss):
        raise ValueError(
            f"loss must be finite, got {loss} for example {example}; check the model's weights and "
            "dtype, and that example's tokens"
        )


def _check_tokens(model: nn.Module, examples: Sequence[Example]) -> None:
    """Refuse what would fail deep inside the model, or on a GPU without a message."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    for i, example in enumerate(examples):
        targets = example.labels[example.labels != IGNORE_INDEX]
        for key, ids in (("input_ids", example.input_ids), ("labels", targets)):
            outside = ids[(ids < 0) | (ids >= vocabulary)]
            if outside.numel():
                ignored = "" if key == "input_ids" else f" or be {IGNORE_INDEX}"
                raise ValueError(
                    f"{key} must lie in 0..{vocabulary - 1}{ignored}, got {int(outside[0])} in "
                    f"example {i}; use the model's own tokenizer"
                )
        if longest is not None and len(example) > longest:
            raise ValueError(
                f"example {i} must have at most {longest} tokens (max_position_embeddings), got "
                f"{len(example)}; cut it with max_length"
            )


def _digest(*tensors: Tensor) -> bytes:
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(tensor.cpu().numpy().tobytes())
    return content.digest()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient inside: autograd computes dX and never dW."""
    # By name: offloading replaces the parameter objects during the forward pass.
    trainable = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad
    ]
    try:
        for name in trainable:
            model.get_parameter(name).requires_grad_(False)
        yield
    finally:
        for name in trainable:
            model.get_parameter(name).requires_grad_(True)


@contextmanager
def _strict_determinism(deterministic: bool) -> Iterator[None]:
    if not deterministic:
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.use_deterministic_algorithms(True)
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@contextmanager
def _eager() -> Iterator[None]:
    """Compiled modules and functions do not fire hooks that were added after compilation."""
    # Nothing was compiled where the compiler was never imported, and importing it takes seconds.
    if "torch._dynamo" in sys.modules:
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


@contextmanager
def _progress_bar(total: int, description: str, shown: bool) -> Iterator[Any]:
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=description, unit="ex", disable=not shown) as bar:
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


def _device_of(target: Target, default: torch.device) -> torch.device:
    device = target.module.weight.device
    if device.type != "meta":
        return device
    hook = getattr(target.module, "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or default)


def _weight_of(target: Target) -> Tensor:
    weight = target.module.weight
    if weight.device.type != "meta":
        return weight
    from accelerate.utils import align_module_device

    with align_module_device(target.module, execution_device=torch.device("cpu")):
        return target.module.weight.detach().clone()


def _on_cpu(entry: ScoreEntry) -> ScoreEntry:
    return replace(entry, sums=entry.sums.cpu())


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
    work: _LanguageModelling | _CustomLoss,
    covered: dict[str, Any],
    granularity: str,
    target_modules: str | Sequence[str],
    ranks: Ranks,
) -> dict[str, Any]:
    from fastdean.provenance import now, versions

    config = getattr(model, "config", None)
    return {
        "created": now(),
        "model": {
            "name": getattr(config, "_name_or_path", "") or type(model).__name__,
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
