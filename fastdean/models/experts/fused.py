"""Fused experts: modules that hold the weights of all their experts in stacked tensors.

Found by structure: two parameters of three dimensions, of which one leads from the hidden size to
units and the other back. How they are stored, and how the module is called, is read from the flags
of transformers' experts interface, or from shapes and the signature of `forward`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastdean.models.model_state import config_entry
from fastdean.models.ranks.shards import is_sharded

DOWN = "down_proj"
_UPS = {"gate_up_proj": True, "up_proj": False}
_ROUTED, _DENSE = 3, 1
# What configurations call the number of experts that a token goes to.
_CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k")
# It changes the layout of the weights when it is first called.
_OTHER_LAYOUT = "deepgemm_megamoe"


@dataclass(frozen=True)
class FusedExperts:
    """How a module of fused experts stores its weights and is called.

    Attributes:
        up: name of the first weight, which `down_proj` follows.
        has_gate: the first weight makes a gate and a value for each unit.
        transposed: weights are [E, inputs, outputs], else [E, outputs, inputs].
        routed: called with hidden states [N, H], the chosen experts [N, k] and their weights
            [N, k]; else with one row for each pair of an expert and a token, by expert.
        dispatched: `forward` looks its implementation up in a registry of transformers.
        on_owners: each of several ranks has some of the experts (`expert_parallel.py`).
    """

    up: str
    has_gate: bool
    transposed: bool
    routed: bool
    dispatched: bool
    on_owners: bool = False

    @property
    def weights(self) -> tuple[str, str]:
        return self.up, DOWN


def chosen_experts(config: Any) -> int | None:
    """To how many experts a token goes, as far as the configuration of a text model says it."""
    found = (config_entry(config, name) for name in _CHOSEN)
    return next((number for number in found if isinstance(number, int)), None)


def fused_experts(module: nn.Module) -> FusedExperts | None:
    """How `module` is to be run, or None where it is nothing that this package can run."""
    up = next((name for name in _UPS if _is_stacked(module._parameters.get(name))), None)
    if up is None or not _is_stacked(module._parameters.get(DOWN)):
        return None
    arguments = _arguments(module)
    if arguments not in (_ROUTED, _DENSE):
        return None
    on_owners = getattr(module, "_is_expert_parallel", False)
    if on_owners and not all(is_sharded(module.get_parameter(each)) for each in (up, DOWN)):
        return None
    if getattr(getattr(module, "config", None), "_experts_implementation", None) == _OTHER_LAYOUT:
        return None
    layouts = _layouts(module._parameters[up], module._parameters[DOWN], _UPS[up])
    # A square without a gate may be stored either way; a Linear's is the usual one.
    transposed = getattr(module, "is_transposed", False not in layouts)
    if transposed not in layouts:
        return None
    dispatched = hasattr(type(module).forward, "__wrapped__") and hasattr(module, "has_gate")
    routed = arguments == _ROUTED
    if (dispatched or on_owners) and not routed:
        return None
    # The forward that sends tokens to the owners lies above the one that is looked up.
    return FusedExperts(up, _UPS[up], transposed, routed, dispatched and not on_owners, on_owners)


def _is_stacked(weight: Tensor | None) -> bool:
    return weight is not None and weight.dim() == 3


def _layouts(up: Any, down: Any, has_gate: bool) -> set[bool]:
    """Whether both are stored transposed, as far as their shapes say; empty where they do not fit.

    They lead from the hidden size to units and back.
    """
    parts = 2 if has_gate else 1
    (_, *first), (_, *last) = up.shape, down.shape
    straight = first == [parts * last[1], last[0]]
    transposed = first == [last[1], parts * last[0]]
    return {layout for layout, fits in ((False, straight), (True, transposed)) if fits}


def _arguments(module: nn.Module) -> int:
    """How many arguments `forward` takes."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(parameter.kind in plain for parameter in parameters) - 1
