"""Which layers are scored: Linear (and Conv1D) modules of the decoder layers, the stacked weights
of their fused experts, or their MLPs' units.

No list of model families: stacks.py finds the decoder layers, blocks.py what each is made of.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastdean.models.adapters import Plain, base_model, plain_modules
from fastdean.models.blocks import ATTENTION, FEED_FORWARD, Grouping, LayerParts, Matrix
from fastdean.models.experts import fused_experts
from fastdean.models.model_state import (
    evaluation_state,
    execution_device,
    materialised_weight,
    text_config,
    weight_of,
)
from fastdean.models.shards import is_sharded
from fastdean.models.stacks import decoder_layers
from fastdean.wording.granularity import checked_granularity
from fastdean.wording.log import logger
from fastdean.wording.mendable import InputTypeError

_BOTH = (FEED_FORWARD, ATTENTION)
_SEED = 7
# A module's name or the end of one; no sign of a regular expression but the point.
_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")
_TOKENS = 2
# Whether a subclass of Linear computes a Linear's product lies in its code, not in its weights.
_TRIED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class Target:
    """One weight that is scored, or whose input units are.

    Attributes:
        name: module name in the model, without what PEFT adds to it, of stacked weights with the
            weight's own name; the score is stored under `parameter`.
        module: the nn.Linear or Conv1D, or the module of fused experts.
        transposed: True when the weight is stored [C, R] (in x out), as Conv1D does, or [E, C, R].
        layer_index: position of the decoder layer it lies in, or None.
        group: "mlp", "self_attn", another group of its layer (`fastdean.models.blocks`), or None
            outside the decoder layers.
        leads_from_units: whether its inputs are an MLP's units.
        adapted: an adapter that is neither merged nor off is on top of it.
        leaf: name of the weight in its module.
        stacked: whether the weight holds a matrix for each of several experts.
        part: of a stacked weight the experts (first, end) that are scored in this pass; None: all.
    """

    name: str
    module: nn.Module
    transposed: bool
    layer_index: int | None
    group: str | None
    leads_from_units: bool = False
    adapted: bool = False
    leaf: str = "weight"
    stacked: bool = False
    part: tuple[int, int] | None = None

    @property
    def parameter(self) -> str:
        return self.parameter_called(self.name)

    @property
    def key(self) -> str:
        """What the sums are kept under: the parameter, with the part of it."""
        return (
            self.parameter
            if self.part is None
            else f"{self.parameter}[{self.part[0]}:{self.part[1]}]"
        )

    @property
    def experts(self) -> slice:
        """The experts of `part`, or all of them."""
        return slice(*(self.part or (0, self.weight.shape[0])))

    @property
    def summed_shape(self) -> tuple[int, ...]:
        """The shape of what is scored: the weight's, or that of a part of its experts."""
        shape = tuple(self.weight.shape)
        return shape if self.part is None else (self.part[1] - self.part[0], *shape[1:])

    def pieces(self, fit: Callable[[Target], bool]) -> Iterator[Target]:
        """The target, or its experts in as few consecutive parts as each `fit` by itself.

        One expert is a part also where it does not fit.
        """
        first, end = self.part or (0, self.weight.shape[0])
        while self.stacked and first < end and not fit(self._part(first, end)):
            unfit = partial(self._is_unfit, first, fit)
            middle = first + max(1, bisect_right(range(1, end - first), False, key=unfit))
            yield self._part(first, middle)
            first = middle
        if not self.stacked or first < end:
            yield self._part(first, end)

    def _is_unfit(self, first: int, fit: Callable[[Target], bool], number: int) -> bool:
        return not fit(self._part(first, first + number))

    def _part(self, first: int, end: int) -> Target:
        whole = not self.stacked or (first, end) == (0, self.weight.shape[0])
        return replace(self, part=None if whole else (first, end))

    def parameter_called(self, name: str) -> str:
        """What the weight would be called were the target called `name`."""
        return f"{name}.weight" if self.leaf == "weight" else name

    def in_place_of(self, name: str, model: nn.Module) -> Target:
        """The same weight of another layer of one kind, by the target's name there."""
        owner = self.parameter_called(name).removesuffix(f".{self.leaf}")
        return replace(self, name=name, module=model.get_submodule(owner))

    @property
    def weight(self) -> Tensor:
        """As it is stored; a meta tensor where it is offloaded."""
        return weight_of(self.module, self.leaf)

    def materialised(self) -> Tensor:
        """The weight; an offloaded one is copied to the CPU (`materialised_weight`)."""
        return materialised_weight(self.module, self.leaf)

    def device(self, default: torch.device) -> torch.device:
        """Where the module computes, also when its weight is offloaded."""
        return execution_device(self.module, default, self.leaf)

    @property
    def num_inputs(self) -> int:
        return self.weight.shape[-2 if self.transposed else -1]

    @property
    def num_outputs(self) -> int:
        return self.weight.shape[-1 if self.transposed else -2]

    @property
    def unit_axis(self) -> int:
        """The axis of the stored weight that counts the layer's inputs."""
        return 0 if self.transposed else 1


def find_targets(
    model: nn.Module,
    target_modules: str | Sequence[str] = "mlp",
    granularity: str = "weight",
    found: Survey | None = None,
) -> list[Target]:
    """The modules to score, in the model's order.

    Args:
        target_modules: "mlp" (feed-forward blocks), "self_attn", "all" (both), the name of another
            group of the layers ("mamba", "conv", "router", ... as `coverage` lists them), a
            regular expression that the whole module name must match, a list of name suffixes, or
            such suffixes and groups in one text, "q_proj,v_proj". The output embedding never
            counts.
        granularity: "weight", or "unit" to keep only each MLP's down projection, whose inputs are
            the MLP's units.
        found: the model's `survey`, where somebody has it already.
    Raises:
        ValueError: nothing matches, a weight is not floating point (quantised), or an adapter is
            on top of one.
        TypeError: `model` is no module.
    """
    found = survey(model) if found is None else found
    granularity = checked_granularity(granularity)
    candidates = found.targets
    groups = {target.group for target in candidates}
    chosen = [target for target in candidates if _matches(target, target_modules, groups)]
    if not chosen and isinstance(target_modules, str):
        chosen = _listed(candidates, target_modules, groups)
    if granularity == "unit":
        chosen = [target for target in chosen if target.leads_from_units]
    if not chosen:
        wanted = "Linear layer" if granularity == "weight" else "down projection of an MLP"
        others = ", ".join(sorted(group for group in groups if group not in (None, *_BOTH)))
        hints = f", in groups of their own {others}" if others else ""
        if granularity == "unit" and any(target.stacked for target in candidates):
            hints += ", and fused experts have scores of weights alone"
        if found.unscorable:
            hints += f", and hooks cannot see the fused tensors {_kinds(found.unscorable)}"
        raise ValueError(
            f"target_modules must match at least one {wanted} of the model, got "
            f"{target_modules!r}; the layers are {_kinds(target.name for target in candidates)}"
            f"{hints}"
        )
    _require_own_weights(candidates, chosen)
    for target in chosen:
        if not _is_floating_point(target.weight):
            raise ValueError(
                f"model must hold floating-point weights, got {target.weight.dtype} in "
                f"{target.parameter}; load it without quantisation"
            )
        if target.adapted:
            raise ValueError(
                f"model must have its adapters merged, got one on {target.name} that is not; merge "
                "it first (PEFT: merge_and_unload(), or merge_adapter() to take it out again), or "
                "score inside model.disable_adapter()"
            )
    return chosen


def _require_own_weights(candidates: Sequence[Target], chosen: Sequence[Target]) -> None:
    """Refuse a weight that two layers use: its gradient is the sum of both, and a hook sees one."""
    # Kept: one that is computed is another tensor each time, and may lie where the last one lay.
    weights = {target.name: target.weight for target in candidates}
    users: dict[int, list[str]] = {}
    for name, weight in weights.items():
        users.setdefault(id(weight), []).append(name)
    for target in chosen:
        others = [name for name in users[id(weights[target.name])] if name != target.name]
        if others:
            raise ValueError(
                f"target_modules must match layers with weights of their own, got {target.name}, "
                f"which shares its weight with {others[0]}; leave both out"
            )


def require_own_parameters(model: nn.Module, targets: Sequence[Target]) -> None:
    """Refuse weights that can be neither differentiated here nor edited later."""
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ValueError(
                f"model must have parameters that autograd can use, got {name}, made under "
                "torch.inference_mode(); load the model outside of it"
            )
    for target in targets:
        if target.module._parameters.get(target.leaf) is None:
            raise ValueError(
                f"{target.parameter} must be a parameter, got a tensor that is computed from "
                "others (a parametrization, weight or spectral norm, pruning); make it permanent, "
                "for example with torch.nn.utils.parametrize.remove_parametrizations"
            )


def coverage(
    model: nn.Module,
    targets: Sequence[Target],
    scored: Collection[str] | None = None,
    found: Survey | None = None,
) -> dict:
    """The share of the model that is scored, and the parameters in its layers that cannot be.

    Args:
        targets: the modules that `find_targets` matched.
        scored: parameter names of those that have a score; None: all of them.
        found: the model's `survey`, where somebody has it already.
    Returns:
        matched: number of matched modules; scored, targets: number of scored ones;
        scored_parameters, model_parameters; share: scored parameters of the model's;
        share_of_matched: scored parameters of the matched ones'; groups: name of each group of the
        decoder layers -> its modules and their parameters, how many of both are scored, and the
        parameters that cannot be; kinds: the same for "linear" modules and fused "experts";
        unscorable: name -> size of what cannot be (matrices that belong to no Linear or Conv1D, or
        to a Linear that computes something else: routers, experts in a form of their own).
    """
    kept = [t for t in targets if scored is None or t.parameter in scored]
    scored_parameters, matched_parameters = _weights_of(kept), _weights_of(targets)
    found = survey(model) if found is None else found
    total = found.parameters
    return {
        "targets": len(kept),
        "matched": len(targets),
        "scored": len(kept),
        "scored_parameters": scored_parameters,
        "model_parameters": total,
        "share": scored_parameters / max(1, total),
        "share_of_matched": scored_parameters / max(1, matched_parameters),
        "groups": _by_group(found, {target.name for target in kept}),
        "kinds": _by_kind(found, {target.name for target in kept}),
        "unscorable": {name: size for name, (_, size) in found.unscorable.items()},
    }


def warn_about_coverage(
    model: nn.Module,
    targets: Sequence[Target],
    target_modules: str | Sequence[str],
    granularity: str = "weight",
    found: Survey | None = None,
) -> None:
    """Warn where much of the model, or most of the groups that were asked for, is not scored.

    Args:
        targets: those that are scored.
        found: the model's `survey`, where somebody has it already.
    """
    covered = coverage(model, targets, found=found)
    missed, total = covered["unscorable"], covered["model_parameters"]
    asked = _groups_asked_for(covered["groups"], target_modules)
    of_asked, missed_of_asked = _missed(covered["groups"], asked)
    if granularity == "unit":
        # Of other matrices the units are scored through the down projection.
        missed_of_asked = covered["kinds"]["experts"]["parameters"] + sum(
            covered["groups"][group]["unscorable"] for group in asked
        )
    if asked and missed_of_asked > 0.5 * of_asked:
        logger.warning(
            "%.0f %% of the parameters of %s are not scored, %d of %d%s",
            100 * missed_of_asked / of_asked,
            " and ".join(asked),
            missed_of_asked,
            of_asked,
            f" (such as {next(iter(missed))})" if missed else "",
        )
    elif sum(missed.values()) > 0.05 * total:
        logger.warning(
            "%.0f %% of the model's parameters lie in its layers outside any Linear module and are "
            "not scored (%d tensors, such as %s)",
            100 * sum(missed.values()) / total,
            len(missed),
            next(iter(missed)),
        )


def _groups_asked_for(
    groups: Mapping[str, Mapping], target_modules: str | Sequence[str]
) -> list[str]:
    """Whole groups; a suffix or a pattern asks for a part of one."""
    if not isinstance(target_modules, str):
        return []
    parts = target_modules.replace(",", " ").split()
    named = {group for part in parts for group in (_BOTH if part == "all" else (part,))}
    return [group for group in groups if group in named]


def _missed(groups: Mapping[str, Mapping[str, int]], asked: Sequence[str]) -> tuple[int, int]:
    """The parameters of these groups, and those of them that are not scored."""
    found = [groups[group] for group in asked]
    total = sum(each["parameters"] + each["unscorable"] for each in found)
    return total, total - sum(each["scored_parameters"] for each in found)


def _by_group(found: Survey, scored: Collection[str]) -> dict[str, dict[str, int]]:
    groups: dict[str, dict[str, int]] = {}

    def add(group: str, **counts: int) -> None:
        empty = ("modules", "parameters", "scored", "scored_parameters", "unscorable")
        of_group = groups.setdefault(group, dict.fromkeys(empty, 0))
        for key, number in counts.items():
            of_group[key] += number

    for target in found.targets:
        if target.group is not None:
            size, is_scored = target.weight.numel(), target.name in scored
            add(target.group, modules=1, parameters=size)
            add(target.group, scored=is_scored, scored_parameters=size * is_scored)
    for group, size in found.unscorable.values():
        add(group, unscorable=size)
    return groups


def _by_kind(found: Survey, scored: Collection[str]) -> dict[str, dict[str, int]]:
    """Parameters in the decoder layers of Linear modules and of fused experts."""
    kinds = {kind: {"parameters": 0, "scored_parameters": 0} for kind in ("linear", "experts")}
    for target in found.targets:
        if target.group is not None:
            of_kind, size = kinds["experts" if target.stacked else "linear"], target.weight.numel()
            of_kind["parameters"] += size
            of_kind["scored_parameters"] += size * (target.name in scored)
    return kinds


def _weights_of(targets: Sequence[Target]) -> int:
    """How many weights the targets have; one that several share counts once."""
    return sum({id(t.weight): t.weight.numel() for t in targets}.values())


def _kinds(names: Iterable[str]) -> str:
    """Names with their numbers left out, each kind once, for messages."""
    kinds = sorted({re.sub(r"\d+", "*", name) for name in names})
    return ", ".join(kinds[:12]) or "none"


@dataclass(frozen=True)
class Survey:
    """What a model is made of, looked up once for all that a `score()` asks of it.

    Attributes:
        targets: every module that can be scored, in the model's order.
        unscorable: parameter name -> its group and size.
        layers: the `decoder_layers`.
        parameters: how many numbers the model's parameters hold, without those of adapters.
    """

    targets: list[Target]
    unscorable: dict[str, tuple[str, int]]
    layers: dict[str, nn.Module]
    parameters: int


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
    hidden_size = getattr(text_config(base_model(model)), "hidden_size", None)
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
    parameters = (p for plain in plains for p in plain.module.parameters(recurse=False))
    total = sum({id(parameter): parameter.numel() for parameter in parameters}.values())
    return Survey(targets, unscorable, layers, total)


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
    return not _is_floating_point(weight_of(module)) or _is_linear_map(module)


def _is_floating_point(weight: Tensor) -> bool:
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


def _listed(
    candidates: Sequence[Target], text: str, groups: Collection[str | None]
) -> list[Target]:
    """The targets that a text names as a list; none if it is no list.

    Raises:
        ValueError: a part of the list that nothing is called.
    """
    parts = text.replace(",", " ").split()
    if not all(_NAME.fullmatch(part) for part in parts):
        return []
    by_part = {
        part: [
            target
            for target in candidates
            if _matches(target, part if part in {"all", *_BOTH, *groups} else [part], groups)
        ]
        for part in parts
    }
    unknown = [part for part, found in by_part.items() if not found]
    if unknown and len(unknown) < len(by_part):
        raise ValueError(
            f"target_modules must match a Linear layer with each of its parts, got {unknown[0]!r} "
            f"in {text!r}; the layers are {_kinds(target.name for target in candidates)}"
        )
    chosen = {target.name for found in by_part.values() for target in found}
    return [target for target in candidates if target.name in chosen]


def _matches(
    target: Target, target_modules: str | Sequence[str], groups: Collection[str | None]
) -> bool:
    if isinstance(target_modules, str):
        if target_modules == "all":
            return target.group in _BOTH
        if target_modules in _BOTH or target_modules in groups:
            return target.group == target_modules
        try:
            return re.fullmatch(target_modules, target.name) is not None
        except re.error as error:
            raise ValueError(
                "target_modules must be 'mlp', 'self_attn', 'all', a list of suffixes or a valid "
                f"regular expression, got {target_modules!r} ({error}); escape special characters"
            ) from None
    return any(target.name == s or target.name.endswith(f".{s}") for s in target_modules)
