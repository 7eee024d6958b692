"""What the regulariser is timed on: a model, classes of its tokens, and text that holds them."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.harness import models
from benchmarks.harness.models import ENCODERS, display_name, random_encoder, random_model
from benchmarks.harness.store import say
from fastdean.collapse import CollapseClasses, default_shift, position_labels
from fastdean.data.examples import Example
from fastdean.data.sources import load_rows
from fastdean.debias import mask_tokens

ARCHITECTURES = ("causal", "masked")
_TEXT = "embedded:debias"
_TEXT_LENGTH = 32
# Of random text and random classes; about as many and as often as gendered words in `_TEXT`.
_RANDOM_CLASSES = 128
_CLASS_SHARE = 0.1
_RANDOM_TOKENS = 2048
_TOY_CLASSES = 8
_SEED = 13


@dataclass(frozen=True)
class Subject:
    """Attributes:
    model: in fp32, on the device.
    stream: int64 [N] on the CPU, the text's tokens one after the other.
    texts: the same tokens as single texts.
    """

    model: nn.Module
    name: str
    classes: CollapseClasses
    stream: Tensor
    texts: Sequence[Example]

    def batch(self, tokens: int, length: int) -> dict[str, Tensor]:
        """The arguments of one forward pass with labels: tokens // length sequences."""
        if tokens < length:
            raise ValueError(
                f"tokens must be at least length, {length}, to make a sequence, got {tokens}; pass "
                "more --tokens or a shorter --length"
            )
        count = tokens // length
        times = -(-count * length // len(self.stream))
        ids = self.stream.repeat(times)[: count * length].view(count, length)
        device = next(self.model.parameters()).device
        batch = {"input_ids": ids, "labels": ids}
        if default_shift(self.model) == "same":
            batch = self._hidden(ids)
        batch["attention_mask"] = torch.ones_like(ids)
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def examples(self, tokens: int) -> list[Example]:
        """Texts with a token of a class, until they hold so many tokens, over and over again."""
        labelled = [text for text in self.texts if self.labelled(text.input_ids.unsqueeze(0))]
        held = itertools.accumulate(map(len, itertools.cycle(labelled)))
        count = 1 + next(i for i, total in enumerate(held) if total >= tokens)
        return list(itertools.islice(itertools.cycle(labelled), count))

    def labelled(self, ids: Tensor, labels: Tensor | None = None) -> int:
        """How many positions of int64 [B, T] are of a class."""
        shift = default_shift(self.model)
        hidden = labels if shift == "same" else None
        return int((position_labels(self.classes, ids, labels=hidden, shift=shift) >= 0).sum())

    def _hidden(self, ids: Tensor) -> dict[str, Tensor]:
        masked = mask_tokens(
            ids,
            torch.ones_like(ids, dtype=torch.bool),
            mask_id=0,
            random_ids=torch.arange(1, int(ids.max()) + 1),
            generator=torch.Generator().manual_seed(_SEED),
        )
        return dict(vars(masked))


def load_subject(options: argparse.Namespace, architecture: str) -> Subject:
    """Causal: `--model`, else the GGUF file, on embedded text. Masked: random weights and text."""
    device = torch.device(options.device)
    if architecture == "masked" or options.toy:
        return _random_subject(architecture, device, toy=options.toy)
    say("loading the model")
    model, tokenizer, name = models.load_model(options.model, options.gguf, torch.float32, device)
    classes = CollapseClasses.from_words(tokenizer, "gender")
    texts = [_example(tokenizer(row["text"])["input_ids"]) for row in load_rows(_TEXT)]
    return Subject(model, name, classes, torch.cat([t.input_ids for t in texts]), texts)


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
    texts = [_example(part.tolist()) for part in ids.split(_TEXT_LENGTH)]
    words = tuple(f"token {token}" for token in chosen.tolist())
    pieces = tuple((token,) for token in chosen.tolist())
    classes = CollapseClasses(pieces, words, ("random",) * len(words))
    return Subject(model, display_name(shape), classes, ids, texts)


def _example(ids: Sequence[int]) -> Example:
    tokens = torch.tensor(ids, dtype=torch.int64)
    return Example(tokens, tokens)
