"""`run.py regularizer`: what the collapse regulariser adds to a training step.

And what `collapse_metrics` adds to its forward passes. Both take turns with what they add to, in
one process and on the same batches.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import records
import torch
from progress import Budget, say
from records import Environment, RegularizerRecord
from regularizer_subject import ARCHITECTURES, Subject, load_subject
from regularizer_table import FLOORS, METRICS, STEP, regularizer_table
from timing import Spread, synchronize
from torch import nn

from fastdean.batching import Batch, default_tokens_per_batch, plan_batches
from fastdean.collapse import CollapseRegularizer, Representations, collapse_metrics
from fastdean.data import Example
from fastdean.forward import exact_layout
from fastdean.model_state import evaluation_state

# Live features fade in mode "cumulative", which therefore refuses them.
_REGULARIZERS: dict[str, dict[str, Any]] = {
    "std, detached": {"detach_features": True, "mode": "cumulative"},
    "std, live": {"detach_features": False, "mode": "batch"},
}
_STRENGTH = 1.0
# Small enough that all rounds train the same model, as far as time goes.
_LEARNING_RATE = 1e-7
_WARM_UP_ROUNDS = 2


@dataclass(frozen=True)
class Measurement:
    """Attributes:
    case: what was run, without the model.
    turns: contender -> seconds of every round; the first one is what the others add to.
    """

    case: str
    tokens: int
    labelled: int
    turns: Mapping[str, Sequence[float]]


def run_regularizer(
    options: argparse.Namespace, environment: Environment, budget: Budget, gate: str
) -> int:
    """Append one record per architecture, thing measured and contender.

    Raises:
        ValueError: too few tokens for a sequence.
        RuntimeError: a loss or a metric is not finite; nothing of that measurement is recorded.
    """
    done = _measured_before(options, environment, gate) if options.resume else set()
    wanted = {
        architecture: [what for what in _MEASURE if (architecture, what) not in done]
        for architecture in dict.fromkeys(options.architecture or ARCHITECTURES)
    }
    if not any(wanted.values()):
        say("nothing left to measure")
    for architecture, measurements in wanted.items():
        if measurements and budget.spent:
            say("the time is used up: call again")
            return 0
        if measurements:
            _measure_one(options, environment, gate, architecture, measurements)
    return 0


def _measured_before(
    options: argparse.Namespace, environment: Environment, gate: str
) -> set[tuple[str, str]]:
    return {
        (row["architecture"], row["measured"])
        for row in records.read(options.out, "regularizer")
        if row["command"] == environment.command and records.stands_for(row, environment, gate)
    }


def _measure_one(
    options: argparse.Namespace,
    environment: Environment,
    gate: str,
    architecture: str,
    measurements: Sequence[str],
) -> None:
    subject = load_subject(options, architecture)
    for what in measurements:
        say(f"{subject.name}, {what}")
        found = _MEASURE[what](subject, options)
        rows = [
            _record(options, subject, architecture, what, found, impl, gate) for impl in found.turns
        ]
        for row in rows:
            path = records.append(options.out, "regularizer", environment, row)
            say(f"  {row.impl}: appended to {path.parent.name}/{path.name}")
        print(regularizer_table([{**vars(row), **vars(environment)} for row in rows]))


def _training_steps(subject: Subject, options: argparse.Namespace) -> Measurement:
    batch = subject.batch(options.tokens, options.length)
    steps = _Steps(subject, batch)
    contenders = {
        FLOORS[STEP]: lambda: steps.seconds(None),
        **{name: lambda name=name: steps.seconds(name) for name in _REGULARIZERS},
    }
    was_training = subject.model.training
    subject.model.train()
    try:
        turns = _take_turns(contenders, options.repeats)
    finally:
        subject.model.train(was_training)
    sequences, length = batch["input_ids"].shape
    return Measurement(
        f"steps of {sequences} x {length} tokens",
        tokens=batch["input_ids"].numel(),
        labelled=subject.labelled(batch["input_ids"], batch["labels"]),
        turns=turns,
    )


class _Steps:
    """Forward, backward and AdamW's step on one batch, with a regulariser attached or none."""

    def __init__(self, subject: Subject, batch: Mapping[str, torch.Tensor]) -> None:
        self._model, self._classes, self._batch = subject.model, subject.classes, batch
        self._device = batch["input_ids"].device
        self._optimizer = torch.optim.AdamW(subject.model.parameters(), lr=_LEARNING_RATE)
        self._statistics: dict[str, dict[str, Any]] = {}

    def seconds(self, name: str | None) -> float:
        """Of one step; attaching and detaching are outside of it.

        Raises:
            RuntimeError: the regulariser gave no finite term.
        """
        if name is None:
            return self._timed()
        with CollapseRegularizer(
            self._model, self._classes, _STRENGTH, statistic="std", **_REGULARIZERS[name]
        ) as regularizer:
            if name in self._statistics:
                regularizer.load_state_dict(self._statistics[name])
            elapsed = self._timed()
            if regularizer.value is None or not math.isfinite(regularizer.value):
                raise RuntimeError(
                    f"the regulariser {name} must give a finite term, got {regularizer.value}; "
                    "there is nothing to time before it does"
                )
            self._statistics[name] = regularizer.state_dict()
        return elapsed

    def _timed(self) -> float:
        synchronize(self._device)
        start = time.perf_counter()
        self._model(**self._batch).loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        synchronize(self._device)
        return time.perf_counter() - start


def _metrics(subject: Subject, options: argparse.Namespace) -> Measurement:
    examples = subject.examples(options.metrics_tokens)
    device = next(subject.model.parameters()).device
    # Planned as `collapse_metrics` does, which plans inside of its time.
    batches = plan_batches(
        [Example(example.input_ids, example.input_ids) for example in examples],
        shift=0,
        tokens_per_batch=default_tokens_per_batch(device),
        **vars(exact_layout(subject.model, examples)),
    )
    turns = _take_turns(
        {
            FLOORS[METRICS]: lambda: _clocked(lambda: _forward(subject.model, batches), device),
            METRICS: lambda: _clocked(lambda: _collapse(subject, examples), device),
        },
        options.metrics_repeats,
    )
    return Measurement(
        f"{len(examples)} texts in {len(batches)} batches",
        tokens=sum(map(len, examples)),
        labelled=sum(subject.labelled(each.input_ids.unsqueeze(0)) for each in examples),
        turns=turns,
    )


@torch.no_grad()
def _forward(model: nn.Module, batches: Sequence[Batch]) -> None:
    device = next(model.parameters()).device
    # Its hooks keep the model from computing logits, which `collapse_metrics` does without too.
    with evaluation_state(model), Representations(model, skip_logits=True) as last:
        for batch in batches:
            model(**batch.to(device).model_inputs())
            last.clear()


def _collapse(subject: Subject, examples: Sequence[Example]) -> None:
    found = collapse_metrics(subject.model, examples, subject.classes, progress=False).values
    if found["unc3_std"].value is None:
        raise RuntimeError(
            f"collapse_metrics must measure (U)NC3, got none: {found['unc3_std'].note}; "
            "there is nothing to time before it does"
        )


_MEASURE: dict[str, Callable[[Subject, argparse.Namespace], Measurement]] = {
    STEP: _training_steps,
    METRICS: _metrics,
}


def _take_turns(
    contenders: Mapping[str, Callable[[], float]], repeats: int
) -> dict[str, list[float]]:
    """A B A B ...: a machine that slows down or speeds up does so for all of them."""
    turns: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(1 - _WARM_UP_ROUNDS, repeats + 1):
        for name, run in contenders.items():
            seconds = run()
            if number > 0:
                turns[name].append(seconds)
                say(f"  {number}/{repeats}  {name:<16} {seconds:8.3f} s")
    return turns


def _clocked(call: Callable[[], None], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def _record(
    options: argparse.Namespace,
    subject: Subject,
    architecture: str,
    what: str,
    found: Measurement,
    impl: str,
    gate: str,
) -> RegularizerRecord:
    seconds, floor = found.turns[impl], found.turns[FLOORS[what]]
    spread, ratio = Spread.of(seconds), Spread.of_ratios(seconds, floor)
    return RegularizerRecord(
        op="regularizer",
        case=f"{subject.name}, {found.case}",
        architecture=architecture,
        measured=what,
        impl=impl,
        model=subject.name,
        tokens=found.tokens,
        labelled=found.labelled,
        classes=len(subject.classes),
        features=subject.model.get_output_embeddings().weight.shape[1],
        repeats=len(seconds),
        seconds=tuple(seconds),
        median_s=spread.median,
        p20_s=spread.p20,
        p80_s=spread.p80,
        ratio_median=ratio.median,
        ratio_p20=ratio.p20,
        ratio_p80=ratio.p80,
        floor_s=Spread.of(floor).median,
        toy=options.toy,
        gate=gate,
    )
