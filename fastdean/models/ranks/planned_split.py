"""The shapes of what one rank has of a model that its own plans split, before anything is split.

transformers' plans (`tp_plan`, `ep_plan`) name a style for each parameter or module. Of a model on
the meta device every parameter is put in place by one of the block's shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

# The axis of a weight that a style cuts, from the last one. A bias of columns is cut, one of rows
# is not, and of packed matrices each.
_AXES = {
    "colwise": -2,
    "colwise_rep": -2,
    "colwise_gather_output": -2,
    "packed_colwise": -2,
    "rowwise": -1,
    "rowwise_rep": -1,
    "rowwise_split_input": -1,
    "packed_rowwise": -1,
    "embedding_rowwise": -2,
    "embedding_colwise": -1,
    # Whole experts.
    "grouped_gemm": 0,
}
_PACKED = {"packed_colwise": 2, "packed_rowwise": 2}
# What has the rows of one head after those of another.
_HEADS = ("q_proj", "k_proj", "v_proj")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def split_as_planned(model: nn.Module, ranks: int, *, experts: bool) -> dict[str, int]:
    """Put the largest of the ranks' blocks in the place of each parameter that a plan splits.

    Args:
        model: of transformers, on the meta device.
        ranks: that hold one model together.
        experts: whole experts lie on their owners (`ep_plan`); else each is split.
    Returns:
        Name of each parameter that is split -> the axis, from 0.
    Raises:
        ValueError: the model has no such plan, or experts or heads that so many ranks do not share.
    """
    plan = _plan_of(model, "tp_plan", "tensor_parallel")
    if experts:
        owned = _plan_of(model, "ep_plan", "expert_parallel")
        plan = {n: s for n, s in plan.items() if not any(_is_below(n, rule) for rule in owned)}
        plan |= owned
    _require_whole_heads(model, plan, ranks)
    # Weights that are one and the same stay so.
    blocks: dict[int, nn.Parameter] = {}
    cut: dict[str, int] = {}
    for path, module in model.named_modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            name = f"{path}.{leaf}" if path else leaf
            style = _style_of(name, plan)
            axis = _axis_of(parameter, style, leaf)
            if experts and style == "grouped_gemm" and len(parameter) % ranks:
                raise ValueError(
                    f"expert_parallel must divide the number of experts, got {ranks} for the "
                    f"{len(parameter)} of {name}; a rank owns whole ones, as many as the others"
                )
            if id(parameter) not in blocks and axis is not None:
                blocks[id(parameter)] = _block(parameter, axis, ranks, _PACKED.get(style or "", 1))
            if id(parameter) in blocks:
                module._parameters[leaf] = blocks[id(parameter)]
                cut[name] = 0 if axis is None else axis
    return cut


def _require_whole_heads(model: nn.Module, plan: Mapping[str, str], ranks: int) -> None:
    """A rank computes attention with whole heads."""
    for path, attention in model.named_modules():
        width = getattr(attention, "head_dim", None)
        for leaf in _HEADS:
            weight = getattr(getattr(attention, leaf, None), "weight", None)
            name = f"{path}.{leaf}.weight"
            if not width or weight is None or _style_of(name, plan) != "colwise":
                continue
            if len(weight) % (ranks * width):
                raise ValueError(
                    f"tensor_parallel must divide the heads of attention, got {ranks} for the "
                    f"{len(weight) // width} of {name.removesuffix('.weight')}; a rank has whole "
                    "ones"
                )


def _plan_of(model: Any, name: str, option: str) -> Mapping[str, str]:
    plan = getattr(model, name, None) or {}
    if not plan:
        raise ValueError(
            f"{option} must be left out for a model without a {name} of its own, got "
            f"{type(model).__name__}"
        )
    return plan


def _is_below(name: str, rule: str) -> bool:
    return name == rule or name.startswith(f"{rule}.")


def _style_of(name: str, plan: Mapping[str, str]) -> str | None:
    """The rule for a parameter, or that for its module; numbers of layers stand as stars."""
    general = _NUMBER.sub("*", name)
    return plan.get(general, plan.get(general.rpartition(".")[0]))


def _axis_of(parameter: nn.Parameter, style: str | None, leaf: str) -> int | None:
    axis = _AXES.get(style or "")
    if axis is None:
        return None
    if axis == 0:
        return 0
    if parameter.dim() < 2:
        return 0 if axis == -2 else None
    # One bias for each expert lies as its rows do.
    if leaf.endswith("bias"):
        return parameter.dim() - 1 if axis == -2 else None
    return parameter.dim() + axis


def _block(parameter: nn.Parameter, axis: int, ranks: int, packed: int) -> nn.Parameter:
    shape = list(parameter.shape)
    shape[axis] = packed * -(-(shape[axis] // packed) // ranks)
    return nn.Parameter(
        torch.empty(shape, dtype=parameter.dtype, device="meta"),
        requires_grad=parameter.requires_grad,
    )
