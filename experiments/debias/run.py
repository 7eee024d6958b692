"""What the collapse regulariser does to a model that is trained to be less biased.

Every arm trains from the same weights on the same rows, once for each seed: without a regulariser,
with the gender words, and with two kinds of control words. What an arm does beyond "none" is the
regulariser's doing, and what "words" does beyond the controls that of the words.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.harness import store, tables
from benchmarks.harness.clock import synchronize
from benchmarks.harness.command import above_zero, model_options, positive
from benchmarks.harness.gate import test_files
from benchmarks.harness.session import Session
from benchmarks.harness.store import say
from experiments.debias.figures import Figure, HeldOut
from experiments.debias.subject import ARMS, DATA, Subject, load_subject
from experiments.debias.table import BASE, TABLE
from fastdean.collapse import CollapseClasses, CollapseRegularizer
from fastdean.debias import fine_tune
from fastdean.files.provenance import public_name, public_source
from fastdean.jobs import bias

# For causal models none is published; BEC's is.
_STRENGTHS = {"causal": 10.0, "bec": 100.0}


@dataclass(frozen=True)
class Arm:
    """One training. `seed`: also of the control classes; None before any training."""

    name: str
    strength: float
    seed: int | None


_UNTRAINED = Arm(BASE, 0.0, None)


def add_options(parser: argparse.ArgumentParser) -> None:
    model_options(parser)
    add = parser.add_argument
    said = "instead a small masked model, trained first, from scratch on the embedded text"
    add("--masked", action="store_true", help=said)
    number = {"type": positive, "metavar": "N"}
    add("--pretraining-steps", **number, default=400, help="of --masked")
    add("--method", choices=["causal", "bec"], help="default: causal; with --masked: bec")
    said = "of the regulariser, in all arms but none; default: 10; of bec: 100"
    add("--strength", type=above_zero, nargs="+", metavar="X", help=said)
    add("--arm", choices=ARMS, nargs="+", help="default: all")
    add("--seeds", **number, default=3, help="trainings of each arm")
    add("--steps", **number, default=40, help="optimizer steps of a training")
    add("--batch-size", **number, default=8, help="texts of a step")
    add("--learning-rate", type=above_zero, default=2e-5, metavar="X", help="of a training")
    said = "bias measures, of crows_pairs the gender pairs only; default: bec_pro"
    add("--bias", nargs="+", default=["bec_pro"], metavar="NAME[=FILE]", help=said)
    said = "at most, of bec_pro without a file and of crows_pairs"
    add("--bias-rows", **number, default=192, help=said)


def tests(options: argparse.Namespace, on_gpu: bool) -> Sequence[str]:
    collapse = ("collapse_regularizer", "collapse_measuring", "collapse_controls")
    return test_files(*collapse, "fine_tune", "bias_bec_pro", "bias_crows_pairs")


def require(options: argparse.Namespace) -> None:
    """Asked before any test runs. Raises ValueError for a measure that does not exist."""
    bias.check(options.bias)


def run(session: Session) -> int:
    """Append the base model's record, and of each arm and seed those of two states."""
    options = session.options
    settings = _settings(options)
    due = [
        arm
        for arm in [_UNTRAINED, *_arms(options, settings["method"])]
        if not session.earlier("debias", {arm.name}, _last(arm, settings))
    ]
    study: _Study | None = None
    for arm in session.due(due, "trainings"):
        study = study or _Study(session, settings, load_subject(options))
        study.append(arm)
    if study is not None:
        rows = store.read(options.out, "debias")
        print(tables.rendered(TABLE, (row for row in rows if row.case == study.case)))
    return 0


def _last(arm: Arm, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the record of a training's last step holds, which is written last."""
    step = 0 if arm == _UNTRAINED else settings["steps"]
    return {"settings": dict(settings), "strength": arm.strength, "seed": arm.seed, "step": step}


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """All that decides the figures of an arm, without folders of this machine."""
    # A model wins over a file, and an encoder over both, as they do where they are loaded.
    model = public_name(options.model or "") or (options.gguf and options.gguf.name)
    return {
        "model": f"masked, {options.pretraining_steps} steps" if options.masked else model,
        "method": options.method or ("bec" if options.masked else "causal"),
        "data": DATA,
        **{name: getattr(options, name) for name in ("steps", "batch_size", "learning_rate")},
        "bias": list(map(public_source, options.bias)),
        "bias_rows": options.bias_rows,
    }


def _arms(options: argparse.Namespace, method: str) -> list[Arm]:
    """Seed after seed, so that a run that is cut off has whole seeds."""
    strengths = dict.fromkeys(options.strength or [_STRENGTHS[method]])
    return [
        Arm(name, strength, seed)
        for seed in range(options.seeds)
        for name in dict.fromkeys(options.arm or ARMS)
        for strength in ([0.0] if name == "none" else strengths)
    ]


class _Study:
    """One model, from whose weights every arm starts."""

    def __init__(self, session: Session, settings: dict[str, Any], subject: Subject) -> None:
        options = session.options
        self.case = (
            f"{subject.name}, {settings['method']}, {options.steps} steps of {options.batch_size} "
            f"texts, learning rate {options.learning_rate:g}, on {settings['data']}, bias by "
            f"{', '.join(settings['bias'])} (at most {options.bias_rows} rows)"
        )
        self._session, self._settings, self._subject = session, settings, subject
        self._figures = HeldOut(subject, options.bias, options.bias_rows)
        self._start = {name: t.clone() for name, t in subject.model.state_dict().items()}

    def append(self, arm: Arm) -> None:
        """Of one arm and seed, after its last step only: a training that was cut off has none."""
        subject, settings, classes = self._subject, self._settings, None
        subject.model.load_state_dict(self._start)
        course = _Course(self._figures, settings["steps"], self._session.device)
        if arm == _UNTRAINED:
            say("the model before any training")
            course.figures[0] = self._figures(subject.model)
        else:
            say(f"{arm.name}, strength {arm.strength:g}, seed {arm.seed}")
            classes = subject.classes(arm.name, arm.seed)
            self._train(arm, classes, course)
        setup = {
            **_last(arm, settings),
            "steps": settings["steps"],
            "model": subject.name,
            "method": settings["method"],
            "classes": 0 if classes is None else len(classes),
            "labelled": 0 if classes is None else subject.labelled(classes),
            "trained_rows": len(subject.trained),
            "held_out_rows": len(subject.held_out),
            "held_out_tokens": sum(map(len, self._figures.examples)),
        }
        for step, figures in course.figures.items():
            metrics = {
                "figures": {name: figure.value for name, figure in figures.items()},
                "units": {name: figure.unit for name, figure in figures.items()},
                "neutral": {name: figure.neutral for name, figure in figures.items()},
                "step_s": course.median_seconds,
            }
            parts = {"setup": setup | {"step": step}, "metrics": metrics}
            self._session.append("debias", self.case, arm.name, **parts)

    def _train(self, arm: Arm, classes: CollapseClasses | None, course: _Course) -> None:
        subject, settings = self._subject, self._settings
        attached = nullcontext()
        if classes is not None:
            attached = CollapseRegularizer(subject.model, classes, arm.strength)
        with attached as regularizer:
            fine_tune(
                subject.model,
                subject.tokenizer,
                subject.trained,
                settings["method"],
                regularizer=regularizer,
                **{name: settings[name] for name in ("steps", "learning_rate", "batch_size")},
                seed=arm.seed,
                eval_every=1,
                on_eval=course,
                progress=False,
            )


@dataclass
class _Course:
    """`on_eval` of a training, called after every step: its clock, and its figures (by step) half
    way and at the end."""

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
        """Of an optimizer step but the first, evaluation left out; None if there was no other."""
        return statistics.median(self._seconds) if self._seconds else None
