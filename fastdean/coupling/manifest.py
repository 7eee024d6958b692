"""Where scores come from: the manifest that travels with them and with the masks made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastdean.coupling.results.expert_load import KEY, described_load
from fastdean.precision import reduced_products
from fastdean.wording.log import logger

if TYPE_CHECKING:
    from fastdean.coupling.results.score_entry import ScoreEntry
    from fastdean.coupling.targets.survey import Survey
    from fastdean.coupling.targets.target import Target
    from fastdean.coupling.workloads.scorable import Scorable
    from fastdean.models.ranks.distributed import Ranks


def score_manifest(
    model: nn.Module,
    targets: Sequence[Target],
    scorables: Sequence[Scorable],
    scored: Mapping[str, ScoreEntry],
    granularity: str,
    target_modules: str | Sequence[str],
    keep_top: float | None,
    expert_scope: str,
    ranks: Ranks,
    found: Survey,
    device: torch.device,
) -> dict[str, Any]:
    """The manifest of a `score()`.

    Args:
        targets: the modules that were matched; `scored`: the entries, by parameter.
        scorables: of one data set, those that hooks score first.
        found: the model's survey.
        device: where weights compute that lie nowhere now.
    """
    from fastdean.coupling.targets.coverage import coverage
    from fastdean.files.provenance import now, public_name, versions

    covered = coverage(model, targets, scored, found)
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or ""
    in_text = isinstance(target_modules, str)
    scorable = scorables[0]
    by_example = [
        target.parameter
        for each in scorables
        for target in each.targets
        if target.by_example and target.parameter in scored
    ]
    left_out = {name: why for each in scorables for name, why in each.left_out.items()}
    rounded = reduced_products((target.weight for target in targets), device)
    optional = {
        "keep_top": keep_top,
        "expert_scope": expert_scope if _of_experts(scored) else None,
        "unseen_experts": _unseen(scored) or None,
        KEY: described_load(scored, found) or None,
        "tensor_parallel": len(ranks.team) if ranks.teams else None,
        "fp32_products": ", ".join(sorted(rounded)) or None,
        "loss_scale": None if scorable.scale is None else scorable.scale.factor,
        "one_example_per_batch": scorable.alone,
        # The others are scored through hooks.
        "one_backward_pass_per_example": by_example or None,
    }
    return {
        "created": now(),
        "model": {
            "name": public_name(name) or type(model).__name__,
            "class": type(model).__name__,
            "parameters": covered["model_parameters"],
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        },
        "granularity": granularity,
        "target_modules": target_modules if in_text else list(target_modules),
        "coverage": covered | {"left_out": left_out},
        "importance": "mean over examples of the per-example absolute value",
        "accumulation": "float32",
        "ranks": ranks.size,
        "versions": versions(),
        **scorable.work.describe(),
        **{key: value for key, value in optional.items() if value is not None},
    }


def warn_about_unseen(scored: Mapping[str, ScoreEntry]) -> None:
    """Say how many experts no token reached, whose weights cannot be selected."""
    unseen = _unseen(scored)
    if unseen:
        number = sum(len(experts) for experts in unseen.values())
        first, experts = next(iter(unseen.items()))
        logger.warning(
            "%d of %d experts' weights got no gradient and have no candidates, such as number %d "
            "of %s: more examples?",
            number,
            sum(entry.num_experts - entry.weightless for entry in _of_experts(scored)),
            experts[0],
            first,
        )


def _of_experts(scored: Mapping[str, ScoreEntry]) -> list[ScoreEntry]:
    return [entry for entry in scored.values() if entry.num_experts]


def _unseen(scored: Mapping[str, ScoreEntry]) -> dict[str, list[int]]:
    """Parameter name -> the experts that no token reached, where there are any."""
    return {name: list(entry.unseen) for name, entry in scored.items() if entry.unseen}
