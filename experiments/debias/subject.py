"""What is debiased: a model with its tokenizer, the rows it is trained on, and those held out."""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import models
from benchmarks.harness.store import say
from experiments.debias.encoder import HIDDEN, LAYERS, trained_encoder
from fastdean.collapse import CollapseClasses, frequency_matched_control, random_control
from fastdean.data.sources import load_rows
from fastdean.debias import augment

DATA = "embedded:debias"
ARMS = ("none", "words", "random", "frequency")
WORDS = "gender"
_HELD_OUT = 0.25
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Subject:
    """Attributes:
    model: in fp32, every parameter trainable, with the weights every training starts from.
    trained, held_out: rows with `text`; the same split for every training.
    """

    model: nn.Module
    tokenizer: Any
    name: str
    trained: Sequence[dict[str, str]]
    held_out: Sequence[dict[str, str]]

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
        counts = Counter(torch.cat(self._training_ids()).tolist())
        return frequency_matched_control(words, self.tokenizer, counts=counts, seed=seed)

    def labelled(self, classes: CollapseClasses) -> int:
        """Tokens of the training text, swapped copies included, that are of a class."""
        return sum(int((classes.labels(ids) >= 0).sum()) for ids in self._training_ids())

    def _training_ids(self) -> list[Tensor]:
        texts = [row["text"] for row in augment(self.trained)]
        return [torch.tensor(self.tokenizer(text)["input_ids"]) for text in texts]


def load_subject(options: argparse.Namespace) -> Subject:
    """`--masked`: the encoder trained here; else `--model`, else the GGUF file."""
    trained, held_out = split_rows(load_rows(DATA))
    device = torch.device(options.device)
    if options.masked:
        texts = [[row["text"] for row in rows] for rows in (trained, held_out)]
        say(f"training an encoder for {options.pretraining_steps} steps")
        model, tokenizer = trained_encoder(*texts, options.pretraining_steps, device)
        name = (
            f"BERT of {LAYERS} layers, {HIDDEN} wide, trained from scratch for "
            f"{options.pretraining_steps} steps on the embedded text"
        )
    else:
        found = models.load_model(options.model, options.gguf, torch.float32, device)
        model, tokenizer, name = found
    return Subject(model.requires_grad_(True), tokenizer, name, trained, held_out)


def split_rows(rows: Sequence[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(three quarters to train on, one quarter held out), the same for the same rows."""
    shuffled = list(rows)
    random.Random(_SPLIT_SEED).shuffle(shuffled)
    held_out = max(1, round(_HELD_OUT * len(shuffled)))
    return shuffled[held_out:], shuffled[:held_out]
