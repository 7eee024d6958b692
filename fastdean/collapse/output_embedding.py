"""The output embedding, whose rows are the classifier: as it is measured, and as it is trained."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastdean.models.adapters import base_model
from fastdean.models.model_state import materialised_weight, unwrap
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
    """Its weight without gradient; an offloaded one is brought to the CPU.

    Raises: ValueError for one below an adapter or quantised.
    """
    head = output_embedding(model)
    if hasattr(head, "base_layer"):
        raise ValueError(
            f"model must have a plain output embedding, got the adapter {type(head).__name__}; "
            "merge it first (merge_and_unload)"
        )
    weight = materialised_weight(head).detach()
    if not weight.is_floating_point():
        raise ValueError(
            f"model must have an output embedding in floating point, got {weight.dtype}; load it "
            "without quantisation of the output embedding"
        )
    return weight


def trained_weight(model: nn.Module) -> Tensor:
    """Its weight, if the gradient of single rows can be put into it.

    Raises: ValueError unless it is one whole floating-point tensor [V, D] that lies in memory.
    """
    weight: Any = getattr(output_embedding(model), "weight", None)
    if (fault := _fault(weight, model)) is not None:
        raise ValueError(
            f"model must hold its output embedding as one plain tensor [V, D], got {fault}; the "
            "gradient of single rows cannot be put into it, so train with "
            "DistributedDataParallel, in floating point and without offloading"
        )
    return weight


def check_width(features: Tensor, weight: Tensor, place: str) -> None:
    """Raise ValueError unless the representations [..., D], read at `place`, fit weight [K, D]."""
    if features.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"features={place!r} must have the {weight.shape[1]} dimensions of the output "
            f"embedding, got {features.shape[-1]}; use features='head', which enters it"
        )


def _fault(weight: Any, model: nn.Module) -> str | None:
    if type(weight) not in (Tensor, nn.Parameter):
        return f"a {type(weight).__name__}"
    if weight.device.type == "meta":
        return "an offloaded one"
    if not weight.is_floating_point():
        return f"a quantised one in {weight.dtype}"
    # During a forward pass the weight of a sharded model looks like any other. By name: importing
    # FSDP takes longer than building a tiny model.
    sharded = any(cls.__name__ == "FSDPModule" for cls in type(model).__mro__)
    if weight.dim() != 2 or weight.numel() == 0 or sharded:
        return f"a sharded one (here {list(weight.shape)})"
    fault = memory_fault(weight)
    return None if fault is None else fault.got
