"""Whether all ranks were given the same job: arguments, model and matched weights.

Ranks that were not would add up sums of unlike weights, or wait in unlike collectives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdean.coupling.asked import Asked
from fastdean.coupling.results.score_entry import ScoreEntry, values_at
from fastdean.coupling.subject import Subject
from fastdean.coupling.targets.target import Target
from fastdean.models.ranks.distributed import Ranks
from fastdean.ops.memory import memory_fault

# How many numbers of each weight are compared: they tell models apart, and are read at once.
_LOOKED_AT = 16


def require_same_arguments(asked: Asked, sets: int, subject: Subject, ranks: Ranks) -> None:
    """ValueError on all ranks where they were given unlike arguments.

    What may differ is where a rank keeps something, and how much of it, where the ranks need not
    take the same steps: states, a resumed job's folder, by layers `memory_budget`.
    """
    modules = asked.target_modules
    own: dict[str, Any] = {
        "granularity": asked.granularity,
        "target_modules": modules if isinstance(modules, str) else sorted(map(str, modules)),
        "keep_top": asked.keep_top,
        "expert_scope": asked.expert_scope,
        "order": asked.order,
        "signs": asked.signs,
        "deterministic": asked.deterministic,
        "resume": "None" if asked.resume is None else "a folder",
        "number of data sets": sets,
    }
    if asked.order != "layers" and subject.order is None:
        own["memory_budget"] = asked.memory_budget
    ranks.require_same("score()", own, "call it in the same way on each")


def require_same_weights(targets: Sequence[Target], subject: Subject, ranks: Ranks) -> None:
    """ValueError on all ranks where they have unlike models, by a few numbers of each weight.

    Of all weights, as every one has a part in every score: a head that was not in the checkpoint
    is drawn anew on each rank.
    """
    if ranks.size == 1:
        return
    own = {"class": type(subject.model).__name__}
    for target in targets:
        own[f"dtype of {target.parameter}"] = str(target.weight.dtype)
        if not ranks.teams:
            own[f"shape of {target.parameter}"] = str(list(target.weight.shape))
    # Of weights in parts each rank has its own.
    if subject.parts is None and not ranks.teams:
        own |= _digests(subject.model)
    ranks.require_same("model", own, "give every rank the same model")


def require_same_bits(entries: Mapping[str, ScoreEntry], ranks: Ranks) -> None:
    """ValueError on all ranks where a weight that was scored has other bits on one of them.

    A mask that was applied on one rank alone changes no more than a few numbers. The checksums are
    made with the scores; beforehand they would take a share of the job's time.
    """
    own = {
        f"bits of {name}": f"{entry.fingerprint % 2**64:016x}" for name, entry in entries.items()
    }
    ranks.require_same("model", own, "give every rank the same model")


def _digests(model: nn.Module) -> dict[str, str]:
    """Of a few numbers of each weight that is in memory."""
    numbers = {
        name: _numbers(weight.detach())
        for name, weight in model.named_parameters()
        if memory_fault(weight) is None
    }
    found = {}
    for device in dict.fromkeys(each.device for each in numbers.values()):
        here = {name: each for name, each in numbers.items() if each.device == device}
        # From a GPU all at once.
        joined = torch.cat(list(here.values())).cpu()
        for name, part in zip(here, joined.split(list(map(len, here.values()))), strict=True):
            digest = hashlib.sha256(part.numpy().tobytes()).hexdigest()
            found[f"numbers in {name}"] = digest[:8]
    return found


def _numbers(weight: Tensor) -> Tensor:
    """The bytes of a few numbers of a weight, far from each other."""
    count = min(_LOOKED_AT, weight.numel())
    places = (2 * torch.arange(count, device=weight.device) + 1) * weight.numel() // (2 * count)
    return values_at(weight, places).contiguous().view(torch.uint8)
