"""In which layouts of a batch a model computes of each example what it computes of it alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from fastdean.data.batching import Layout
from fastdean.data.examples import Example
from fastdean.models.label_shift import label_shift
from fastdean.models.model_state import (
    config_entry,
    max_tokens,
    text_config,
)
from fastdean.models.probes import (
    packing_is_exact,
    padding_is_exact,
    segments_are_exact,
    undisturbed,
)

# What configurations call the number of tokens that attention picks, or of blocks and their size.
_PICKED = ("keep_window_size", "index_topk", "indexer_budget")
_PICKED_BLOCKS = ("index_topk_blocks", "index_block_size")


def exact_layout(model: nn.Module, examples: Sequence[Example]) -> Layout:
    """How these `fitted` examples may share a batch of this model without changing its numbers."""
    plain = [example for example in examples if not example.columns]
    by_columns: dict[tuple[str, ...], list[Example]] = {}
    for example in examples:
        if example.columns and not example.stands_alone:
            by_columns.setdefault(tuple(sorted(example.columns)), []).append(example)
    with undisturbed(model):
        causal = label_shift(model) == 1
        packed = causal and packing_is_exact(model, plain)
        by_segments = causal and segments_are_exact(model, plain)
        grouped = [*([] if packed else [plain]), *by_columns.values()]
        padded = all(padding_is_exact(model, group) for group in grouped)
    return Layout(
        packed=packed,
        padded=padded,
        alone_above=alone_above(model),
        longest_row=_longest_row(model) if packed or by_segments else None,
        by_segments=by_segments,
    )


def _longest_row(model: nn.Module) -> int | None:
    """Tokens of a row in which no example's numbers depend on the others there, or None.

    Llama 4 scales its queries by their places in the row, from the `floor_scale`th on, whatever
    their positions.
    """
    config = text_config(model)
    scaled_from = getattr(config, "floor_scale", None)
    if not scaled_from or not getattr(config, "attn_temperature_tuning", False):
        scaled_from = math.inf
    picking = _picking_limit(model) or math.inf
    shortest = min(max_tokens(model) or math.inf, scaled_from - 1, picking)
    return None if shortest == math.inf else max(1, int(shortest))


def alone_above(model: nn.Module) -> int | None:
    """The length from which an example's numbers depend on what shares its batch, or None."""
    limits = (_rotary_limit(model), _picking_limit(model))
    return min((limit for limit in limits if limit is not None), default=None)


def _picking_limit(model: nn.Module) -> int | None:
    """The length from which attention sees a few tokens that the model picks, or None.

    In longer rows, padding included, models were seen to pick other tokens of the same example
    (Doge, DeepSeek's sparse attention, whose scores are clipped at zero and so may tie).
    """
    config = text_config(model)
    limits = [config_entry(config, name) for name in _PICKED]
    # Where several tokens are compressed to one before that, so many compressed ones are picked.
    rates = config_entry(config, "compress_rates")
    if isinstance(rates, Mapping) and rates:
        limits = [limit * min(rates.values()) if limit else None for limit in limits]
    picked, size = (config_entry(config, name) for name in _PICKED_BLOCKS)
    if isinstance(picked, int) and isinstance(size, int):
        limits.append(picked * size)
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def _rotary_limit(model: nn.Module) -> int | None:
    """The length from which rotary frequencies depend on the longest example of a batch."""
    config = text_config(model)
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    limits = []
    for rope in (found, *found.values()):
        kind = rope.get("rope_type") or rope.get("type") if isinstance(rope, Mapping) else None
        if kind is not None and ("dynamic" in kind or kind == "longrope"):
            limits += [
                rope.get("original_max_position_embeddings"),
                getattr(config, "original_max_position_embeddings", None),
                getattr(config, "max_position_embeddings", None),
            ]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)
