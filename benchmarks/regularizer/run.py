"""`regularizer`: what the collapse regulariser adds to a training step.

And what `collapse_metrics` adds to its forward passes. Both take turns with what they add to, in
one process and on the same batches.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.harness import tables
from benchmarks.harness.clock import Spread, elapsed
from benchmarks.harness.command import at_least_two, model_options, positive
from benchmarks.harness.gate import test_files
from benchmarks.harness.session import Sample, Session, seconds_of, take_turns
from benchmarks.harness.store import Record, say
from benchmarks.harness.tables import Cells, Table
from benchmarks.regularizer.subject import ARCHITECTURES, Subject, load_subject
from fastdean.collapse import CollapseRegularizer, Representations, collapse_metrics
from fastdean.data.batching import plan_batches
from fastdean.data.examples import Example
from fastdean.models.forward import exact_layout, tokens_per_batch_of
from fastdean.models.model_state import evaluation_state

STEP, METRICS = "training step", "collapse_metrics"
_NAMES = {
    "without": "without a regulariser",
    "forward passes": "its forward passes alone",
    METRICS: "`collapse_metrics`",
}
# Live features fade in mode "cumulative", which therefore refuses them.
_REGULARIZERS: dict[str, dict[str, Any]] = {
    "std, detached": {"detach_features": True, "mode": "cumulative"},
    "std, live": {"detach_features": False, "mode": "batch"},
}
# The first of each is what the others add to.
CONTENDERS = {STEP: ("without", *_REGULARIZERS), METRICS: ("forward passes", METRICS)}
_STRENGTH = 1.0
# Small enough that all rounds train the same model, as far as time goes.
_LEARNING_RATE = 1e-7
_WARM_UP_ROUNDS = 2

Turns = dict[str, list[Sample]]


def add_options(parser: argparse.ArgumentParser) -> None:
    model_options(parser)
    add = parser.add_argument
    said = "causal: --model; masked: random weights in BERT-base's shape; default: both"
    add("--architecture", action="append", choices=ARCHITECTURES, help=said)
    add("--tokens", type=at_least_two, default=256, help="of a step; default: 256")
    add("--length", type=at_least_two, default=64, help="of its sequences; default: 64")
    add("--repeats", type=positive, default=10)
    said = "that collapse_metrics reads; default: 4000"
    add("--metrics-tokens", type=positive, default=4000, help=said)
    add("--metrics-repeats", type=positive, default=5)
    add("--toy", action="store_true", help="tiny models, to try the command out")


def tests(options: argparse.Namespace, on_gpu: bool) -> Sequence[str]:
    return test_files("collapse_op", "collapse_regularizer", "collapse_measuring")


def run(session: Session) -> int:
    """Append one record per architecture, thing measured and contender."""
    due = []
    for architecture in dict.fromkeys(session.options.architecture or ARCHITECTURES):
        for what, names in CONTENDERS.items():
            each = {"architecture": architecture, "measured": what}
            if not session.earlier("regularizer", set(names), each, same_command=True):
                due.append(each)
    subject, loaded = None, ""
    for each in session.due(due, "measurements"):
        architecture, what = each["architecture"], each["measured"]
        if loaded != architecture:
            subject, loaded = load_subject(session.options, architecture), architecture
        say(f"{subject.name}, {what}")
        measure = training_steps if what == STEP else metrics
        rows = _record(session, subject, each, *measure(subject, session.options))
        print(tables.rendered(TABLE, rows))
    return 0


def _record(
    session: Session, subject: Subject, measured: Mapping[str, str], found: Mapping, turns: Turns
) -> list[Record]:
    """Ratios are those of the seconds over the first contender's, round by round; `found`: the
    "case", without the model, its "tokens", and how many are "labelled"."""
    features = subject.model.get_output_embeddings().weight.shape[1]
    size = {"classes": len(subject.classes), "features": features}
    setup = {**measured, "model": subject.name, **found, **size}
    case = f"{subject.name}, {setup.pop('case')}"
    floor, rows = seconds_of(next(iter(turns.values()))), []
    for name, samples in turns.items():
        seconds = seconds_of(samples)
        ratio = Spread.of_ratios(seconds["rounds_s"], floor["rounds_s"])
        ratios = {f"ratio_{point}": value for point, value in vars(ratio).items()}
        parts = {"seconds": seconds, "metrics": {**ratios, "floor_s": floor["median_s"]}}
        parts["setup"] = setup | {"repeats": len(samples)}
        rows.append(session.append("regularizer", case, name, **parts))
    return rows


def _turns(contenders: Mapping[str, Callable[[], Sample]], rounds: int) -> Turns:
    taken = take_turns(contenders, rounds, warm_up=_WARM_UP_ROUNDS)
    return {name: samples for name, samples, _ in taken}


def training_steps(subject: Subject, options: argparse.Namespace) -> tuple[Mapping, Turns]:
    batch = subject.batch(options.tokens, options.length)
    steps = Steps(subject, batch)
    was_training = subject.model.training
    subject.model.train()
    try:
        turns = {name: partial(steps.turn, name) for name in CONTENDERS[STEP]}
        taken = _turns(turns, options.repeats)
    finally:
        subject.model.train(was_training)
    sequences, length = batch["input_ids"].shape
    labelled = subject.labelled(batch["input_ids"], batch["labels"])
    case = f"steps of {sequences} x {length} tokens"
    return {"case": case, "tokens": sequences * length, "labelled": labelled}, taken


class Steps:
    """Forward, backward and AdamW's step on one batch, with a regulariser attached or none."""

    def __init__(self, subject: Subject, batch: Mapping[str, torch.Tensor]) -> None:
        self._model, self._classes, self._batch = subject.model, subject.classes, batch
        self._optimizer = torch.optim.AdamW(subject.model.parameters(), lr=_LEARNING_RATE)
        self.statistics: dict[str, dict[str, Any]] = {}

    def turn(self, name: str) -> Sample:
        """One step; attaching and detaching are outside of its time."""
        device = self._batch["input_ids"].device
        if name not in _REGULARIZERS:
            return Sample(elapsed(self._step, device))
        with CollapseRegularizer(
            self._model, self._classes, _STRENGTH, statistic="std", **_REGULARIZERS[name]
        ) as regularizer:
            if name in self.statistics:
                regularizer.load_state_dict(self.statistics[name])
            seconds = elapsed(self._step, device)
            if regularizer.value is None or not math.isfinite(regularizer.value):
                raise RuntimeError(
                    f"the regulariser {name} must give a finite term, got {regularizer.value}; "
                    "there is nothing to time before it does"
                )
            self.statistics[name] = regularizer.state_dict()
        return Sample(seconds)

    def _step(self) -> None:
        self._model(**self._batch).loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


def metrics(subject: Subject, options: argparse.Namespace) -> tuple[Mapping, Turns]:
    model, examples = subject.model, subject.examples(options.metrics_tokens)
    device = next(model.parameters()).device
    # Planned as `collapse_metrics` does, which plans inside of its time.
    batches = plan_batches(
        [Example(example.input_ids, example.input_ids) for example in examples],
        shift=0,
        tokens_per_batch=tokens_per_batch_of(model),
        **vars(exact_layout(model, examples)),
    )

    @torch.no_grad()
    def forward() -> None:
        # Its hooks keep the model from computing logits, which `collapse_metrics` does without too.
        with evaluation_state(model), Representations(model, skip_logits=True) as last:
            for batch in batches:
                model(**batch.to(device).model_inputs())
                last.clear()

    def collapse() -> None:
        found = collapse_metrics(model, examples, subject.classes, progress=False).values
        if found["unc3_std"].value is None:
            raise RuntimeError(
                f"collapse_metrics must measure (U)NC3, got none: {found['unc3_std'].note}; "
                "there is nothing to time before it does"
            )

    calls = zip(CONTENDERS[METRICS], (forward, collapse), strict=True)
    turns = {name: lambda call=call: Sample(elapsed(call, device)) for name, call in calls}
    found = {
        "case": f"{len(examples)} texts in {len(batches)} batches",
        "tokens": sum(map(len, examples)),
        "labelled": sum(subject.labelled(each.input_ids.unsqueeze(0)) for each in examples),
    }
    return found, _turns(turns, options.metrics_repeats)


def _lines(rows: Sequence[Record]) -> tuple[Cells, list[Cells]]:
    measured = rows[0]["measured"]
    compared = "times the first, round by round (p20 to p80)"
    lines = []
    for row in rows:
        times = Spread(row["ratio_median"], row["ratio_p20"], row["ratio_p80"])
        within = ", no difference beyond noise" if times.p20 <= 1 <= times.p80 else ""
        is_first = row.contender == CONTENDERS[measured][0]
        ratio = "1.000x" if is_first else tables.ratio(times, 3) + within
        name = _NAMES.get(row.contender, f"with it: {row.contender}")
        lines.append([name, tables.spread(row, 3), ratio])
    return [measured, "seconds (p20 to p80)", compared], lines


def _notes(rows: Sequence[Record]) -> list[str]:
    row = rows[0]
    made = (
        f"{row.case}: {row['tokens']} tokens, {row['labelled']} of them of one of "
        f"{row['classes']} classes, {row['features']} features; {row['repeats']} rounds"
    )
    return [f"{made}. {tables.provenance_line(row)}"]


_KEYS = ("device", "case", "architecture", "measured")
TABLE = Table("python -m benchmarks regularizer", _KEYS, _KEYS, _lines, _notes)
