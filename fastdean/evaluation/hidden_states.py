"""Hidden states of every layer, and how dependent two sets of them are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdean.data.batching import Batch
from fastdean.data.examples import IGNORE_INDEX, Example
from fastdean.default_device import cpu_by_default
from fastdean.evaluation.dependence import HSICResult, hsic
from fastdean.evaluation.passes import rows_of_examples
from fastdean.models.adapters import require_no_prompts
from fastdean.models.calling import call
from fastdean.models.forward import prepare_batches
from fastdean.models.model_state import input_device, unwrap


def prompts_only(examples: Sequence[Example]) -> list[Example]:
    """The examples cut before their first target, so that the last token is the prompt's.

    The result has no targets: it is for `last_token_states`, not for losses.

    Raises:
        ValueError: an example starts with a target.
    """
    prompts = []
    for number, example in enumerate(examples):
        is_target = example.labels != IGNORE_INDEX
        length = int(is_target.int().argmax()) if is_target.any() else len(example)
        if length == 0:
            raise ValueError(
                f"example {number} must have prompt tokens before its first target, got none; "
                "leave it out"
            )
        prompts.append(example.first(length))
    return prompts


@cpu_by_default
@torch.no_grad()
def last_token_states(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    layers: Sequence[int] | None = None,
    tokens_per_batch: int | None = None,
    progress: bool = True,
) -> Tensor:
    """Hidden state of each layer's output at the last token of each example.

    Equivalent, for one example:

        states = model.base_model(input_ids[None], output_hidden_states=True).hidden_states[1:]
        torch.stack([state[0, -1] for state in states])

    As in transformers, the last layer's states are those after the model's final norm, where it has
    one.

    Args:
        model: a causal or masked language model; evaluated without dropout and left in its mode.
        examples: labels are not looked at. See `prompts_only` for the last token of the prompt.
        layers: which layers and in which order, 0-based, negative from the end; default all.
        tokens_per_batch: a bound for memory (the states of all layers of a batch are alive at
            once); the result does not depend on it.

    Returns:
        float32 [L, n, D] on the CPU, in the order of `layers` and `examples`.

    Raises:
        ValueError: no examples, an example without tokens, a layer out of range, or a model that
            returns no hidden states.
    """
    if not examples:
        raise ValueError("examples must hold at least one example, got none; check their source")
    model = unwrap(model)
    require_no_prompts(model)
    device = input_device(model)
    batches = prepare_batches(
        model,
        # Only the segments are used: prompts have no targets.
        [example.predicting_itself() for example in examples],
        tokens_per_batch=tokens_per_batch,
        shift=0,
    )

    def states_of(batch: Batch) -> Tensor:
        outputs = _pick_layers(layer_outputs(model, batch.to(device).model_inputs()), layers)
        last = batch.segments[:, 1] - 1
        return torch.stack([_rows(output, last) for output in outputs])

    return rows_of_examples(model, batches, states_of, "hidden states", progress, dim=1)


def layer_dependence(states_x: Tensor, states_y: Tensor, **options: Any) -> list[HSICResult]:
    """HSIC of two sets of states, layer by layer.

    HSIC measures the dependence of *paired* rows. Fairness and privacy prompts are unrelated, so
    that pairing the i-th of one with the i-th of the other is arbitrary, and so is the part of the
    value that hangs on it. Ask for `permutations=`: their null shows what other arbitrary pairings
    give, and a value inside it says nothing about dependence. Two models measured on one pairing
    compare better than a value by itself, though a change also follows from a mere change of scale
    or spread.

    Args:
        states_x: [L, n, D1], as from `last_token_states`.
        states_y: [L, n, D2], row i paired with row i of `states_x`.
        options: passed on to `fastdean.evaluation.dependence.hsic`.

    Raises:
        ValueError: other shapes, and whatever `hsic` raises.
    """
    for name, states in (("states_x", states_x), ("states_y", states_y)):
        if states.ndim != 3:
            raise ValueError(
                f"{name} must be of shape [L, n, D], got {list(states.shape)}; see "
                "last_token_states"
            )
    if len(states_x) != len(states_y):
        raise ValueError(
            f"states_y must be of as many layers as states_x ({len(states_x)}), got "
            f"{len(states_y)}; take both from the same layers"
        )
    return [hsic(x, y, **options) for x, y in zip(states_x, states_y, strict=True)]


def layer_outputs(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The output of each layer, [B, T, D]; the last one's after the final norm, where there is one.

    Raises:
        ValueError: the model returns no hidden states.
    """
    base: Any = model.base_model
    outputs = call(base, inputs, output_hidden_states=True)
    hidden_states = getattr(outputs, "hidden_states", None)
    if not hidden_states:
        raise ValueError(
            f"model must return hidden states when asked to, got none from "
            f"{type(base).__name__}; use a transformers language model"
        )
    return hidden_states[1:]


def _pick_layers(hidden_states: tuple[Tensor, ...], layers: Sequence[int] | None) -> list[Tensor]:
    if layers is None:
        return list(hidden_states)
    count = len(hidden_states)
    outside = [layer for layer in layers if not -count <= layer < count]
    if outside or not layers:
        raise ValueError(
            f"layers must be one or more of {-count}..{count - 1}, got {list(layers)}; the model "
            f"has {count} layers"
        )
    return [hidden_states[layer] for layer in layers]


def _rows(state: Tensor, rows: Tensor) -> Tensor:
    """Rows of a batch's flattened [B * T, D] states, float32 on the CPU."""
    return state.flatten(0, 1).index_select(0, rows.to(state.device)).float().cpu()
