"""What of a model can be scored, and what its decoder layers are made of.

No list of model families: stacks.py finds the decoder layers, blocks.py what each is made of.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastdean.coupling.targets.target import Target, joined_name
from fastdean.models.adapters import Plain, base_model, plain_modules
from fastdean.models.experts.fused import fused_experts
from fastdean.models.layers.blocks import Grouping, LayerParts, Matrix
from fastdean.models.layers.stacks import decoder_layers
from fastdean.models.model_state import config_entry, evaluation_state, text_config, weight_of
from fastdean.models.ranks.shards import is_sharded
from fastdean.wording.mendable import InputTypeError

_SEED = 7
_TOKENS = 2
# Whether a subclass of Linear computes a Linear's product lies in its code, not in its weights.
_TRIED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class Survey:
    """What a model is made of, looked up once for all that a `score()` asks of it.

    Attributes:
        targets: every module that can be scored through hooks, in the model's order.
        others: every parameter that is none of their weights, in the model's order.
        shared: weights of `targets` that have several names, as parameters, scored by example.
        unscorable: name of a matrix in the layers that no hook can see -> its group and size.
        quantised: name of a weight that is packed, in a module that nobody here can run -> its
            group and dtype.
        layers: the `decoder_layers`.
        parameters: how many numbers the model's parameters hold, without those of adapters.
    """

    targets: list[Target]
    others: list[Target]
    shared: list[Target]
    unscorable: dict[str, tuple[str, int]]
    layers: dict[str, nn.Module]
    parameters: int
    quantised: dict[str, tuple[str, torch.dtype]] = field(default_factory=dict)

    @property
    def everything(self) -> list[Target]:
        return [*self.targets, *self.shared, *self.others]


def survey(model: nn.Module) -> Survey:
    """Look through a model for its decoder layers and for what can be scored.

    Raises:
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}; load it first, for "
            "example with transformers.AutoModelForCausalLM.from_pretrained"
        )
    head = getattr(model, "get_output_embeddings", lambda: None)()
    plains = list(plain_modules(model))
    excluded = set() if head is None else set(head.modules())
    # It takes the weight and never calls the module.
    excluded |= {p.module.out_proj for p in plains if isinstance(p.module, nn.MultiheadAttention)}
    scorable = {p.module for p in plains if p.module not in excluded and _is_scorable(p.module)}
    layers = decoder_layers(model)
    inside: dict[str, list[Plain]] = {name: [] for name in layers}
    owners = {plain.name: _owner(plain.name, layers) for plain in plains}
    for plain in plains:
        owner = owners[plain.name]
        if owner is not None:
            inside[owner].append(plain)
    hidden_size = config_entry(text_config(base_model(model)), "hidden_size")
    groupings = {
        owner: _grouping(owner, layers[owner], members, scorable, hidden_size)
        for owner, members in inside.items()
    }
    indices: dict[str | None, int] = {name: i for i, name in enumerate(layers)}
    targets = []
    for plain in plains:
        layout = fused_experts(plain.module)
        if plain.module not in scorable and layout is None:
            continue
        owner, group, is_down = owners[plain.name], None, False
        if owner is not None:
            path = _path_in(owner, plain)
            group, is_down = groupings[owner].groups[path], path in groupings[owner].downs
        if layout is not None:
            targets += [
                Target(
                    name=f"{plain.name}.{leaf}",
                    module=plain.module,
                    transposed=layout.transposed,
                    layer_index=indices.get(owner),
                    group=group,
                    adapted=plain.adapted,
                    leaf=leaf,
                    stacked=True,
                )
                for leaf in layout.weights
            ]
            continue
        targets.append(
            Target(
                name=plain.name,
                module=plain.module,
                transposed=not isinstance(plain.module, nn.Linear),
                layer_index=indices.get(owner),
                group=group,
                leads_from_units=is_down,
                adapted=plain.adapted,
            )
        )
    weights = {id(target.weight) for target in targets}
    unscorable = {
        f"{plain.name}.{name}": (groupings[owner].groups[_path_in(owner, plain)], parameter.numel())
        for owner, members in inside.items()
        for plain in members
        for name, parameter in plain.module.named_parameters(recurse=False)
        if parameter.dim() >= 2 and id(parameter) not in weights
    }
    quantised = {
        f"{plain.name}.{name}": (groupings[owner].groups[path], tensor.dtype)
        for owner, members in inside.items()
        for plain in members
        for name, tensor in _packed(plain.module, weights)
        if (path := _path_in(owner, plain)) in groupings[owner].groups
    }
    parameters = (p for plain in plains for p in plain.module.parameters(recurse=False))
    total = sum({id(parameter): parameter.numel() for parameter in parameters}.values())
    names = _names_of_parameters(model)
    others: list[Target] = []
    shared: list[Target] = []
    seen: set[int] = set()
    for plain in plains:
        owner = owners[plain.name]
        for leaf, parameter in plain.module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            called = names[id(parameter)]
            if id(parameter) in weights and len(called) == 1:
                continue
            target = Target(
                name=plain.name if leaf == "weight" else joined_name(plain.name, leaf),
                module=plain.module,
                transposed=False,
                layer_index=indices.get(owner),
                group=None if owner is None else groupings[owner].groups[_path_in(owner, plain)],
                adapted=plain.adapted,
                leaf=leaf,
                by_example=True,
            )
            target = replace(
                target, aliases=tuple(name for name in called if name != target.parameter)
            )
            (shared if id(parameter) in weights else others).append(target)
    return Survey(targets, others, shared, unscorable, layers, total, quantised)


def _packed(module: nn.Module, weights: Collection[int]) -> Iterator[tuple[str, Tensor]]:
    """The quantised weights of a module, which may be buffers; not those of a target."""
    for name, tensor in module.named_parameters(recurse=False):
        if tensor.dim() >= 2 and id(tensor) not in weights and not is_floating_point(tensor):
            yield name, tensor
    for name, buffer in module.named_buffers(recurse=False):
        # Masks and positions are buffers of integers too.
        if buffer.dim() >= 2 and "weight" in name and not is_floating_point(buffer):
            yield name, buffer


def _names_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """By id of a parameter all of its names, as the model without adapters has them."""
    names: dict[int, list[str]] = {}
    offloaded: dict[str, int] = {}
    for plain in plain_modules(model, remove_duplicate=False):
        for leaf, parameter in plain.module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(joined_name(plain.name, leaf))
                if parameter.is_meta:
                    offloaded[joined_name(plain.name, leaf)] = id(parameter)
    # Tied weights that are offloaded are a tensor each.
    tied = getattr(base_model(model), "all_tied_weights_keys", None) or {}
    for one, other in dict(tied).items():
        ids = {offloaded[name] for name in (one, other) if name in offloaded}
        together = sorted({name for each in ids for name in names[each]})
        names |= dict.fromkeys(ids, together)
    return names


def _grouping(
    owner: str,
    layer: nn.Module,
    members: Sequence[Plain],
    scorable: Collection[nn.Module],
    hidden_size: int | None,
) -> Grouping:
    modules = {_path_in(owner, plain): plain.module for plain in members}
    matrices = {}
    for path, module in modules.items():
        if module in scorable:
            rows, columns = weight_of(module).shape
            sizes = (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)
            matrices[path] = Matrix(*sizes)
    return LayerParts(layer, owner, matrices, modules, hidden_size).grouping()


def _path_in(owner: str, plain: Plain) -> str:
    return plain.name[len(owner) + 1 :]


def _owner(name: str, layers: Collection[str]) -> str | None:
    """The layer that a module is or lies in."""
    parts = name.split(".")
    prefixes = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return next((prefix for prefix in prefixes if prefix in layers), None)


def _is_scorable(module: nn.Module) -> bool:
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return weight_of(module).dim() == 2
    if not isinstance(module, nn.Linear) or module.weight.dim() != 2:
        return False
    # Quantised ones are refused by name where they are asked for.
    return not is_floating_point(weight_of(module)) or _is_linear_map(module)


def is_floating_point(weight: Tensor) -> bool:
    return weight.dtype.is_floating_point and weight.dtype.itemsize > 1


def _is_linear_map(module: nn.Linear) -> bool:
    """Whether a Linear returns one tensor of its outputs; a subclass is tried once.

    Whether that tensor has the gradient of a product is for the trial to say (trial.py): a layer
    that rounds its weight straight through does, one that scales it does not.
    """
    # Of a sharded one there is nothing to try before its layer's window opens.
    if type(module).forward is nn.Linear.forward or is_sharded(module.weight):
        return True
    if module not in _TRIED:
        outputs, inputs = module.weight.shape
        generator = torch.Generator("cpu").manual_seed(_SEED)
        x = torch.randn((1, _TOKENS, inputs), generator=generator, device="cpu")
        try:
            with torch.no_grad(), evaluation_state(module):
                # Past the instance's own forward: an offloading hook would load the weight.
                output = type(module).forward(module, x.to(module.weight))
        except Exception:
            output = None
        _TRIED[module] = isinstance(output, Tensor) and output.shape == (1, _TOKENS, outputs)
    return _TRIED[module]
