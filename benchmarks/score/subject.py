"""The model and the examples a run was asked for: real text, or a shape with random weights."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from benchmarks.harness import lengths, models
from benchmarks.harness.command import at_least_two, model_options, positive
from fastdean.data import sources
from fastdean.data.examples import Example, encode

_EMBEDDED = ("fairness", "privacy", "general")


class Subject(NamedTuple):
    """A causal language model in eval mode, on the device; the name of the model and, where they
    are not text, of the examples' lengths; how many examples are wanted -> that many."""

    model: nn.Module
    name: str
    examples: Callable[[int], list[Example]]


def add_options(parser: argparse.ArgumentParser) -> None:
    model_options(parser)
    add = parser.add_argument
    said = "file with prompt and response; default: the embedded rows"
    add("--rows", type=Path, metavar="FILE", help=said)
    said = f"random weights and tokens in this shape, no files: {', '.join(models.SHAPES)}"
    add("--random-model", choices=list(models.SHAPES), metavar="SHAPE", help=said)
    said = "with --random-model: of each example; default: BeaverTails' lengths"
    add("--tokens", type=at_least_two, metavar="N", help=said)
    add("--examples", type=positive, default=32, metavar="N", help="number of examples")
    said = "fewer examples in bf16, for all alike"
    add("--bf16-examples", type=positive, metavar="N", help=said)
    said = "weights to score: mlp, self_attn, all or a regular expression"
    add("--targets", default="mlp", help=said)


def examples_in(options: argparse.Namespace, dtype: str) -> int:
    return (options.bf16_examples if dtype == "bf16" else None) or options.examples


def load_subject(options: argparse.Namespace, dtype: str) -> Subject:
    """`--random-model`, else `--model`, else the GGUF file."""
    device, tokens = torch.device(options.device), options.tokens
    if options.random_model is not None:
        shape = options.random_model
        model = models.random_model(shape, models.DTYPES[dtype], device)
        kind = "BeaverTails' lengths" if tokens is None else f"{tokens} tokens each"
        size = model.config.vocab_size
        name = f"{models.display_name(shape)}, {kind}"
        return Subject(model, name, lambda n: lengths.random_examples(n, tokens, size))
    if tokens is not None:
        raise ValueError(
            f"tokens must be left out where rows of text are scored, got {tokens}; "
            "pass --random-model"
        )
    found = models.load_model(options.model, options.gguf, models.DTYPES[dtype], device)
    model, tokenizer, name = found
    return Subject(model, name, lambda n: encode(load_rows(options.rows, n), tokenizer))


def load_rows(path: Path | None, count: int) -> list[dict[str, str]]:
    """The first `count` rows with prompt and response of a file; None: of the embedded data sets,
    one row of each in turn."""
    if path is None:
        sets = [sources.load_rows(f"embedded:{name}") for name in _EMBEDDED]
        rows = list(itertools.chain.from_iterable(zip(*sets, strict=False)))
    else:
        rows = sources.load_rows(path)
    if not 1 <= count <= len(rows):
        source = "the embedded data sets" if path is None else path.name
        raise ValueError(
            f"examples must be between 1 and {len(rows)}, the rows of {source}, got {count}; "
            "give more rows with --rows"
        )
    return [{name: row[name] for name in ("prompt", "response")} for row in rows[:count]]
