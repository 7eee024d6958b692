"""The model and the examples a run was asked for: real text, or a shape with random weights."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import inputs
import lengths
import torch
from lengths import Length
from random_model import display_name, random_model
from torch import nn

from fastdean.data import Example, encode


@dataclass(frozen=True)
class Subject:
    """Attributes:
    model: a causal language model in eval mode, on the device.
    name: of the model and, where they are not text, of the examples' lengths.
    examples: how many are wanted -> that many.
    """

    model: nn.Module
    name: str
    examples: Callable[[int], list[Example]]


def load_subject(options: argparse.Namespace, dtype: str) -> Subject:
    """`--random-model`, else `--model`, else the GGUF file.

    Raises:
        ValueError: `--tokens` is given for text.
    """
    device = torch.device(options.device)
    if options.random_model is not None:
        return random_subject(options.random_model, dtype, device, options.tokens)
    if options.tokens is not None:
        raise ValueError(
            f"tokens must be left out where rows of text are scored, got {options.tokens}; "
            "pass --random-model"
        )
    model, tokenizer, name = inputs.load_model(
        options.model, options.gguf, inputs.DTYPES[dtype], device
    )
    return Subject(model, name, lambda n: encode(inputs.load_rows(options.rows, n), tokenizer))


def random_subject(
    shape: str, dtype: str, device: torch.device, tokens: int | None = None
) -> Subject:
    """A model with random weights, and random tokens in examples of `tokens` each.

    Args:
        tokens: None: BeaverTails' lengths.
    """
    model = random_model(shape, inputs.DTYPES[dtype], device)
    kind = "BeaverTails' lengths" if tokens is None else f"{tokens} tokens each"

    def examples(count: int) -> list[Example]:
        return random_examples(model, lengths_of(count, tokens))

    return Subject(model, f"{display_name(shape)}, {kind}", examples)


def lengths_of(count: int, tokens: int | None) -> list[Length]:
    """`count` lengths of `tokens` each; None: BeaverTails'."""
    return lengths.beavertails(count) if tokens is None else lengths.fixed(count, tokens)


def random_examples(model: nn.Module, chosen: Sequence[Length]) -> list[Example]:
    """Random tokens of the model's vocabulary."""
    return lengths.examples(chosen, model.config.vocab_size)
