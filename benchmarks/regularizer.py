"""`regularizer`: what the collapse regulariser adds to a training step.

And what `collapse_metrics` adds to its forward passes. Both take turns with what they add to, in
one process and on the same batches: of a model from files on embedded text that holds the classes'
words, and of a masked one with random weights, random text and random classes.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import command, gate, models, tables
from benchmarks.harness.clock import Spread, elapsed
from benchmarks.harness.models import ENCODERS, display_name, random_encoder, random_model
from benchmarks.harness.session import Sample, Session, seconds_of, take_turns
from benchmarks.harness.store import Record, say
from fastdean.collapse import (
    CollapseClasses,
    CollapseRegularizer,
    Representations,
    collapse_metrics,
    default_shift,
    position_labels,
)
from fastdean.data.batching import plan_batches
from fastdean.data.examples import Example
from fastdean.data.sources import load_rows
from fastdean.debias import mask_tokens
from fastdean.models.batch_size import tokens_per_batch_of
from fastdean.models.exact_layout import exact_layout
from fastdean.models.model_state import evaluation_state

ARCHITECTURES = ("causal", "masked")
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
_TEXT = "embedded:debias"
# Of random text and random classes; about as many and as often as gendered words in `_TEXT`.
_RANDOM_CLASSES, _TOY_CLASSES, _CLASS_SHARE = 128, 8, 0.1
_RANDOM_TOKENS, _TEXT_LENGTH = 2048, 32
_SEED = 13


def add_options(parser: argparse.ArgumentParser) -> None:
    command.model_options(parser)
    add = parser.add_argument
    said = "causal: --model; masked: random weights in BERT-base's shape; default: both"
    add("--architecture", action="append", choices=ARCHITECTURES, help=said)
    add("--tokens", type=command.at_least_two, default=256, metavar="N", help="tokens of a step")
    add("--length", type=command.at_least_two, default=64, metavar="N", help="tokens of a sequence")
    said = "tokens that collapse_metrics reads"
    add("--metrics-tokens", type=command.positive, default=4000, metavar="N", help=said)
    command.repeats(parser, 10)
    command.repeats(parser, 5, "--metrics-repeats")
    command.toy(parser)


def tests(options: argparse.Namespace, on_gpu: bool) -> Sequence[str]:
    return gate.test_files("collapse_op", "collapse_regularizer", "collapse_measuring")


@dataclass(frozen=True)
class Subject:
    """What is measured on: a model in fp32, on the device, classes of its tokens, and texts."""

    model: nn.Module
    name: str
    classes: CollapseClasses
    texts: Sequence[Example]

    def batch(self, tokens: int, length: int) -> dict[str, Tensor]:
        """The arguments of one forward pass with labels, of at least one sequence."""
        size = (max(1, tokens // length), length)
        stream = itertools.cycle(torch.cat([text.input_ids for text in self.texts]).tolist())
        ids = torch.tensor(list(itertools.islice(stream, math.prod(size)))).view(size)
        batch = {"input_ids": ids, "labels": ids}
        if default_shift(self.model) == "same":
            masked = mask_tokens(
                ids,
                torch.ones_like(ids, dtype=torch.bool),
                mask_id=0,
                random_ids=torch.arange(1, int(ids.max()) + 1),
                generator=torch.Generator().manual_seed(_SEED),
            )
            batch = vars(masked)
        device = next(self.model.parameters()).device
        batch = {**batch, "attention_mask": torch.ones_like(ids)}
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def examples(self, tokens: int) -> list[Example]:
        """Texts with a token of a class, until they hold so many tokens, over and over again."""
        labelled = [text for text in self.texts if self.labelled(text.input_ids[None])]
        held = itertools.accumulate(map(len, itertools.cycle(labelled)))
        count = 1 + next(i for i, total in enumerate(held) if total >= tokens)
        return list(itertools.islice(itertools.cycle(labelled), count))

    def labelled(self, ids: Tensor, labels: Tensor | None = None) -> int:
        """How many positions of int64 [B, T] are of a class."""
        shift = default_shift(self.model)
        hidden = labels if shift == "same" else None
        return int((position_labels(self.classes, ids, labels=hidden, shift=shift) >= 0).sum())


def load_subject(options: argparse.Namespace, architecture: str) -> Subject:
    """Causal: `--model`, else the GGUF file, on embedded text. Masked: random weights and text."""
    device = torch.device(options.device)
    if architecture == "masked" or options.toy:
        return _random_subject(architecture, device, toy=options.toy)
    say("loading the model")
    model, tokenizer, name = models.load_model(options.model, options.gguf, torch.float32, device)
    texts = [_example(tokenizer(row["text"])["input_ids"]) for row in load_rows(_TEXT)]
    return Subject(model, name, CollapseClasses.from_words(tokenizer, "gender"), texts)


def _random_subject(architecture: str, device: torch.device, *, toy: bool) -> Subject:
    shape = "toy" if toy else "bert-base"
    if architecture == "causal":
        model = random_model(shape, torch.float32, device)
    else:
        model = random_encoder(ENCODERS[shape], device)
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(_SEED)
    # 0 stands for a hidden token.
    order = torch.randperm(vocabulary - 1, generator=generator) + 1
    chosen = order[: _TOY_CLASSES if toy else _RANDOM_CLASSES]
    ids = torch.randint(1, vocabulary, (_RANDOM_TOKENS,), generator=generator)
    named = chosen[torch.randint(len(chosen), ids.shape, generator=generator)]
    is_named = torch.rand(ids.shape, generator=generator) < _CLASS_SHARE
    ids = torch.where(is_named, named, ids)
    words = tuple(f"token {token}" for token in chosen.tolist())
    pieces = tuple((token,) for token in chosen.tolist())
    classes = CollapseClasses(pieces, words, ("random",) * len(words))
    texts = [_example(part.tolist()) for part in ids.split(_TEXT_LENGTH)]
    return Subject(model, display_name(shape), classes, texts)


def _example(ids: Sequence[int]) -> Example:
    tokens = torch.tensor(ids, dtype=torch.int64)
    return Example(tokens, tokens)


def run(session: Session) -> int:
    """Append one record per architecture, thing measured and contender."""
    options, due = session.options, []
    for each in itertools.product(dict.fromkeys(options.architecture or ARCHITECTURES), CONTENDERS):
        setup = dict(zip(("architecture", "measured"), each, strict=True))
        names = set(CONTENDERS[each[1]])
        if not session.earlier("regularizer", names, setup, same_command=True):
            due.append(setup)
    subject, loaded = None, ""
    for each in session.due(due, "measurements"):
        architecture, what = each.values()
        if loaded != architecture:
            subject, loaded = load_subject(options, architecture), architecture
        say(f"{subject.name}, {what}")
        prepare, rounds = training_steps, options.repeats
        if what == METRICS:
            prepare, rounds = metrics, options.metrics_repeats
        case, counts, turns = prepare(subject, options)
        taken = {n: s for n, s, _ in take_turns(turns, rounds, warm_up=_WARM_UP_ROUNDS)}
        features = subject.model.get_output_embeddings().weight.shape[1]
        size = {"classes": len(subject.classes), "features": features, "repeats": rounds}
        setup = {**each, "model": subject.name, **counts, **size}
        case, rows = f"{subject.name}, {case}", []
        floor = seconds_of(taken[CONTENDERS[what][0]])
        for name, samples in taken.items():
            seconds = seconds_of(samples)
            ratio = Spread.of_ratios(seconds["rounds_s"], floor["rounds_s"])
            ratios = {f"ratio_{point}": value for point, value in vars(ratio).items()}
            parts = {"seconds": seconds, "metrics": {**ratios, "floor_s": floor["median_s"]}}
            rows.append(session.append("regularizer", case, name, setup=setup, **parts))
        print(tables.rendered(TABLE, rows))
    return 0


# What is measured: (the case, how many "tokens" it has and how many are "labelled", the turns).
Prepared = tuple[str, Mapping[str, int], Mapping[str, Callable[[], Sample]]]


def training_steps(subject: Subject, options: argparse.Namespace) -> Prepared:
    batch = subject.batch(options.tokens, options.length)
    sequences, length = batch["input_ids"].shape
    labelled = subject.labelled(batch["input_ids"], batch["labels"])
    steps = Steps(subject, batch)
    turns = {name: partial(steps.turn, name) for name in CONTENDERS[STEP]}
    counts = {"tokens": sequences * length, "labelled": labelled}
    return f"steps of {sequences} x {length} tokens", counts, turns


class Steps:
    """Forward, backward and AdamW's step on one batch, with a regulariser attached or none."""

    def __init__(self, subject: Subject, batch: Mapping[str, Tensor]) -> None:
        self._model, self._classes, self._batch = subject.model, subject.classes, batch
        self._optimizer = torch.optim.AdamW(subject.model.parameters(), lr=_LEARNING_RATE)
        self.statistics: dict[str, dict[str, Any]] = {}

    def turn(self, name: str) -> Sample:
        """One step in training mode; attaching and detaching are outside of its time."""
        device, was_training = self._batch["input_ids"].device, self._model.training
        self._model.train()
        try:
            if name not in _REGULARIZERS:
                return Sample(elapsed(self._step, device))
            with CollapseRegularizer(
                self._model, self._classes, _STRENGTH, statistic="std", **_REGULARIZERS[name]
            ) as regularizer:
                if name in self.statistics:
                    regularizer.load_state_dict(self.statistics[name])
                seconds = elapsed(self._step, device)
                self.statistics[name] = regularizer.state_dict()
        finally:
            self._model.train(was_training)
        return Sample(seconds)

    def _step(self) -> None:
        self._model(**self._batch).loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


def metrics(subject: Subject, options: argparse.Namespace) -> Prepared:
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

    collapse = partial(collapse_metrics, model, examples, subject.classes, progress=False)
    calls = zip(CONTENDERS[METRICS], (forward, collapse), strict=True)
    turns = {name: lambda call=call: Sample(elapsed(call, device)) for name, call in calls}
    labelled = sum(subject.labelled(each.input_ids[None]) for each in examples)
    counts = {"tokens": sum(map(len, examples)), "labelled": labelled}
    return f"{len(examples)} texts in {len(batches)} batches", counts, turns


def _columns(rows: Sequence[Record]) -> tables.Columns:
    measured = rows[0]["measured"]

    def compared(row: Record) -> str:
        times = Spread(row["ratio_median"], row["ratio_p20"], row["ratio_p80"])
        within = ", no difference beyond noise" if times.p20 <= 1 <= times.p80 else ""
        is_first = row.contender == CONTENDERS[measured][0]
        return "1.000x" if is_first else tables.ratio(times, 3) + within

    return {
        measured: lambda row: _NAMES.get(row.contender, f"with it: {row.contender}"),
        "seconds (p20 to p80)": tables.SPREAD.replace(".2f", ".3f"),
        "times the first, round by round (p20 to p80)": compared,
    }


_NOTE = (
    "{case}: {tokens} tokens, {labelled} of them of one of {classes} classes, {features} features; "
    "{repeats} rounds."
)
_KEYS = ("device", "case", "architecture", "measured")
TABLE = tables.Table("python -m benchmarks regularizer", _columns, _NOTE, _KEYS)
