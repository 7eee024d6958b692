"""The collapse-alignment loss, attached to a language model while it is trained.

Published form: mode "cumulative", statistic "std", detached features, shift "published", with the
strength that the base method asks for (BEC and ASE 100, MABEL 10, ADEPT 5).

Source: Collapsed language models promote fairness (arXiv 2410.04472), (U)NC3 as a regulariser.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastdean.collapse.alignment import (
    STATE_ADVICE,
    CollapseState,
    Mode,
    check_live,
    collapse_alignment_loss,
)
from fastdean.collapse.class_sums import ClassSums, class_counts
from fastdean.collapse.classes import CollapseClasses
from fastdean.collapse.factors import SPANS, STEP, Schedule, check_spans, factor_at, gives, record
from fastdean.collapse.labels import Shift, check_shift, default_shift, position_labels
from fastdean.collapse.output_embedding import TrainedRows, check_width, trained_weight
from fastdean.collapse.representations import (
    Features,
    Hook,
    Representations,
    hooked_by,
    remove_hooks_of,
)
from fastdean.data.examples import IGNORE_INDEX
from fastdean.default_device import cpu_by_default
from fastdean.files.declared import Anything, Maps, Record, require
from fastdean.models.label_shift import label_shift_of_class
from fastdean.models.model_state import unwrap
from fastdean.models.ranks.attendance import require_all_come
from fastdean.models.ranks.distributed import Ranks
from fastdean.models.ranks.sharded import left_sharded
from fastdean.models.ranks.sharded_rows import placing
from fastdean.models.ranks.shards import is_sharded, whole_features
from fastdean.models.ranks.tensor_parallel import training_ranks
from fastdean.ops.collapse import STATISTICS, collapse_alignment
from fastdean.wording.log import logger
from fastdean.wording.mendable import InputTypeError, StateError
from fastdean.wording.numbers import require_real

# What `state_dict` gives beside the statistics.
_STORED = Record({"step": STEP, "of": Maps(Anything()), "factors": SPANS}, others=Anything())


class CollapseRegularizer:
    """Adds strength * factor * collapse-alignment loss to a model's own loss while it is trained.

    Equivalent, for the defaults and an output that carries a loss, to this in every training loop:

        rows = classes.rows(model.get_output_embeddings().weight)
        labels = position_labels(classes, input_ids, attention_mask=attention_mask, shift=shift)
        term = collapse_alignment_loss(hidden.flatten(0, 1), labels.flatten(), rows, state)
        loss = model(input_ids, attention_mask, labels=...).loss + strength * term

    Every forward pass of `model` in training mode with gradients enabled adds its batch to the
    statistics and, where the output carries a loss, its term to that loss; without labels, add
    `term()` to your own loss. Evaluation changes nothing. For a Trainer use `trainer_class`, which
    knows gradient accumulation and checkpoints. A step makes one more gradient of the output
    embedding's size, zero but for the classes' rows.

    Where the loss is divided by `num_items_in_batch`, the term is weighted by the batch's share of
    these items: over an accumulation the terms come to their mean by tokens, not to their sum.

    Under `torch.distributed` all ranks share the statistics, and the gradient that
    DistributedDataParallel or FSDP2 (`fully_shard`) averages is that of one process with all their
    batches. The ranks over which tensor parallel splits the model must have the same batch, which
    counts once. Every rank must have a regulariser made in the same way, which the first pass looks
    at, and make the same number of training passes, and the backward pass of each. Of a sharded
    output embedding the classes' rows are gathered, and each rank adds the gradient of those that
    it holds to them; what is sent does not depend on the number of tokens.
    nn.DataParallel and FSDP1 are refused.

    Features that are not finite make the statistics so for good, as a check would make every step
    wait for the device. `fine_tune`, which reads the loss, restores them before it raises; in your
    own loop call `state.reset()`, or load an earlier state.

    A model has one regulariser at a time. Copies of the model, deep or pickled, come without it.

    Args:
        model: a causal or masked language model, also inside PEFT, DistributedDataParallel or
            `torch.compile` (then attach before its first pass). It is hooked, never wrapped.
        classes: the words.
        strength: 0 or above; 0 measures and leaves the training the same, to the bit.
        statistic: "std", "cv" or "mean", of the cosines; see `collapse_alignment_loss`.
        detach_features: True, as published: the gradient reaches only the classes' rows of the
            output embedding, which must be trained. False: the model below as well; in mode
            "window" or "batch" only.
        mode, decay: of the statistics; see `CollapseState`.
        shift: which token names the class of a position; see `position_labels`. None: the next one
            for causal models, the one at the position for masked ones.
        features: "base" or "head"; see `Representations`.
        schedule: step -> factor on `strength`. Steps are training passes counted from 0; those of
            the optimizer under `trainer_class`. A step's factor must always be the same:
            `load_state_dict` asks again for the steps done.
        impl: of the loss: None (by device), "reference" or "native".
    Attributes:
        state: the `CollapseState`.
        step: the number of training passes so far.
    Raises:
        ValueError, TypeError: for the arguments; nothing could ever have a gradient; or an output
            embedding that is not one tensor [V, D] in memory, whole or in blocks on the ranks:
            quantised, offloaded, sharded by FSDP1. What can change later is checked again in every
            training pass.

    Example:
        ```python
        with CollapseRegularizer(model, classes, strength=10.0):
            for batch in loader:
                model(**batch).loss.backward()
        ```
    """

    def __init__(
        self,
        model: nn.Module,
        classes: CollapseClasses,
        strength: float,
        *,
        statistic: str = "std",
        detach_features: bool = True,
        mode: Mode = "cumulative",
        decay: float | None = None,
        shift: Shift | None = None,
        features: Features = "base",
        schedule: Schedule | None = None,
        impl: str | None = None,
    ) -> None:
        _check_options(strength, statistic)
        check_live(detach_features, mode)
        self.module = unwrap(model)
        self.classes = classes
        self.strength = float(strength)
        self.schedule = schedule
        self.step = 0
        # [first step, last step, factor] for each span of equal factors.
        self._factors: list[list[Any]] = []
        self._features = features
        self._statistic = statistic
        self._detach_features = detach_features
        self._impl = impl

        weight = trained_weight(self.module)
        self._check_something_learns(weight, any(p.requires_grad for p in model.parameters()))
        classes.check_embedding(weight)
        if any(map(is_sharded, model.parameters())):
            # The ranks run such a model together, to see which token is next.
            self._require_on_all(Ranks.of_group())
        with left_sharded(self.module):
            self.shift: Shift = default_shift(model) if shift is None else check_shift(shift)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.state = CollapseState(
            len(classes),
            weight.shape[1],
            mode=mode,
            decay=decay,
            dtype=dtype,
            device=weight.device,
        )

        self._trained_rows = TrainedRows(classes.token_ids)
        # How the output embedding was placed, in which job, and who trains it there.
        self._ranks: tuple[Any, Ranks, Ranks] | None = None

        self._value: Tensor | None = None
        self._pending: Tensor | None = None
        self._warned = False
        self._held = False
        self._held_step: int | None = None
        self._last = Representations(self.module, features=features)
        self.attach()

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, *exc_info: object) -> None:
        self.remove()

    def __reduce__(self) -> tuple:
        raise InputTypeError(
            "a CollapseRegularizer must not be copied or pickled, because it is attached to its "
            "model; make one for the copied model and give it state_dict()"
        )

    def attach(self) -> Self:
        """Hook the model again after `remove()`; statistics and step go on.

        Raises: ValueError if another regulariser is attached to the model.
        """
        if self.attached:
            return self
        self._ranks = None
        _check_alone(self.module)
        try:
            self._last.attach()
            # After the hooks of `Representations`: those that were there first run first.
            hook = Hook(self, self._after_forward)
            self.module.register_forward_hook(hook, with_kwargs=True)
            return self
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Remove the hooks. The statistics stay readable."""
        # Twice: an interrupt of the first time leaves the second.
        try:
            self._detach()
        finally:
            self._detach()

    def _detach(self) -> None:
        remove_hooks_of(self, [self.module])
        self._last.remove()
        self._last.clear()
        self._pending = None

    @property
    def attached(self) -> bool:
        return hooked_by(self, [self.module])

    @property
    def value(self) -> float | None:
        """The last training pass's loss, without strength and factor; waits for the device."""
        return None if self._value is None else float(self._value)

    def term(self) -> Tensor:
        """strength * factor * loss of the last training pass, once, for a loss of your own.

        Raises: RuntimeError without a training pass since the last call, or if its output carried
            a loss, which the term is part of already.
        """
        if self._pending is None:
            raise StateError(
                "term() must follow a training pass whose output carries no loss, got none since "
                "the last call; where the model computes the loss the term is part of it already, "
                "and a model in eval mode, under no_grad, or compiled before the regulariser was "
                "attached makes no term"
            )
        term, self._pending = self._pending, None
        return term

    @contextmanager
    def held(self, *, step: int | None = None) -> Iterator[None]:
        """Inside, outputs stay as the model made them, and `term()` gives the term.

        `step` is the schedule's; None: the number of training passes.
        """
        before = self._held, self._held_step
        try:
            try:
                self._held, self._held_step = True, step
                yield
            finally:
                self._held, self._held_step = before
        finally:
            self._held, self._held_step = before

    def require_attached_to(self, model: nn.Module) -> None:
        """Raise ValueError unless this is attached to `model`, or to a module inside it."""
        if not self.attached:
            raise ValueError(
                "regularizer must be attached, got one after remove(); call attach(), or make a "
                "new one for the model"
            )
        if all(module is not self.module for module in unwrap(model).modules()):
            raise ValueError(
                "regularizer must be attached to the model that is trained, got one attached to "
                "another; load the model first and give the same object to both, to a Trainer "
                "without model_init"
            )

    def state_dict(self) -> dict[str, Any]:
        """The statistics (not copies), the step, and whose they are; the same on all ranks.

        "of" has this regulariser's options; "factors", in place of the schedule, the factors it
        gave: [first step, last step, factor] for each span of equal ones.
        """
        return {
            **self.state.state_dict(),
            "step": self.step,
            "of": self._identity(),
            "factors": [list(span) for span in self._factors],
        }

    def load_state_dict(self, stored: Mapping[str, Any]) -> None:
        """Restore a saved state. All ranks must pass the same one.

        Raises: ValueError, before anything changes, if an entry is missing or damaged, or if
            classes, strength, options or the schedule's factors for the steps done are others.
        """
        require(stored, _STORED, "stored", advice=STATE_ADVICE)
        check_spans(stored["factors"], stored["step"], STATE_ADVICE)
        other = [name for name, own in self._identity().items() if stored["of"].get(name) != own]
        if not other and not gives(self.schedule, stored["factors"]):
            other = ["schedule"]
        if other:
            raise ValueError(
                f"stored must belong to a regulariser with the same {other[0]}, got another; make "
                "this one like it, or start with empty statistics"
            )
        self.state.load_state_dict(stored)
        self.step = int(stored["step"])
        self._factors = [list(span) for span in stored["factors"]]

    def _identity(self) -> dict[str, Any]:
        return {
            "classes": [list(piece) for piece in self.classes.pieces],
            "strength": self.strength,
            "statistic": self._statistic,
            "detach_features": self._detach_features,
            "mode": self.state.mode,
            "decay": self.state.decay,
            "shift": self.shift,
            "features": self._features,
        }

    def _after_forward(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        try:
            if module.training and torch.is_grad_enabled():
                return self._regularize(output, kwargs)
            return None
        finally:
            self._last.clear()

    # The statistics are no part of a compiled graph. torch.compiler.disable would import the
    # compiler with this file; this form waits for the first call, as torch's optimizers do.
    @torch._disable_dynamo
    @cpu_by_default
    def _regularize(self, output: Any, kwargs: Mapping[str, Any]) -> Any:
        _check_not_recomputing()
        self._warn_about_an_untaken_term()
        scale = self.strength * self._factor()
        weight = trained_weight(self.module)
        features = self._last.features
        live = features.requires_grad and not self._detach_features
        self._check_something_learns(weight, live)
        loss = self._loss(features, self._labels(), weight)
        self._value = loss.detach()
        self.step += 1
        # 0 * loss would still reach every weight, as zero or NaN.
        term = scale * loss if scale else torch.zeros_like(self._value)
        own = None if self._held else _loss_in(output)
        if own is None:
            self._pending = term
            return None
        if not scale:
            return None
        return _with_loss(output, own + (term * self._share(kwargs, term.device)).to(own.device))

    def _labels(self) -> Tensor:
        return position_labels(
            self.classes,
            self._last.input_ids,
            attention_mask=self._last.attention_mask,
            labels=self._last.labels if self.shift == "same" else None,
            shift=self.shift,
        ).flatten()

    def _loss(self, features: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        check_width(features, weight, self._features)
        ranks = self._ranks_of(weight, features.requires_grad and not self._detach_features)
        # Of a rank's own part of each sequence all are needed: classes are told apart in the whole.
        features = whole_features(features)
        # Layers may lie on several devices; the loss lies where the output embedding does.
        features = features.flatten(0, -2).to(weight.device)
        labels = labels.to(weight.device)
        self.state.to(weight.device)
        if is_sharded(weight):
            rows = self.classes.rows_of_listed(self._trained_rows.of(self.module, weight, ranks))
        else:
            rows = self.classes.rows(weight)
        if ranks.shares > 1:
            return self._loss_on_shared_sums(features, labels, rows, ranks)
        return collapse_alignment_loss(
            features,
            labels,
            rows,
            self.state,
            statistic=self._statistic,
            detach_features=self._detach_features,
            impl=self._impl,
        )

    def _require_on_all(self, ranks: Ranks) -> None:
        remedy = "make a CollapseRegularizer on each, before the same training pass"
        require_all_come("the regulariser", ranks, remedy)

    def _ranks_of(self, weight: Tensor, live: bool) -> Ranks:
        """The ranks that train the model; those of a team have the same batch.

        Args:
            live: whether the features of this pass have a gradient of the term.
        """
        found = placing(weight), Ranks.of_group()
        if self._ranks is None or self._ranks[:2] != found:
            # Before the first collective, which a rank without one would not enter.
            self._require_on_all(found[1])
            ranks = training_ranks(self.module)
            made = {
                **self._identity(),
                "output embedding": f"{weight.dtype} {list(weight.shape)}",
                "gradient of the features": live,
                "step": self.step,
                "schedule": self._factors,
            }
            remedy = "make it, and load its state, in the same way on each"
            ranks.require_same("the regulariser", made, remedy)
            self._ranks = *found, ranks
        return self._ranks[2]

    def _loss_on_shared_sums(
        self, features: Tensor, labels: Tensor, rows: Tensor, ranks: Ranks
    ) -> Tensor:
        """The loss on the batch of all ranks; the first rank adds the sums so far."""
        share = self.state if ranks.first else self.state.like()
        # The batch of a team counts once.
        own = slice(None) if ranks.rank == ranks.team[0] else slice(0)
        with torch.no_grad():
            collapse_alignment_loss(features[own], labels[own], rows, share, impl=self._impl)
        sums, counts = share.sums, share.counts
        ranks.sum_([sums, counts])
        self.state = share
        if self._detach_features or not features.requires_grad:
            features, labels = sums[:0], labels[:0]
        else:
            in_batch = class_counts(labels[own], len(counts))
            ranks.sum_([in_batch])
            # A row of zeros for each class of the batch has the gradient of the class's sum. It is
            # counted as one position, of which there are as many at least.
            present = in_batch > 0
            features = ClassSums.apply(features, labels, sums, ranks)
            labels = torch.where(present, torch.arange(len(counts), device=labels.device), -1)
            counts = counts - present.to(counts.dtype)
        loss, _, _ = collapse_alignment(
            features, labels, rows, sums, counts, statistic=self._statistic, impl=self._impl
        )
        return loss

    def _factor(self) -> float:
        step = self.step if self._held_step is None else self._held_step
        factor = factor_at(self.schedule, step)
        record(self._factors, step, factor)
        return factor

    def _share(self, kwargs: Mapping[str, Any], device: torch.device) -> Tensor | float:
        """This batch's share of the items by which the model divides its loss."""
        items = kwargs.get("num_items_in_batch")
        targets, labels = kwargs.get("shift_labels"), self._last.labels
        if targets is None and labels is not None:
            targets = labels[..., label_shift_of_class(self.module) :]
        if items is None or targets is None:
            return 1.0
        return ((targets != IGNORE_INDEX).sum() / items).to(device)

    def _check_something_learns(self, weight: Tensor, below: bool) -> None:
        """`below`: a gradient of the features would reach a parameter."""
        if self.strength == 0 or weight.requires_grad:
            return
        if self._detach_features:
            raise ValueError(
                "detach_features=True must come with an output embedding that is trained, got a "
                "frozen one, so that nothing would have a gradient; pass detach_features=False "
                "with mode 'window' or 'batch', or train it (PEFT: modules_to_save=['lm_head'])"
            )
        if not below:
            raise ValueError(
                "model must have parameters that are trained, got none below the output embedding "
                "and a frozen one there, so that nothing would have a gradient; unfreeze some"
            )

    def _warn_about_an_untaken_term(self) -> None:
        forgotten, self._pending = self._pending, None
        if forgotten is not None and forgotten.requires_grad and not self._warned:
            self._warned = True
            logger.warning(
                "the regulariser's term of the last training pass was in no loss: the output "
                "carried none and term() was not called; pass labels to the model or add term()"
            )


def _check_options(strength: float, statistic: str) -> None:
    require_real("strength", strength)
    if not (math.isfinite(strength) and strength >= 0):
        raise ValueError(
            f"strength must be finite and at least 0, got {strength}; the published ones are 5 "
            "to 100"
        )
    if statistic not in STATISTICS:
        raise ValueError(
            f"statistic must be one of {', '.join(STATISTICS)}, got {statistic!r}; 'std' is the "
            "published one"
        )


def _check_alone(module: nn.Module) -> None:
    """Refuse a second regulariser: a notebook cell run twice would add its term twice."""
    hooks = [hook for each in module.modules() for hook in each._forward_hooks.values()]
    owners = [hook.owner for hook in hooks if isinstance(hook, Hook)]
    if any(isinstance(owner, CollapseRegularizer) for owner in owners):
        raise ValueError(
            "model must have no other regulariser attached, got one that would add its term as "
            "well; call its remove() first, or load the model again, and put all words into one "
            "CollapseClasses"
        )


def _check_not_recomputing() -> None:
    if torch._C._current_graph_task_id() != -1:
        raise StateError(
            "model must not run again during the backward pass, got a recomputation of the whole "
            "of it, which would count its batch twice; checkpoint its layers instead, as "
            "transformers does"
        )


def _loss_in(output: Any) -> Tensor | None:
    """The loss in a transformers model's output of any form."""
    if isinstance(output, Mapping):
        return output.get("loss")
    first = output[0] if isinstance(output, tuple) and output else None
    return first if isinstance(first, Tensor) and first.dim() == 0 else None


def _with_loss(output: Any, loss: Tensor) -> Any:
    if isinstance(output, tuple):
        return (loss, *output[1:])
    output["loss"] = loss
    return output
