"""Which weights are scored: Linear (and Conv1D) modules of the decoder layers, the stacked weights
of their fused experts, their MLPs' units, and on request any other parameter.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from torch import Tensor, nn

from fastdean.coupling.targets.coverage import BOTH, groups_asked_for, kinds_of
from fastdean.coupling.targets.survey import Survey, is_floating_point, survey
from fastdean.coupling.targets.target import Target, ends_with
from fastdean.models.adapters import base_model
from fastdean.wording.granularity import checked_granularity

# In place of a group's name: all parameters, also those that cost a backward pass per example.
EVERY = "every"
# A module's name or the end of one; no sign of a regular expression but the point.
_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")


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
            such suffixes and groups in one text, "q_proj,v_proj". Where no hook sees anything of
            "mlp" or "self_attn", its matrices stand for it. Of these the output embedding
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
        others = ", ".join(sorted(group for group in groups if group not in (None, *BOTH)))
        hints = f", in groups of their own {others}" if others else ""
        if granularity == "unit" and any(target.stacked for target in candidates):
            hints += ", and fused experts have scores of weights alone"
        if found.unscorable:
            hints += f", and hooks cannot see the fused tensors {kinds_of(found.unscorable)}"
        if granularity == "weight":
            hints += _scored_by_name(found)
        buffer = _buffer_called(model, target_modules)
        if buffer:
            hints += f"; {buffer} is a buffer, which nothing trains"
        raise ValueError(
            f"target_modules must match at least one {wanted} of the model, got "
            f"{target_modules!r}; the layers are {kinds_of(target.name for target in candidates)}"
            f"{hints}"
        )
    _require_own_weights(candidates, chosen)
    for target in chosen:
        weight = target.weight
        if not is_floating_point(weight):
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
    asked = groups_asked_for(dict.fromkeys(groups, {}), target_modules)
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
    # Groups of which hooks see nothing, such as experts in a form of their own.
    asked = {*BOTH} if word == "all" else {word} & {*BOTH}
    unseen = asked - {target.group for target in chosen}
    chosen += [
        target for target in found.others if target.group in unseen and target.weight.dim() > 1
    ]
    return chosen


def _with_endings(found: Survey, endings: Iterable[str]) -> list[Target]:
    """The targets whose modules' names, or else whose parameters' names, end with one of these."""
    chosen: dict[str, Target] = {}
    for ending in endings:
        of_modules = [target for target in found.targets if ends_with(target.name, ending)]
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
        if part == EVERY or (target.is_called(part) and not ends_with(target.name, part))
    }


def _by_parameter(found: Survey) -> list[Target]:
    """What a parameter's name may mean: its module's target, where its weight is its own."""
    shared = {name for target in found.shared for name in (target.parameter, *target.aliases)}
    own = [target for target in found.targets if target.parameter not in shared]
    return [*own, *found.shared, *found.others]


def _require_units(chosen: Sequence[Target], target_modules: str | Sequence[str]) -> None:
    parameters = [target.parameter for target in chosen if target.by_example]
    if any(target.leads_from_units for target in chosen):
        # Beside units, a whole group has matrices without any, seen by hooks or not.
        named = asked_as_parameters(chosen, target_modules)
        parameters = [parameter for parameter in parameters if parameter in named]
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
    return next((n for n in named if any(ends_with(n, part) for part in target_modules)), "")


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
        if part in {"all", EVERY, *BOTH, *groups}
        else _with_endings(found, [part])
        for part in parts
    }
    unknown = [part for part, matched in by_part.items() if not matched]
    if unknown and len(unknown) < len(by_part):
        raise ValueError(
            f"target_modules must match a Linear layer or a parameter with each of its parts, got "
            f"{unknown[0]!r} in {text!r}; the layers are "
            f"{kinds_of(target.name for target in found.targets)}{_scored_by_name(found)}"
        )
    chosen = {target.parameter: target for matched in by_part.values() for target in matched}
    return [target for target in found.everything if chosen.get(target.parameter) is target]


def _scored_by_name(found: Survey) -> str:
    """The end of a refusal that lists what can be asked for: parameters of no Linear layer."""
    if not found.others:
        return ""
    others = kinds_of(target.parameter for target in found.others)
    return f"; parameters that are scored by their names are {others}"


def _matches(target: Target, target_modules: str, groups: Collection[str | None]) -> bool:
    if target_modules == "all":
        return target.group in BOTH
    if target_modules in BOTH or target_modules in groups:
        return target.group == target_modules
    try:
        return re.fullmatch(target_modules, target.name) is not None
    except re.error as error:
        raise ValueError(
            "target_modules must be 'mlp', 'self_attn', 'all', 'every', a list of suffixes or a "
            f"valid regular expression, got {target_modules!r} ({error}); escape special characters"
        ) from None
