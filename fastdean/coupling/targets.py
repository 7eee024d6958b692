"""Which weights are scored: Linear (and Conv1D) modules of the decoder layers, the stacked weights
of their fused experts, their MLPs' units, and on request any other parameter.

No list of model families: stacks.py finds the decoder layers, blocks.py what each is made of.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastdean.models.adapters import Plain, base_model, plain_modules
from fastdean.models.blocks import ATTENTION, FEED_FORWARD, Grouping, LayerParts, Matrix
from fastdean.models.experts import fused_experts
from fastdean.models.model_state import (
    config_entry,
    evaluation_state,
    execution_device,
    materialised_weight,
    text_config,
    weight_of,
)
from fastdean.models.shards import OwnBlock, is_sharded
from fastdean.models.stacks import decoder_layers
from fastdean.wording.granularity import checked_granularity
from fastdean.wording.log import logger
from fastdean.wording.mendable import InputTypeError

_BOTH = (FEED_FORWARD, ATTENTION)
# In place of a group's name: all parameters, also those that cost a backward pass per example.
EVERY = "every"
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
        by_example: scored from its gradient, one backward pass for each example (`by_example.py`);
            the weight may have any shape.
        aliases: the other names of a weight that several modules share, or one module with several
            names.
        block: what this rank has of a weight of a model that tensor parallel splits; None of
            another model.
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
    by_example: bool = False
    aliases: tuple[str, ...] = ()
    block: OwnBlock | None = None

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
        return slice(*(self.part or (0, self.shape[0])))

    @property
    def shape(self) -> torch.Size:
        """Of the weight, or of what this rank has of it."""
        return self.weight.shape if self.block is None else self.block.tensor.shape

    @property
    def weightless(self) -> int:
        """Of a stacked weight, how many of its last experts lack another and hand tokens on."""
        layout = fused_experts(self.module) if self.stacked else None
        if layout is None:
            return 0
        fewest = min(len(weight_of(self.module, leaf)) for leaf in layout.weights)
        return len(self.weight) - fewest

    @property
    def summed_shape(self) -> tuple[int, ...]:
        """The shape of what is scored: the weight's, or that of a part of its experts."""
        shape = tuple(self.shape)
        return shape if self.part is None else (self.part[1] - self.part[0], *shape[1:])

    def pieces(self, fit: Callable[[Target], bool]) -> Iterator[Target]:
        """The target, or its experts in as few consecutive parts as each `fit` by itself.

        One expert is a part also where it does not fit.
        """
        # Experts that lie on several ranks are as many parts of a pass on each.
        if not self.stacked or (self.block is not None and self.block.along[0] is not None):
            yield self
            return
        first, end = self.part or (0, self.shape[0])
        while first < end and not fit(self._part(first, end)):
            unfit = partial(self._is_unfit, first, fit)
            middle = first + max(1, bisect_right(range(1, end - first), False, key=unfit))
            yield self._part(first, middle)
            first = middle
        if first < end:
            yield self._part(first, end)

    def _is_unfit(self, first: int, fit: Callable[[Target], bool], number: int) -> bool:
        return not fit(self._part(first, first + number))

    def _part(self, first: int, end: int) -> Target:
        whole = (first, end) == (0, self.shape[0])
        return replace(self, part=None if whole else (first, end))

    def parameter_called(self, name: str) -> str:
        """What the weight would be called were the target called `name`."""
        return _joined(name, "weight") if self.leaf == "weight" else name

    def is_called(self, ending: str) -> bool:
        """Whether its parameter has this name, or one that ends with it, at a point."""
        return any(_ends_with(name, ending) for name in (self.parameter, *self.aliases))

    def in_place_of(self, name: str, model: nn.Module) -> Target:
        """The same weight of another layer of one kind, by the target's name there."""
        owner = self.parameter_called(name).removesuffix(f".{self.leaf}")
        return replace(self, name=name, module=model.get_submodule(owner))

    def unhooked(self) -> Target:
        """The same weight, scored by example; of stacked ones as one tensor."""
        return replace(self, by_example=True, stacked=False, transposed=False)

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
        return self.shape[self.input_axis]

    @property
    def num_outputs(self) -> int:
        return self.shape[self.output_axis]

    @property
    def input_axis(self) -> int:
        return -2 if self.transposed else -1

    @property
    def output_axis(self) -> int:
        return -1 if self.transposed else -2

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
            such suffixes and groups in one text, "q_proj,v_proj". Of these the output embedding
            never counts. What no module is called is looked for among the parameters, with their
            leaf: "input_layernorm.weight", "router.weight", "A_log", "lm_head.weight". "every" is
            every parameter of the model. Parameters that no hook scores have `by_example`.
        granularity: "weight", or "unit" to keep only each MLP's down projection, whose inputs are
            the MLP's units.
        found: the model's `survey`, where somebody has it already.
    Raises:
        ValueError: nothing matches, a weight is not floating point (quantised), an adapter is on
            top of one, or parameters are named that have no units.
        TypeError: `model` is no module.
    """
    found = survey(model) if found is None else found
    granularity = checked_granularity(granularity)
    candidates = found.targets
    groups = {target.group for target in candidates}
    _require_no_quantised(found, target_modules)
    chosen = _chosen(found, target_modules, groups)
    if granularity == "unit":
        _require_units(chosen, target_modules)
        chosen = [target for target in chosen if target.leads_from_units]
    if not chosen:
        wanted = "Linear layer" if granularity == "weight" else "down projection of an MLP"
        others = ", ".join(sorted(group for group in groups if group not in (None, *_BOTH)))
        hints = f", in groups of their own {others}" if others else ""
        if granularity == "unit" and any(target.stacked for target in candidates):
            hints += ", and fused experts have scores of weights alone"
        if found.unscorable:
            hints += f", and hooks cannot see the fused tensors {_kinds(found.unscorable)}"
        if granularity == "weight" and found.others:
            others = _kinds(target.parameter for target in found.others)
            hints += f"; parameters that are scored by their names are {others}"
        buffer = _buffer_called(model, target_modules)
        if buffer:
            hints += f"; {buffer} is a buffer, which nothing trains"
        raise ValueError(
            f"target_modules must match at least one {wanted} of the model, got "
            f"{target_modules!r}; the layers are {_kinds(target.name for target in candidates)}"
            f"{hints}"
        )
    _require_own_weights(candidates, chosen)
    for target in chosen:
        weight = target.weight
        if not _is_floating_point(weight):
            raise ValueError(
                f"model must hold floating-point weights of 16 bits or more, got "
                f"{weight.dtype} in {target.parameter}; load it without quantisation"
            )
        if target.by_example and type(weight.data) is not Tensor:
            raise ValueError(
                f"model must hold plain tensors where their own gradient is taken, got "
                f"{type(weight.data).__name__} in {target.parameter}; load it without "
                "quantisation, unsharded"
            )
        if target.adapted:
            raise ValueError(
                f"model must have its adapters merged, got one on {target.name} that is not; merge "
                "it first (PEFT: merge_and_unload(), or merge_adapter() to take it out again), or "
                "score inside model.disable_adapter()"
            )
    return chosen


def _require_no_quantised(found: Survey, target_modules: str | Sequence[str]) -> None:
    """Refuse a group whose weights are packed in a form of their own: the rest is not the group."""
    groups = {group for group, _ in found.quantised.values()}
    asked = _groups_asked_for(dict.fromkeys(groups, {}), target_modules)
    for name, (group, dtype) in found.quantised.items():
        if group in asked:
            raise ValueError(
                f"model must hold floating-point weights of 16 bits or more, got {dtype} in "
                f"{name}; load it without quantisation, or choose other target_modules than "
                f"{target_modules!r}"
            )


def _chosen(
    found: Survey, target_modules: str | Sequence[str], groups: Collection[str | None]
) -> list[Target]:
    """What is asked for, modules first; parameters where no module has such a name."""
    if not isinstance(target_modules, str):
        return _with_endings(found, target_modules)
    chosen = _of_word(found, target_modules, groups) or _listed(found, target_modules, groups)
    # A pattern that fits the module, too, means modules: ".*head.*".
    return chosen or [
        target
        for target in _by_parameter(found)
        if re.fullmatch(target_modules, target.parameter)
        and not re.fullmatch(target_modules, target.parameter.rpartition(".")[0])
    ]


def _of_word(found: Survey, word: str, groups: Collection[str | None]) -> list[Target]:
    """What a group's name, "every" or a regular expression stands for."""
    if word == EVERY:
        return _by_parameter(found)
    chosen = [target for target in found.targets if _matches(target, word, groups)]
    # Of which hooks see nothing, such as experts in a form of their own.
    asked = _BOTH if word == "all" else {word} & {*_BOTH}
    return chosen or [
        target for target in found.others if target.group in asked and target.weight.dim() > 1
    ]


def _with_endings(found: Survey, endings: Iterable[str]) -> list[Target]:
    """The targets whose modules' names, or else whose parameters' names, end with one of these."""
    chosen: dict[str, Target] = {}
    for ending in endings:
        of_modules = [target for target in found.targets if _ends_with(target.name, ending)]
        of_parameters = (target for target in _by_parameter(found) if target.is_called(ending))
        chosen |= {target.parameter: target for target in of_modules or of_parameters}
    return [target for target in found.everything if chosen.get(target.parameter) is target]


def asked_as_parameters(targets: Sequence[Target], target_modules: str | Sequence[str]) -> set[str]:
    """The parameters of targets that are asked for by a parameter's name, or as "every"."""
    if isinstance(target_modules, str):
        target_modules = target_modules.replace(",", " ").split()
    return {
        target.parameter
        for target in targets
        for part in target_modules
        if part == EVERY or (target.is_called(part) and not _ends_with(target.name, part))
    }


def _by_parameter(found: Survey) -> list[Target]:
    """What a parameter's name may mean: its module's target, where its weight is its own."""
    shared = {name for target in found.shared for name in (target.parameter, *target.aliases)}
    own = [target for target in found.targets if target.parameter not in shared]
    return [*own, *found.shared, *found.others]


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _require_units(chosen: Sequence[Target], target_modules: str | Sequence[str]) -> None:
    parameters = [target.parameter for target in chosen if target.by_example]
    if parameters:
        raise ValueError(
            f"target_modules must match MLPs with granularity='unit', got {target_modules!r} with "
            f"{len(parameters)} parameters that have no units, such as {parameters[0]}; leave them "
            "out, or score with granularity='weight'"
        )


def _buffer_called(model: nn.Module, target_modules: str | Sequence[str]) -> str:
    """A buffer of one of these names; "" if there is none."""
    if isinstance(target_modules, str):
        target_modules = target_modules.replace(",", " ").split()
    named = (name for name, _ in base_model(model).named_buffers())
    return next((n for n in named if any(_ends_with(n, part) for part in target_modules)), "")


def _require_own_weights(candidates: Sequence[Target], chosen: Sequence[Target]) -> None:
    """Refuse a weight that two layers use: its gradient is the sum of both, and a hook sees one."""
    # Kept: one that is computed is another tensor each time, and may lie where the last one lay.
    weights = {target.name: target.weight for target in candidates}
    users: dict[int, list[str]] = {}
    for name, weight in weights.items():
        users.setdefault(id(weight), []).append(name)
    for target in chosen:
        if target.by_example:
            # Autograd adds up all that is made of a parameter.
            continue
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
        parameters that no hook can see; kinds: the same for "linear" modules and fused "experts";
        others: all other parameters of the model, by name with a star for numbers -> parameters,
        scored_parameters, share of the model's (norms, biases, embeddings, routers, ...); with the
        parameters of the groups they add up to the model's;
        unscorable: name -> size of what hooks cannot see and is not scored (matrices in the layers
        that belong to no Linear or Conv1D, or to a Linear that computes something else: routers,
        experts in a form of their own).
    """
    kept = [t for t in targets if scored is None or t.parameter in scored]
    by_example = {target.parameter for target in kept if target.by_example}
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
        "groups": _by_group(found, {target.name for target in kept}, by_example),
        "kinds": _by_kind(found, {target.name for target in kept}),
        "others": _others_by_name(found, {target.parameter for target in kept}),
        "unscorable": {
            name: size for name, (_, size) in found.unscorable.items() if name not in by_example
        },
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
    slow = [target.parameter for target in targets if target.by_example]
    if target_modules in ("all", *_BOTH) and slow:
        logger.warning(
            "of %r no hook sees a product: %d parameters, such as %s, are scored by a forward and "
            "backward pass for each example, as when they are named",
            target_modules,
            len(slow),
            slow[0],
        )
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


def _by_group(
    found: Survey, scored: Collection[str], by_example: Collection[str]
) -> dict[str, dict[str, int]]:
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
    for name, (group, size) in found.unscorable.items():
        add(group, unscorable=size * (name not in by_example))
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


def _others_by_name(found: Survey, scored: Collection[str]) -> dict[str, dict[str, float]]:
    """The parameters outside of the groups' modules, those of all layers together."""
    kinds: dict[str, dict[str, float]] = {}
    outside = (target for target in found.targets if target.group is None)
    # A weight that several modules share counts once, and not beside one of a group.
    counted = {id(target.weight) for target in found.targets if target.group is not None}
    for target in (*outside, *found.others):
        if id(target.weight) in counted:
            continue
        counted.add(id(target.weight))
        size = target.weight.numel()
        empty = {"parameters": 0, "scored_parameters": 0, "share": 0.0}
        of_kind = kinds.setdefault(_starred(target.parameter), empty)
        of_kind["parameters"] += size
        of_kind["scored_parameters"] += size * (target.parameter in scored)
        of_kind["share"] = of_kind["parameters"] / max(1, found.parameters)
    return kinds


def _weights_of(targets: Sequence[Target]) -> int:
    """How many weights the targets have; one that several share counts once."""
    return sum({id(t.weight): t.weight.numel() for t in targets}.values())


def _kinds(names: Iterable[str]) -> str:
    """Names with their numbers left out, each kind once, for messages."""
    kinds = sorted({re.sub(r"\d+", "*", name) for name in names})
    return ", ".join(kinds[:12]) or "none"


def _starred(name: str) -> str:
    """A name with a star for each part that is a number."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


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
                name=plain.name if leaf == "weight" else _joined(plain.name, leaf),
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
        if tensor.dim() >= 2 and id(tensor) not in weights and not _is_floating_point(tensor):
            yield name, tensor
    for name, buffer in module.named_buffers(recurse=False):
        # Masks and positions are buffers of integers too.
        if buffer.dim() >= 2 and "weight" in name and not _is_floating_point(buffer):
            yield name, buffer


def _names_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """By id of a parameter all of its names, as the model without adapters has them."""
    names: dict[int, list[str]] = {}
    offloaded: dict[str, int] = {}
    for plain in plain_modules(model, remove_duplicate=False):
        for leaf, parameter in plain.module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(_joined(plain.name, leaf))
                if parameter.is_meta:
                    offloaded[_joined(plain.name, leaf)] = id(parameter)
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


def _listed(found: Survey, text: str, groups: Collection[str | None]) -> list[Target]:
    """The targets that a text names as a list; none if it is no list.

    Raises:
        ValueError: a part of the list that nothing is called.
    """
    parts = text.replace(",", " ").split()
    if not all(_NAME.fullmatch(part) for part in parts):
        return []
    by_part = {
        part: _of_word(found, part, groups)
        if part in {"all", EVERY, *_BOTH, *groups}
        else _with_endings(found, [part])
        for part in parts
    }
    unknown = [part for part, matched in by_part.items() if not matched]
    if unknown and len(unknown) < len(by_part):
        raise ValueError(
            f"target_modules must match a Linear layer or a parameter with each of its parts, got "
            f"{unknown[0]!r} in {text!r}; the layers are "
            f"{_kinds(target.name for target in found.targets)}"
        )
    chosen = {target.parameter: target for matched in by_part.values() for target in matched}
    return [target for target in found.everything if chosen.get(target.parameter) is target]


def _matches(target: Target, target_modules: str, groups: Collection[str | None]) -> bool:
    if target_modules == "all":
        return target.group in _BOTH
    if target_modules in _BOTH or target_modules in groups:
        return target.group == target_modules
    try:
        return re.fullmatch(target_modules, target.name) is not None
    except re.error as error:
        raise ValueError(
            "target_modules must be 'mlp', 'self_attn', 'all', 'every', a list of suffixes or a "
            f"valid regular expression, got {target_modules!r} ({error}); escape special characters"
        ) from None
