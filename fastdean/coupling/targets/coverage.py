"""How much of a model is scored, by kind and by group, and a warning where that is little."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import nn

from fastdean.coupling.targets.survey import Survey, survey
from fastdean.coupling.targets.target import Target
from fastdean.models.layers.blocks import ATTENTION, FEED_FORWARD
from fastdean.wording.log import logger

# What "all" stands for.
BOTH = (FEED_FORWARD, ATTENTION)


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
    found = survey(model) if found is None else found
    seen = {target.group for target in found.targets}
    for group in groups_asked_for(dict.fromkeys(BOTH, {}), target_modules):
        slow = [t.parameter for t in targets if t.by_example and t.group == group]
        if slow and group not in seen:
            logger.warning(
                "of %r no hook sees a product: %d parameters, such as %s, are scored by a forward "
                "and backward pass for each example, as when they are named",
                group,
                len(slow),
                slow[0],
            )
    covered = coverage(model, targets, found=found)
    missed, total = covered["unscorable"], covered["model_parameters"]
    asked = groups_asked_for(covered["groups"], target_modules)
    of_asked, missed_of_asked = _missed(covered["groups"], asked)
    # What a group's matrices by example hold is none of its `parameters`, and no more missed.
    by_example = {target.parameter for target in targets if target.by_example}
    unseen = ((name, *each) for name, each in found.unscorable.items() if name in by_example)
    of_asked += sum(size for _, group, size in unseen if group in asked)
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


def groups_asked_for(
    groups: Mapping[str, Mapping], target_modules: str | Sequence[str]
) -> list[str]:
    """Whole groups; a suffix or a pattern asks for a part of one."""
    if not isinstance(target_modules, str):
        return []
    parts = target_modules.replace(",", " ").split()
    named = {group for part in parts for group in (BOTH if part == "all" else (part,))}
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
        of_kind = kinds.setdefault(starred(target.parameter), empty)
        of_kind["parameters"] += size
        of_kind["scored_parameters"] += size * (target.parameter in scored)
        of_kind["share"] = of_kind["parameters"] / max(1, found.parameters)
    return kinds


def _weights_of(targets: Sequence[Target]) -> int:
    """How many weights the targets have; one that several share counts once."""
    return sum({id(t.weight): t.weight.numel() for t in targets}.values())


def kinds_of(names: Iterable[str]) -> str:
    """Names with their numbers left out, each kind once, for messages."""
    kinds = sorted({re.sub(r"\d+", "*", name) for name in names})
    return ", ".join(kinds[:12]) or "none"


def starred(name: str) -> str:
    """A name with a star for each part that is a number."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
