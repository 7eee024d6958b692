"""The output embedding, whose rows are the classifier: as it is measured, and as it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdean.models.adapters import base_model
from fastdean.models.model_state import materialised_weight, unwrap
from fastdean.models.ranks.distributed import Ranks
from fastdean.models.ranks.sharded import behind
from fastdean.models.ranks.sharded_rows import SharedRows, placing, rows_fault
from fastdean.models.ranks.shards import is_sharded
from fastdean.ops.memory import memory_fault


def output_embedding(model: nn.Module) -> nn.Module:
    """The module whose weight [V, D] turns representations into logits.

    Raises: ValueError if the model has none.
    """
    inner: Any = base_model(unwrap(model))
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if head is None:
        raise ValueError(
            f"model must have an output embedding, got {type(inner).__name__} without one; load it "
            "as a causal or masked language model"
        )
    return head


def measured_weight(model: nn.Module) -> Tensor:
    """Its weight without gradient; an offloaded one is brought to the CPU, a sharded one is not.

    Raises: ValueError for one below an adapter or quantised.
    """
    head = output_embedding(model)
    if hasattr(head, "base_layer"):
        raise ValueError(
            f"model must have a plain output embedding, got the adapter {type(head).__name__}; "
            "merge it first (merge_and_unload)"
        )
    sharded, _ = behind(unwrap(model), head, "weight")
    weight = (materialised_weight(head) if sharded is None else sharded).detach()
    if not weight.is_floating_point():
        raise ValueError(
            f"model must have an output embedding in floating point, got {weight.dtype}; load it "
            "without quantisation of the output embedding"
        )
    return weight


def trained_weight(model: nn.Module) -> Tensor:
    """Its weight, if the gradient of single rows can be put into it; of FSDP2 the sharded one.

    Raises: ValueError unless it is one floating-point tensor [V, D] that lies in memory, whole or
        in blocks on several ranks.
    """
    head = output_embedding(model)
    sharded, _ = behind(unwrap(model), head, "weight")
    weight: Any = getattr(head, "weight", None) if sharded is None else sharded
    if (fault := _fault(weight)) is not None:
        raise ValueError(
            f"model must hold its output embedding as one plain tensor [V, D], got {fault}; the "
            "gradient of single rows cannot be put into it, so train with "
            "DistributedDataParallel, fully_shard (FSDP2) or tensor parallel, in floating point "
            "and without offloading"
        )
    return weight


class TrainedRows:
    """Rows of the weight that `trained_weight` gives, whole on every rank, differentiable.

    Args:
        index: of the rows, ascending and each once.
    """

    def __init__(self, index: Sequence[int]) -> None:
        self._index = index
        self._shared: SharedRows | None = None

    def of(self, model: nn.Module, weight: Tensor, ranks: Ranks) -> Tensor:
        """[P, D], of a sharded weight; all ranks call it, and run the backward pass if one does.

        A rank's loss is that of its own share of the examples. What FSDP2 shards has the gradient
        that FSDP2 would make of those of all ranks; what tensor parallel splits has that of the
        rank's own loss, which is that of its whole team.
        """
        if self._shared is None or self._shared.placed != placing(weight):
            self._shared = SharedRows(weight, self._index)
        sharded, divisor = behind(unwrap(model), output_embedding(model), "weight")
        if sharded is None or (ranks.shares == 1 and divisor is None):
            return self._shared.gathered(weight)

        def joined(grad: Tensor) -> Tensor:
            total = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
            ranks.sum_([total])
            return total.div_((divisor or ranks.shares) * len(ranks.team))

        return self._shared.gathered(weight, joined)


def check_width(features: Tensor, weight: Tensor, place: str) -> None:
    """Raise ValueError unless the representations [..., D], read at `place`, fit weight [K, D]."""
    if features.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"features={place!r} must have the {weight.shape[1]} dimensions of the output "
            f"embedding, got {features.shape[-1]}; use features='head', which enters it"
        )


def _fault(weight: Any) -> str | None:
    sharded = isinstance(weight, Tensor) and is_sharded(weight)
    if not sharded and type(weight) not in (Tensor, nn.Parameter):
        return f"a {type(weight).__name__}"
    if weight.device.type == "meta":
        return "an offloaded one"
    if not weight.is_floating_point():
        return f"a quantised one in {weight.dtype}"
    # FullyShardedDataParallel (FSDP1) leaves a part of a flat one, or nothing.
    if weight.dim() != 2 or weight.numel() == 0:
        return f"a sharded one (here {list(weight.shape)})"
    if sharded:
        return rows_fault(weight)
    fault = memory_fault(weight)
    return None if fault is None else fault.got
