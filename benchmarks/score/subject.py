"""The model and the examples a run was asked for: real text, or a shape with random weights."""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.harness import lengths, models
from benchmarks.harness.command import at_least_two, model_options, positive
from fastdean.data.examples import Example, encode
from fastdean.data.sources import load_rows as embedded_rows

_EMBEDDED = ("fairness", "privacy", "general")
_COLUMNS = ("prompt", "response")


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
    shapes = list(models.SHAPES)
    add("--random-model", choices=shapes, help="random weights and tokens in this shape; no files")
    add("--tokens", type=at_least_two, help="with --random-model; default: BeaverTails' lengths")
    add("--examples", type=positive, default=32)
    add("--bf16-examples", type=positive, help="fewer examples in bf16, for all alike")
    add("--targets", default="mlp", help="mlp, self_attn, all or a regular expression")


def examples_in(options: argparse.Namespace, dtype: str) -> int:
    return (options.bf16_examples if dtype == "bf16" else None) or options.examples


def load_subject(options: argparse.Namespace, dtype: str) -> Subject:
    """`--random-model`, else `--model`, else the GGUF file."""
    device = torch.device(options.device)
    if options.random_model is not None:
        return random_subject(options.random_model, dtype, device, options.tokens)
    if options.tokens is not None:
        raise ValueError(
            f"tokens must be left out where rows of text are scored, got {options.tokens}; "
            "pass --random-model"
        )
    found = models.load_model(options.model, options.gguf, models.DTYPES[dtype], device)
    model, tokenizer, name = found
    return Subject(model, name, lambda n: encode(load_rows(options.rows, n), tokenizer))


def random_subject(
    shape: str, dtype: str, device: torch.device, tokens: int | None = None
) -> Subject:
    """Random weights and tokens, `tokens` in each example; None: BeaverTails' lengths."""
    model = models.random_model(shape, models.DTYPES[dtype], device)
    kind = "BeaverTails' lengths" if tokens is None else f"{tokens} tokens each"
    name = f"{models.display_name(shape)}, {kind}"
    vocabulary = model.config.vocab_size
    return Subject(model, name, lambda n: lengths.examples(lengths.chosen(n, tokens), vocabulary))


def load_rows(path: Path | None, count: int) -> list[dict[str, str]]:
    """The first `count` rows of `prompt` and `response` of a CSV file; None: of the embedded data
    sets, one row of each in turn.
    """
    if path is None:
        sets = [embedded_rows(f"embedded:{name}") for name in _EMBEDDED]
        rows = list(itertools.chain.from_iterable(zip(*sets, strict=False)))
    else:
        rows = _csv_rows(path)
    if not 1 <= count <= len(rows):
        source = "the embedded data sets" if path is None else path.name
        raise ValueError(
            f"examples must be between 1 and {len(rows)}, the rows of {source}, got {count}; "
            "give more rows with --rows"
        )
    return [{name: row[name] for name in _COLUMNS} for row in rows[:count]]


def _csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        if not set(_COLUMNS) <= set(columns):
            raise ValueError(
                f"{path.name} must have the columns prompt and response, "
                f"got {', '.join(columns) or 'none'}; rename them"
            )
        return list(reader)
