"""`fine_tune`: five methods in one plain loop, with or without a collapse regulariser."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastdean.debias.course import (
    Course,
    Purpose,
    check_counts,
    check_course,
    random_seed,
    steps_per_epoch,
)
from fastdean.debias.forms import WITH_FORMS, Form, require_form
from fastdean.debias.gender_words import GenderWords
from fastdean.debias.objectives import Material, Objective, require_method
from fastdean.debias.resuming import Checkpoint, Checkpoints, announce
from fastdean.debias.texts import TextEncoder
from fastdean.default_device import cpu_by_default
from fastdean.files.declared import Anything, Filled, Maps, Record, Unfit, require
from fastdean.models.identity import json_digest, model_identity
from fastdean.models.model_state import evaluation_state, input_device, max_tokens, unwrap
from fastdean.wording.doing import titled
from fastdean.wording.mendable import StateError

if TYPE_CHECKING:
    from fastdean.collapse import CollapseRegularizer

_DEFAULT_EPOCHS = 3
_DEFAULT_MAX_LENGTH = 128
_MAX_GRADIENT_NORM = 1.0

OnEval = Callable[[int, nn.Module], Mapping[str, Any] | None]


@cpu_by_default
def fine_tune(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    method: str,
    *,
    form: Form = "published",
    regularizer: CollapseRegularizer | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    learning_rate: float = 2e-5,
    batch_size: int = 16,
    accumulation: int = 1,
    warmup: float = 0.1,
    weight_decay: float = 0.0,
    max_length: int | None = None,
    lists: Mapping[str, Any] | None = None,
    neutral_words: Iterable[str] | None = None,
    seed: int = 0,
    out: str | os.PathLike | None = None,
    resume: bool = True,
    save_every: int | None = None,
    eval_every: int | None = None,
    on_eval: OnEval | None = None,
    progress: bool = True,
    identity: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Train `model` in place to be less biased, in one process, with AdamW.

    A step's loss is the mean over its forward passes, weighted by their examples, of the method's
    loss plus `regularizer.term()`. Gradients are clipped to a norm of 1. The same arguments give
    the same weights, to the bit on a CPU with the same number of threads, also over a resume. The
    caller's random state and the modules' modes are restored, and no gradient is left.

    Args:
        model: a causal or masked language model in fp32 or fp64; the weights that require a
            gradient are trained.
        tokenizer: a fast one, the model's own.
        rows: with `text`, as embedded:debias; for "mabel" with `premise` and `hypothesis`, as
            embedded:debias:pairs. Swapped copies are added here: pass original text.
        method: "causal" (causal models), "bec", "mabel", "ase" (masked models) or "adept" (both).
        form: of the losses of "mabel" and "adept", whose papers and released code differ:
            "published" (the code) or "paper"; see their modules.
        regularizer: attached to this model, or None. A resumed job needs a new one with the same
            classes, options and schedule. A hidden word of a masked text is of no class.
        steps, epochs: one of them, else 3 epochs. An epoch has each example and each copy once.
        learning_rate: the highest, reached after the share `warmup` of the steps.
        batch_size, accumulation: examples of a forward pass; passes of a step.
        max_length: tokens; None: 128, or the model's own limit where that is less.
        lists: the gendered words, see `counterfactual`.
        neutral_words: the stereotype words of "ase", the neutral ones of "adept"; None: those of
            the package.
        out: folder for checkpoints, see `resuming`; None: nothing is written. Save the model itself
            with `save_model`.
        resume: go on from this job's last checkpoint in `out`, or from the one before if the last
            is damaged, with a warning in the log. Give the model with the weights of the start.
        save_every: steps between checkpoints; None: at the end only, where there is always one.
        eval_every: steps between calls of `on_eval`; None: at the end only.
        on_eval: (steps done, model) -> figures for the history, as JSON, or None; called in eval
            mode without gradients.
        identity: of the model and tokenizer in the checkpoints, if it is known: the result of
            `model_identity`, which reads all weights. None: computed here, with `out`.
    Returns:
        One dictionary for each step: "step" from 1; "loss", "base" plus the regulariser's term;
        "base", the method's loss; "collapse", `regularizer.value`, or None; "learning_rate"; and
        "eval" where `on_eval` gave figures.
    Raises:
        ValueError, TypeError: for the arguments, before anything is trained or written.
        RuntimeError: the loss is not finite; the weights and the regulariser's statistics are those
            of the step before.
    Source:
        Collapsed language models promote fairness (arXiv 2410.04472), with the methods' own papers.
    """
    options: dict[str, Any] = {
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "warmup": warmup,
        "seed": seed,
    }
    check_course(steps=steps, epochs=epochs, **options)
    check_counts(max_length=max_length, save_every=save_every, eval_every=eval_every)
    if eval_every is not None and on_eval is None:
        raise ValueError(
            f"on_eval must be a function where eval_every is given, got None and {eval_every}; "
            "pass both or neither"
        )
    make_objective = require_method(model, method)
    require_form(form, method)
    _check_weights(model)
    if regularizer is not None:
        regularizer.require_attached_to(model)

    rows, longest = list(rows), _longest(model, method, max_length)
    neutral_words = None if neutral_words is None else sorted(neutral_words)
    words = GenderWords.from_lists(lists)
    encoder = TextEncoder(tokenizer, words, neutral_words=neutral_words, max_length=longest)
    preparation = random_seed(seed, Purpose.PREPARATION)
    material = Material(model, tokenizer, encoder, words, lists, preparation, form)
    objective = make_objective(material, rows)
    if steps is None:
        per_epoch = steps_per_epoch(len(objective.examples), batch_size * accumulation)
        steps = per_epoch * (epochs or _DEFAULT_EPOCHS)
    course = Course(examples=len(objective.examples), steps=steps, **options)
    training = _Training(model, objective, regularizer, course, weight_decay)
    if out is not None:
        job = {
            "method": method,
            **({"form": form} if method in WITH_FORMS else {}),
            "rows": json_digest(rows),
            "words": json_digest([lists, neutral_words]),
            **(model_identity(model, tokenizer) if identity is None else identity),
            **_regularizer_job(regularizer),
            "max_length": longest,
            "weight_decay": weight_decay,
            **asdict(course),
        }
        training.keep_in(Path(out), job, resume=resume, every=save_every or steps)
    with _training_state(model):
        training.finish(on_eval, every=eval_every or steps, progress=progress)
    return training.history


@dataclass
class _Training:
    """A training under way; `history` has an entry for each step done."""

    model: nn.Module
    objective: Objective
    regularizer: CollapseRegularizer | None
    course: Course
    weight_decay: float
    history: list[dict[str, Any]] = field(default_factory=list)
    _checkpoints: Checkpoints | None = None
    _save_every: int = 1

    def __post_init__(self) -> None:
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=self.course.learning_rate, weight_decay=self.weight_decay
        )

    def keep_in(self, folder: Path, job: Mapping[str, Any], *, resume: bool, every: int) -> None:
        """Save checkpoints in the folder, and go on from the one in it."""
        self._checkpoints, self._save_every = Checkpoints(folder, job), every
        found = self._checkpoints.restore(self._restore, resume=resume)
        if found is not None:
            torch.clear_autocast_cache()
            announce(folder, found.step, self.course.steps)
            self.history = found.history
            if found.step == self.course.steps:
                self._checkpoints.keep_only(found)

    def finish(self, on_eval: OnEval | None, *, every: int, progress: bool) -> None:
        """Do the remaining steps."""
        from tqdm.auto import tqdm

        steps, done = self.course.steps, len(self.history)
        with tqdm(
            total=steps, initial=done, desc=titled("debiasing"), unit="step", disable=not progress
        ) as bar:
            for step in range(done, steps):
                entry = self._step(step)
                last = step + 1 == steps
                if on_eval is not None and (last or (step + 1) % every == 0):
                    entry |= self._evaluate(on_eval, step + 1)
                self.history.append(entry)
                if self._checkpoints and (last or (step + 1) % self._save_every == 0):
                    self._checkpoints.save(step + 1, self._state(), self.history, last=last)
                bar.set_postfix(loss=f"{entry['loss']:.4f}", refresh=False)
                bar.update()

    def _step(self, step: int) -> dict[str, Any]:
        torch.manual_seed(random_seed(self.course.seed, Purpose.DROPOUT, step))
        before = None if self.regularizer is None else self.regularizer.state_dict()
        members = self.course.members(step)
        count = sum(map(len, members))
        totals = {"loss": 0.0, "base": 0.0, "collapse": 0.0}
        for place, group in enumerate(members):
            generator = self.course.generator(Purpose.MASKING, step, place)
            for name, value in self._backward(group, generator, len(group) / count).items():
                totals[name] += value
        if not math.isfinite(totals["loss"]):
            self._optimizer.zero_grad()
            if self.regularizer is not None and before is not None:
                self.regularizer.load_state_dict(before)
            raise StateError(
                f"loss must be finite, got {totals['loss']} in step {step + 1}; lower the "
                "learning_rate or the regulariser's strength"
            )
        rate = self.course.rate(step)
        for parameters in self._optimizer.param_groups:
            parameters["lr"] = rate
        nn.utils.clip_grad_norm_(self._parameters, _MAX_GRADIENT_NORM)
        self._optimizer.step()
        # Inside of the caller's autocast, of the weights before the step.
        torch.clear_autocast_cache()
        self._optimizer.zero_grad()
        collapse = None if self.regularizer is None else totals["collapse"]
        return {"step": step + 1, **totals, "collapse": collapse, "learning_rate": rate}

    def _backward(
        self, group: list[int], generator: torch.Generator, weight: float
    ) -> dict[str, float]:
        """One forward and backward pass; its part of the step's figures."""
        base = loss = self.objective.loss(group, generator)
        collapse = 0.0
        if self.regularizer is not None:
            loss = base + self.regularizer.term().to(base.device)
            value = self.regularizer.value
            assert value is not None  # as there is a term
            collapse = value
        (loss * weight).backward()
        figures = {"loss": loss.item(), "base": base.item(), "collapse": collapse}
        return {name: value * weight for name, value in figures.items()}

    def _evaluate(self, on_eval: OnEval, step: int) -> dict[str, Any]:
        with evaluation_state(self.model), torch.no_grad():
            figures = on_eval(step, self.model)
        if figures is None:
            return {}
        try:
            return {"eval": json.loads(json.dumps(dict(figures), allow_nan=False))}
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"on_eval must return figures as finite JSON, got {figures!r:.80} ({error}); "
                "convert them with float()"
            ) from None

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "model": unwrap(self.model).state_dict(),
            "optimizer": self._optimizer.state_dict()["state"],
        }
        if self.regularizer is not None:
            state["regularizer"] = self.regularizer.state_dict()
        return state

    def _kind(self) -> Record:
        """The form of `_state` after a step, in the shapes and dtypes of this model."""
        trained = {name for name, p in unwrap(self.model).named_parameters() if p.requires_grad}
        # A buffer, such as an attention mask, may hold an infinity.
        model = {
            name: Filled((str(tensor.dtype),), tuple(tensor.shape), finite=name in trained)
            for name, tensor in unwrap(self.model).state_dict().items()
        }
        # AdamW has no moments of a parameter that has had no gradient.
        moments = {str(place): _moments(p) for place, p in enumerate(self._parameters)}
        own = {} if self.regularizer is None else {"regularizer": Maps(Anything())}
        return Record({"model": Record(model), "optimizer": Record({}, optional=moments), **own})

    def _restore(self, found: Checkpoint) -> None:
        state = found.state
        require(state, self._kind(), found.folder, advice="remove this checkpoint to start again")
        # First: it refuses another schedule, which is not in the job.
        if self.regularizer is not None:
            try:
                self.regularizer.load_state_dict(state["regularizer"])
            except Unfit as error:
                raise Unfit(f"{str(found.folder)!r}: {error}") from None
        unwrap(self.model).load_state_dict(state["model"])
        moments = {int(place): found for place, found in state["optimizer"].items()}
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": moments})


def _moments(parameter: nn.Parameter) -> Record:
    """AdamW's state of a parameter."""
    like = (str(parameter.dtype),), tuple(parameter.shape)
    return Record(
        {
            "step": Filled(("torch.float32",), (), finite=True, least=1),
            "exp_avg": Filled(*like, finite=True),
            "exp_avg_sq": Filled(*like, finite=True, least=0),
        }
    )


def _regularizer_job(regularizer: CollapseRegularizer | None) -> dict[str, Any]:
    """Its options, by the names that a refusal to resume shows."""
    options = {} if regularizer is None else regularizer.state_dict()["of"]
    return {f"regularizer {name}": value for name, value in options.items()}


def _check_weights(model: nn.Module) -> None:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise ValueError(
            "model must have weights that require a gradient, got none; unfreeze some with "
            "model.requires_grad_(True)"
        )
    for name, parameter in trained:
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"model must have trained weights in fp32, got {parameter.dtype} for {name!r}, in "
                "which steps of the usual size are rounded away; load it with dtype=torch.float32"
            )


def _longest(model: nn.Module, method: str, max_length: int | None) -> int:
    """`max_length`, or its default; at most the model's positions."""
    limit = max_tokens(model)
    if max_length is None:
        return _DEFAULT_MAX_LENGTH if limit is None else min(_DEFAULT_MAX_LENGTH, limit)
    if method == "causal" and max_length < 2:
        raise ValueError(
            f"max_length must be at least 2 for method 'causal', got {max_length}, where no token "
            "follows another and nothing is learnt; raise it"
        )
    if limit is not None and max_length > limit:
        raise ValueError(
            f"max_length must be at most the model's {limit} tokens, got {max_length}; lower it"
        )
    return max_length


@contextmanager
def _training_state(model: nn.Module) -> Iterator[None]:
    """Training mode inside; modes and the caller's random state as before outside, no gradients."""
    modes = [(module, module.training) for module in model.modules()]
    device = input_device(unwrap(model))
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        model.zero_grad()
        model.train()
        try:
            yield
        finally:
            model.zero_grad()
            for module, training in modes:
                module.training = training
