"""Examples as a model's forward takes them, or why it does not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastdean.data.examples import IGNORE_INDEX, Example
from fastdean.models.calling import (
    forward_inputs,
)
from fastdean.models.model_state import (
    input_embedding,
    max_tokens,
    text_config,
)
from fastdean.models.probes import (
    numbers_from,
)

# What models call the tables that they look positions and token types up in.
_POSITIONS = re.compile(r"^wpe$|^(?!.*(relative|rel_)).*position")
_TABLES = {"position_ids": _POSITIONS, "token_type_ids": re.compile(r"token_type")}


def fitted(model: nn.Module, examples: Sequence[Example]) -> list[Example]:
    """The examples with those of their columns that `model` takes, and no others.

    Positions that the model gives its tokens by itself are left out as well.

    Raises:
        ValueError: an example came with an input that the model's forward names and a batch of
            tokens cannot carry; or it has more tokens than the model's table has positions, or
            others than the model knows.
    """
    names = forward_inputs(model)
    tables = {name: _table_size(model, kind) for name, kind in _TABLES.items()}
    numbered: dict[int, bool] = {}
    found = []
    for number, example in enumerate(examples):
        if lost := sorted(example.not_carried & names):
            raise ValueError(
                "loader must give the model inputs of one integer per token, got "
                f"{', '.join(lost)} for example {number}, which {type(model).__name__} takes in "
                "another form; leave them out, or score its batches as they are with loss_fn="
            )
        if example.columns:
            columns = {name: c for name, c in example.columns.items() if name in names}
            _require_known(columns, tables, number)
            example = replace(example, columns=_without_default_positions(model, columns, numbered))
        found.append(replace(example, not_carried=frozenset()))
    _require_tokens(model, found)
    if tables["position_ids"] is not None:
        require_positions(model, found)
    return found


def _require_tokens(model: nn.Module, examples: Sequence[Example]) -> None:
    """Refuse what would fail deep inside the model, or on a GPU without a message."""
    vocabulary = _vocabulary(model)
    for i, example in enumerate(examples):
        targets = example.labels[example.labels != IGNORE_INDEX]
        for key, ids in (("input_ids", example.input_ids), ("labels", targets)):
            outside = ids[(ids < 0) | (ids >= vocabulary)]
            if outside.numel():
                ignored = "" if key == "input_ids" else f" or be {IGNORE_INDEX}"
                raise ValueError(
                    f"{key} must lie in 0..{vocabulary - 1}{ignored}, got {int(outside[0])} in "
                    f"example {i}; use the model's own tokenizer"
                )


def _vocabulary(model: nn.Module) -> int:
    # Some (Perceiver) name a parameter that is no table of tokens.
    weight = getattr(input_embedding(model), "weight", None)
    return text_config(model).vocab_size if weight is None else weight.shape[0]


def require_positions(model: nn.Module, examples: Sequence[Example], first: int = 0) -> None:
    """Raise ValueError for the first example, counted from `first`, longer than the positions."""
    longest = max_tokens(model)
    for i, example in enumerate(examples, start=first):
        if longest is not None and len(example) > longest:
            raise ValueError(
                f"example {i} must have at most {longest} tokens (the model's positions), got "
                f"{len(example)}; cut it with max_length"
            )


def _require_known(
    columns: Mapping[str, Tensor], tables: Mapping[str, int | None], number: int
) -> None:
    """Refuse numbers that the model looks up in a table and that lie outside of it."""
    for name, size in tables.items():
        values = columns.get(name)
        if values is None or size is None:
            continue
        outside = values[(values < 0) | (values >= size)]
        if outside.numel():
            raise ValueError(
                f"{name} must lie in 0..{size - 1}, got {int(outside[0])} in example {number}; "
                "leave them out to have the model's own"
            )


def _table_size(model: nn.Module, kind: re.Pattern[str]) -> int | None:
    """How many rows the model's table of positions or of token types has; None where it has none.

    A table of fewer positions than the model has is another part's: of a tower for images.
    """
    at_least = (max_tokens(model) or 1) if kind is _POSITIONS else 1
    sizes = [
        module.num_embeddings - getattr(module, "offset", 0)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and kind.search(name.rpartition(".")[2])
    ]
    return min((size for size in sizes if size >= at_least), default=None)


def _without_default_positions(
    model: nn.Module, columns: dict[str, Tensor], numbered: dict[int, bool]
) -> dict[str, Tensor]:
    """The columns less positions that the model gives by itself; `numbered` keeps the answers."""
    positions, mask = columns.get("position_ids"), columns.get("attention_mask")
    columns = dict(columns)
    if positions is not None:
        start = int(positions[0])
        # Other starts are not asked about: each answer takes forward passes.
        if start in usual_starts(model):
            consecutive = torch.arange(start, start + len(positions))
            if start not in numbered:
                numbered[start] = numbers_from(model, start)
            if torch.equal(positions, consecutive) and numbered[start]:
                del columns["position_ids"]
    if mask is not None and "position_ids" not in columns and bool(mask.all()):
        del columns["attention_mask"]
    return columns


def usual_starts(model: nn.Module) -> list[int]:
    """From which positions models number their tokens: 0, or behind the padding one (RoBERTa)."""
    padding = getattr(text_config(model), "pad_token_id", None)
    return [0] if padding is None else sorted({0, padding + 1})
