"""A tiny model that torch splits over a mesh of ranks, as its users do it."""

from __future__ import annotations


def by_torch(model, mesh, parts=("self_attn", "mlp"), head=None):
    """The head gathers its output unless it is placed otherwise."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    gathering = ColwiseParallel(output_layouts=head or Replicate())
    parallelize_module(model.lm_head, mesh, gathering)
    return layers_by_torch(model, mesh, parts)


def layers_by_torch(model, mesh, parts=("self_attn", "mlp")):
    """Embedding and head are whole on every rank."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    for layer in model.model.layers:
        plan = {
            **{f"self_attn.{n}_proj": ColwiseParallel() for n in "qkv"},
            "self_attn.o_proj": RowwiseParallel(),
            "mlp.gate_proj": ColwiseParallel(),
            "mlp.up_proj": ColwiseParallel(),
            "mlp.down_proj": RowwiseParallel(),
        }
        plan = {name: style for name, style in plan.items() if name.startswith(tuple(parts))}
        parallelize_module(layer, mesh, plan)
    return model
