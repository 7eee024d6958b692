"""Which layers are scored: Linear (and Conv1D) modules of the decoder layers, or their MLPs' units.

No list of model families: a decoder layer is an element of the longest ModuleList of the base
model, and what lies under a submodule named or typed as attention is attention.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """One module whose weight, or whose input units, are scored.

    Attributes:
        name: module name in the model; the score is stored under `parameter`.
        module: the nn.Linear or Conv1D.
        transposed: True when the weight is stored [C, R] (in x out), as Conv1D does.
        layer: the decoder layer it lies in, or None.
        layer_index: position of that layer, or None.
        group: "mlp", "self_attn", or None outside the decoder layers.
    """

    name: str
    module: nn.Module
    transposed: bool
    layer: nn.Module | None
    layer_index: int | None
    group: str | None

    @property
    def parameter(self) -> str:
        return f"{self.name}.weight"

    @property
    def num_inputs(self) -> int:
        return self.module.weight.shape[0 if self.transposed else 1]

    @property
    def num_outputs(self) -> int:
        return self.module.weight.shape[1 if self.transposed else 0]

    @property
    def unit_axis(self) -> int:
        """The axis of the stored weight that counts the layer's inputs."""
        return 0 if self.transposed else 1


def find_targets(
    model: nn.Module, target_modules: str | Sequence[str] = "mlp", granularity: str = "weight"
) -> list[Target]:
    """The modules to score, in the model's order.

    Args:
        target_modules: "mlp", "self_attn", "all" (both), a regular expression that the whole module
            name must match, or a list of name suffixes. The output embedding never counts.
        granularity: "weight", or "neuron" to keep only each MLP's down projection, whose inputs are
            the MLP's units.
    Raises:
        ValueError: nothing matches, or a weight is not floating point (quantised).
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}; load it first, for "
            "example with transformers.AutoModelForCausalLM.from_pretrained"
        )
    if granularity not in ("weight", "neuron"):
        raise ValueError(f"granularity must be 'weight' or 'neuron', got {granularity!r}")
    candidates = _scorable(model)
    chosen = [target for target in candidates if _matches(target, target_modules)]
    if granularity == "neuron":
        chosen = _down_projections(model, candidates, chosen)
    if not chosen:
        wanted = "Linear layer" if granularity == "weight" else "down projection of an MLP"
        raise ValueError(
            f"target_modules must match at least one {wanted} of the model, got "
            f"{target_modules!r}; the layers are {_kinds(target.name for target in candidates)}"
            f"{_fused_hint(model)}"
        )
    _require_own_weights(candidates, chosen)
    for target in chosen:
        if not target.module.weight.dtype.is_floating_point:
            raise ValueError(
                f"model must hold floating-point weights, got {target.module.weight.dtype} in "
                f"{target.parameter}; load it without quantisation"
            )
    return chosen


def _require_own_weights(candidates: Sequence[Target], chosen: Sequence[Target]) -> None:
    """A weight that two layers use has the sum of their gradients, which no hook on one sees."""
    users: dict[int, list[str]] = {}
    for target in candidates:
        users.setdefault(id(target.module.weight), []).append(target.name)
    for target in chosen:
        others = [name for name in users[id(target.module.weight)] if name != target.name]
        if others:
            raise ValueError(
                f"target_modules must match layers with weights of their own, got {target.name}, "
                f"which shares its weight with {others[0]}; leave both out"
            )


def coverage(
    model: nn.Module, targets: Sequence[Target], scored: Collection[str] | None = None
) -> dict:
    """What share of the model the scored weights are, and what in its layers no hook can see.

    Args:
        targets: the modules that `find_targets` matched.
        scored: parameter names of those that have a score; None: all of them.
    Returns:
        matched: number of matched modules; scored, targets: number of scored ones;
        scored_parameters, model_parameters; share: scored parameters of the model's;
        share_of_matched: scored parameters of the matched ones'; unscorable: name -> size of the
        matrices inside the decoder layers that belong to no Linear or Conv1D (fused experts,
        routers).
    """
    kept = [t for t in targets if scored is None or t.parameter in scored]
    scored_parameters, matched_parameters = _weights_of(kept), _weights_of(targets)
    total = sum({id(p): p.numel() for p in model.parameters()}.values())
    return {
        "targets": len(kept),
        "matched": len(targets),
        "scored": len(kept),
        "scored_parameters": scored_parameters,
        "model_parameters": total,
        "share": scored_parameters / max(1, total),
        "share_of_matched": scored_parameters / max(1, matched_parameters),
        "unscorable": _unscorable(model),
    }


def _weights_of(targets: Sequence[Target]) -> int:
    """How many weights the targets have; one that several share counts once."""
    return sum({id(t.module.weight): t.module.weight.numel() for t in targets}.values())


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> decoder layer: the elements of the longest ModuleList that lies in no other one."""
    base = getattr(model, "base_model", model)
    names = {module: name for name, module in model.named_modules()}
    lists: list[nn.ModuleList] = []
    nested: set[nn.Module] = set()
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and module not in nested:
            lists.append(module)
            nested.update(inner for inner in module.modules() if inner is not module)
    if not lists:
        return {}
    longest = max(lists, key=len)
    return {names[layer]: layer for layer in longest}


def _unscorable(model: nn.Module) -> dict[str, int]:
    scorable = {id(target.module.weight) for target in _scorable(model)}
    return {
        f"{prefix}.{name}": parameter.numel()
        for prefix, layer in decoder_layers(model).items()
        for name, parameter in layer.named_parameters()
        if parameter.dim() >= 2 and id(parameter) not in scorable
    }


def _kinds(names: Iterable[str]) -> str:
    """Names with their numbers left out, each kind once, for messages."""
    kinds = sorted({re.sub(r"\d+", "*", name) for name in names})
    return ", ".join(kinds[:12]) or "none"


def _fused_hint(model: nn.Module) -> str:
    fused = _unscorable(model)
    return f", and hooks cannot see the fused tensors {_kinds(fused)}" if fused else ""


def _is_scorable(module: nn.Module) -> bool:
    conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    return (isinstance(module, nn.Linear) or conv1d) and module.weight.dim() == 2


def _scorable(model: nn.Module) -> list[Target]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    layers = decoder_layers(model)
    indices = {name: i for i, name in enumerate(layers)}
    targets = []
    for name, module in model.named_modules():
        if module is head or not _is_scorable(module):
            continue
        owner = next((prefix for prefix in layers if name.startswith(f"{prefix}.")), None)
        group = None
        if owner is not None:
            inside = _under_attention(layers[owner], name[len(owner) + 1 :])
            group = "self_attn" if inside else "mlp"
        targets.append(
            Target(
                name=name,
                module=module,
                transposed=not isinstance(module, nn.Linear),
                layer=layers.get(owner),
                layer_index=indices.get(owner),
                group=group,
            )
        )
    return targets


def _under_attention(layer: nn.Module, path: str) -> bool:
    module = layer
    for part in path.split(".")[:-1]:
        module = getattr(module, part)
        if _ATTENTION.search(part) or _ATTENTION.search(type(module).__name__):
            return True
    return False


def _matches(target: Target, target_modules: str | Sequence[str]) -> bool:
    if isinstance(target_modules, str):
        if target_modules == "all":
            return target.group is not None
        if target_modules in ("mlp", "self_attn"):
            return target.group == target_modules
        try:
            return re.fullmatch(target_modules, target.name) is not None
        except re.error as error:
            raise ValueError(
                "target_modules must be 'mlp', 'self_attn', 'all', a list of suffixes or a valid "
                f"regular expression, got {target_modules!r} ({error}); escape special characters"
            ) from None
    return any(target.name == s or target.name.endswith(f".{s}") for s in target_modules)


def _down_projections(
    model: nn.Module, candidates: Sequence[Target], chosen: Sequence[Target]
) -> list[Target]:
    """Of `chosen`, the MLP layers that lead from the units back to the hidden size.

    A layer's inputs are units when another MLP layer beside it produces that many outputs, once, or
    twice as many when gate and up are fused. Where units are as many as hidden dimensions, shapes
    say nothing, and the last MLP layer of its decoder layer is taken.
    """
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden = getattr(text, "hidden_size", None)
    produced: dict[int | None, set[int]] = {}
    last: dict[int | None, str] = {}
    for target in candidates:
        if target.group == "mlp":
            last[target.layer_index] = target.name
            if target.num_inputs == hidden:
                produced.setdefault(target.layer_index, set()).add(target.num_outputs)
    return [
        target
        for target in chosen
        if target.group == "mlp"
        and target.num_outputs == hidden
        and {target.num_inputs, 2 * target.num_inputs} & produced.get(target.layer_index, set())
        and (target.num_inputs != hidden or target.name == last[target.layer_index])
    ]
