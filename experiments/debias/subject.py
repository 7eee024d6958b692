"""What is debiased: a model with its tokenizer, the rows it is trained on, and those held out."""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import models
from benchmarks.harness.store import say
from experiments.debias.encoder import HIDDEN, LAYERS, trained_encoder
from fastdean.collapse import (
    CollapseClasses,
    CollapseRegularizer,
    frequency_matched_control,
    random_control,
)
from fastdean.debias import augment, fine_tune

DATA = "embedded:debias"
ARMS = ("none", "words", "random", "frequency")
WORDS = "gender"
_HELD_OUT = 0.25
_SPLIT_SEED = 0
_TEXTS = ("text", "premise", "hypothesis")


@dataclass(frozen=True)
class Arm:
    """One training, or the model before any. `seed`: also of control classes and heads."""

    name: str
    strength: float
    seed: int


@dataclass(frozen=True)
class Subject:
    """Attributes:
    model: in fp32, every parameter trainable, with the weights every training starts from.
    trained, held_out: rows with `text`, or pairs to train on; the same split for every training.
    shift: of the collapse classes, trained and measured; None: by the model.
    """

    model: nn.Module
    tokenizer: Any
    name: str
    trained: Sequence[dict[str, str]]
    held_out: Sequence[dict[str, str]]
    shift: Any = None
    _start: Mapping[str, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        copies = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        object.__setattr__(self, "_start", copies)

    def restart(self) -> None:
        """Give the model the weights that every training starts from."""
        self.model.load_state_dict(self._start)

    def train(self, arm: Arm, method: str, **options: Any) -> CollapseClasses | None:
        """From the start, with the arm's regulariser; its classes. `options`: of `fine_tune`."""
        self.restart()
        classes, attached = self.classes(arm.name, arm.seed), nullcontext()
        if classes is not None:
            attached = CollapseRegularizer(self.model, classes, arm.strength, shift=self.shift)
        with attached as regularizer:
            options |= {"regularizer": regularizer, "seed": arm.seed, "progress": False}
            fine_tune(self.model, self.tokenizer, self.trained, method, **options)
        return classes

    def words(self) -> CollapseClasses:
        """The gender list."""
        return CollapseClasses.from_words(self.tokenizer, WORDS)

    def classes(self, arm: str, seed: int) -> CollapseClasses | None:
        """The classes that an arm regularises; None for "none". `seed` chooses a control.

        The frequencies that are matched are those of the training text: by the tokenizer's order
        alone, most control words would not occur in so short a text.
        """
        words = self.words()
        if arm == "none":
            return None
        if arm == "words":
            return words
        if arm == "random":
            return random_control(words, self.tokenizer, seed=seed)
        counts = Counter(torch.cat(self._training_ids).tolist())
        return frequency_matched_control(words, self.tokenizer, counts=counts, seed=seed)

    def labelled(self, classes: CollapseClasses) -> int:
        """Tokens of the training text, swapped copies included, that are of a class."""
        return sum(int((classes.labels(ids) >= 0).sum()) for ids in self._training_ids)

    @cached_property
    def _training_ids(self) -> list[Tensor]:
        texts = texts_of(augment(self.trained))
        return [torch.tensor(self.tokenizer(text)["input_ids"]) for text in texts]


def load_subject(
    options: argparse.Namespace,
    trained: Sequence[dict[str, str]],
    held_out: Sequence[dict[str, str]],
    heard: Sequence[str],
    shift: str,
) -> Subject:
    """`--masked`: the encoder trained here; else `--model`, else the GGUF file.

    `heard`: texts whose words the encoder trained here has to know too.
    """
    device = torch.device(options.device)
    if options.masked:
        texts = texts_of(trained), [*texts_of(held_out), *heard]
        say(f"training an encoder for {options.pretraining_steps} steps")
        model, tokenizer = trained_encoder(*texts, options.pretraining_steps, device)
        name = (
            f"BERT of {LAYERS} layers, {HIDDEN} wide, trained from scratch for "
            f"{options.pretraining_steps} steps on the text"
        )
    else:
        found = models.load_model(options.model, options.gguf, torch.float32, device)
        model, tokenizer, name = found
    model.requires_grad_(True)
    return Subject(model, tokenizer, name, trained, held_out, shift)


def texts_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every text that is trained on."""
    return [row[key] for row in rows for key in _TEXTS if key in row]


def split_rows(
    rows: Sequence[dict[str, str]], most: int | None = None
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(the rows to train on, a quarter or `most` held out), the same for the same rows."""
    shuffled = list(rows)
    random.Random(_SPLIT_SEED).shuffle(shuffled)
    held_out = min(max(1, round(_HELD_OUT * len(shuffled))), most or len(shuffled))
    return shuffled[held_out:], shuffled[:held_out]
