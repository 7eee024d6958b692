"""The model and the examples a run was asked for: real text, or a shape with random weights."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.harness import lengths, models
from benchmarks.harness.command import at_least_two, model_options, positive
from benchmarks.harness.lengths import Length
from benchmarks.score.text import load_rows
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


def add_options(parser: argparse.ArgumentParser) -> None:
    model_options(parser)
    add = parser.add_argument
    add("--rows", type=Path, help="CSV with prompt and response; default: the embedded rows")
    add(
        "--random-model",
        choices=list(models.SHAPES),
        help="random weights in this shape, and random tokens; needs no files",
    )
    add(
        "--tokens",
        type=at_least_two,
        help="of each example, with --random-model; default: BeaverTails' lengths",
    )
    add("--examples", type=positive, default=32)
    add(
        "--bf16-examples",
        type=positive,
        help="fewer examples in bf16, for all implementations alike; "
        "a CPU without bf16 instructions is far slower there than in fp32",
    )
    add("--targets", default="mlp", help="mlp, self_attn, all or a regular expression")


def examples_in(options: argparse.Namespace, dtype: str) -> int:
    if dtype == "bf16" and options.bf16_examples is not None:
        return options.bf16_examples
    return options.examples


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
    model, tokenizer, name = models.load_model(
        options.model, options.gguf, models.DTYPES[dtype], device
    )
    return Subject(model, name, lambda n: encode(load_rows(options.rows, n), tokenizer))


def random_subject(
    shape: str, dtype: str, device: torch.device, tokens: int | None = None
) -> Subject:
    """A model with random weights, and random tokens in examples of `tokens` each.

    Args:
        tokens: None: BeaverTails' lengths.
    """
    model = models.random_model(shape, models.DTYPES[dtype], device)
    kind = "BeaverTails' lengths" if tokens is None else f"{tokens} tokens each"

    def examples(count: int) -> list[Example]:
        return random_examples(model, lengths_of(count, tokens))

    return Subject(model, f"{models.display_name(shape)}, {kind}", examples)


def lengths_of(count: int, tokens: int | None) -> list[Length]:
    """`count` lengths of `tokens` each; None: BeaverTails'."""
    return lengths.beavertails(count) if tokens is None else lengths.fixed(count, tokens)


def random_examples(model: nn.Module, chosen: Sequence[Length]) -> list[Example]:
    """Random tokens of the model's vocabulary."""
    return lengths.examples(chosen, model.config.vocab_size)
