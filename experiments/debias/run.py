"""`run.py debias`: what the collapse regulariser does to a model that is trained to be less biased.

Every arm trains from the same weights on the same rows, once for each seed: without a regulariser,
with the gender words, and with two kinds of control words. What an arm does beyond "none" is the
regulariser's doing, and what "words" does beyond the controls that of the words.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import records
import torch
from debias_figures import Figure, HeldOut
from debias_subject import ARMS, DATA, Subject, load_subject
from debias_table import BASE, debias_table
from progress import Budget, say
from records import DebiasRecord, Environment, Record
from timing import synchronize
from torch import nn

from fastdean.collapse import CollapseRegularizer
from fastdean.debias import fine_tune
from fastdean.pipeline import bias

# For causal models none is published; BEC's is.
_STRENGTHS = {"causal": 10.0, "bec": 100.0}


@dataclass(frozen=True)
class Arm:
    """One training; the fields are those of `DebiasRecord`."""

    name: str
    strength: float
    seed: int | None


_UNTRAINED = Arm(BASE, 0.0, None)


def require_measures(options: argparse.Namespace) -> None:
    """Asked before any test runs. Raises ValueError for a measure that does not exist."""
    bias.check(options.bias)


def run_debias(
    options: argparse.Namespace, environment: Environment, budget: Budget, gate: str
) -> int:
    """Append the base model's record, and of each arm and seed those of two states.

    Raises:
        ValueError: an option out of range, or a file of a bias measure cannot be used.
        RuntimeError: a loss is not finite; that training is not recorded.
    """
    settings = _settings(options)
    arms = [_UNTRAINED, *_arms(options, settings["method"])]
    if options.resume:
        done = _finished(options.out, settings, environment, gate)
        arms = [arm for arm in arms if arm not in done]
    if not arms:
        say("nothing left to measure")
        return 0
    if budget.spent:
        say("the time is used up: call again")
        return 0
    subject = load_subject(options)
    experiment = _Experiment(options, settings, subject, gate)
    for arm in arms:
        if budget.spent:
            say("the time is used up: call again")
            break
        for row in experiment.rows(arm):
            path = records.append(options.out, "debias", environment, row)
            say(f"  after {row.step} steps: appended to {path.parent.name}/{path.name}")
    case = experiment.case
    print(debias_table(r for r in records.read(options.out, "debias") if r["case"] == case))
    return 0


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """All that decides the figures of an arm, without folders of this machine."""
    method = options.method or ("bec" if options.masked else "causal")
    model = options.model if options.gguf is None else options.gguf.name
    if options.masked:
        model = f"masked, {options.pretraining_steps} steps"
    elif model is not None and Path(model).is_dir():
        model = Path(model).resolve().name
    return {
        "model": model,
        "method": method,
        "data": DATA,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "bias": [_without_folder(entry) for entry in options.bias],
        "bias_rows": options.bias_rows,
    }


def _without_folder(entry: str) -> str:
    name, equals, file = entry.partition("=")
    return f"{name}{equals}{Path(file).name}" if equals else name


def _arms(options: argparse.Namespace, method: str) -> list[Arm]:
    """Seed after seed, so that a run that is cut off has whole seeds."""
    strengths = dict.fromkeys(options.strength or [_STRENGTHS[method]])
    return [
        Arm(name, strength, seed)
        for seed in range(options.seeds)
        for name in dict.fromkeys(options.arm or ARMS)
        for strength in ([0.0] if name == "none" else strengths)
    ]


def _finished(
    out: Path, settings: Mapping[str, Any], environment: Environment, gate: str
) -> set[Arm]:
    return {
        Arm(row["arm"], row["strength"], row["seed"])
        for row in records.read(out, "debias")
        if row["settings"] == settings
        and _is_last(row)
        and records.stands_for(row, environment, gate)
    }


def _is_last(row: Record) -> bool:
    return row["arm"] == BASE or row["step"] == row["steps"]


class _Experiment:
    """One model, from whose weights every arm starts."""

    def __init__(
        self,
        options: argparse.Namespace,
        settings: Mapping[str, Any],
        subject: Subject,
        gate: str,
    ) -> None:
        self.case = (
            f"{subject.name}, {settings['method']}, {options.steps} steps of {options.batch_size} "
            f"texts, learning rate {options.learning_rate:g}, on {settings['data']}, bias by "
            f"{', '.join(settings['bias'])} (at most {options.bias_rows} rows)"
        )
        self._options, self._settings = options, dict(settings)
        self._subject, self._gate = subject, gate
        self._figures = HeldOut(subject, options.bias, options.bias_rows)
        self._start = {name: t.clone() for name, t in subject.model.state_dict().items()}

    def rows(self, arm: Arm) -> Iterator[DebiasRecord]:
        """Of one arm and seed, after its last step only: a training that was cut off has none."""
        if arm == _UNTRAINED:
            say("the model before any training")
            self._subject.model.load_state_dict(self._start)
            yield self._record(arm, 0, self._figures(self._subject.model))
            return
        say(f"{arm.name}, strength {arm.strength:g}, seed {arm.seed}")
        course, classes, labelled = self._trained(arm)
        for step, figures in course.figures.items():
            yield self._record(
                arm,
                step,
                figures,
                step_s=course.median_seconds,
                classes=classes,
                labelled=labelled,
            )

    def _trained(self, arm: Arm) -> tuple[_Course, int, int]:
        """Its course; number of classes, and of the training text's tokens of a class."""
        subject, options = self._subject, self._options
        subject.model.load_state_dict(self._start)
        classes = subject.classes(arm.name, arm.seed)
        course = _Course(self._figures, options.steps, torch.device(options.device))
        attached = (
            nullcontext()
            if classes is None
            else CollapseRegularizer(subject.model, classes, arm.strength)
        )
        with attached as regularizer:
            fine_tune(
                subject.model,
                subject.tokenizer,
                subject.trained,
                self._settings["method"],
                regularizer=regularizer,
                steps=options.steps,
                learning_rate=options.learning_rate,
                batch_size=options.batch_size,
                seed=arm.seed,
                eval_every=1,
                on_eval=course,
                progress=False,
            )
        if classes is None:
            return course, 0, 0
        return course, len(classes), subject.labelled(classes)

    def _record(
        self,
        arm: Arm,
        step: int,
        figures: Mapping[str, Figure],
        *,
        step_s: float | None = None,
        classes: int = 0,
        labelled: int = 0,
    ) -> DebiasRecord:
        return DebiasRecord(
            op="debias",
            case=self.case,
            arm=arm.name,
            seed=arm.seed,
            strength=arm.strength,
            step=step,
            steps=self._options.steps,
            model=self._subject.name,
            method=self._settings["method"],
            settings=self._settings,
            figures={name: figure.value for name, figure in figures.items()},
            units={name: figure.unit for name, figure in figures.items()},
            neutral={name: figure.neutral for name, figure in figures.items()},
            step_s=step_s,
            classes=classes,
            labelled=labelled,
            trained_rows=len(self._subject.trained),
            held_out_rows=len(self._subject.held_out),
            held_out_tokens=sum(map(len, self._figures.examples)),
            toy=False,
            gate=self._gate,
        )


@dataclass
class _Course:
    """`on_eval` of a training, called after every step: its clock, and its figures at two of them.

    Attributes:
        figures: step -> figures, half way and at the end.
    """

    measure: HeldOut
    steps: int
    device: torch.device
    figures: dict[int, dict[str, Figure]] = field(default_factory=dict)
    _seconds: list[float] = field(default_factory=list)
    _resumed: float | None = None

    def __call__(self, step: int, model: nn.Module) -> None:
        synchronize(self.device)
        # What came before the first call is the preparation too.
        if self._resumed is not None:
            self._seconds.append(time.perf_counter() - self._resumed)
        if step in (self.steps // 2, self.steps):
            self.figures[step] = self.measure(model)
        self._resumed = time.perf_counter()

    @property
    def median_seconds(self) -> float | None:
        """Of a step but the first; None if there was no other."""
        return statistics.median(self._seconds) if self._seconds else None
