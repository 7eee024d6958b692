"""From the selected entries of a matrix to the mask's: flat indices and original values.

Scores of weights hold the values, or share them with the model; scores of units, and those read
from files, may lack them, and then the model has to be given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastdean.coupling.results.score_entry import fingerprint
from fastdean.coupling.results.scores import Scores
from fastdean.coupling.targets.units import flat_places, unit_layers
from fastdean.masks import MaskEntry
from fastdean.models.adapters import plain_parameter, plain_submodule
from fastdean.models.model_state import materialised_weight
from fastdean.models.ranks.shards import whole


def require_scored_model(scores: Scores, model: nn.Module) -> None:
    """Raise ValueError unless the model holds the weights that were scored."""
    for name, entry in scores.entries.items():
        if fingerprint(_weight_of(model, name)) != entry.fingerprint:
            raise ValueError(
                f"model must be the one that was scored, got other values in {name}; restore its "
                "mask or pass the model the scores were made on"
            )


def mask_entry(
    name: str, selected: Tensor, everyone: Sequence[Scores], model: nn.Module | None
) -> MaskEntry:
    """The entry of a scored matrix, from the model or what any of the scores holds of it."""
    entry = everyone[0].entries[name]
    index = selected
    if entry.unit_axis is not None:
        index = flat_places(entry.shape, entry.unit_axis, selected)
    weight = _whole_weight(name, everyone) if model is None else _weight_of(model, name)
    if weight is not None:
        original = weight.flatten()[index.to(weight.device)]
    else:
        original = _stored_values(name, index, everyone)
    return MaskEntry(index=index.cpu(), original=original.cpu(), shape=entry.shape)


def entries_in_front(down: str, units: Tensor, model: nn.Module) -> dict[str, MaskEntry]:
    """The weights of these units in the layers in front of their down projection, by name."""
    entries = {}
    for name, index in unit_layers(model, down).places(units.cpu()).items():
        values = plain_parameter(model, name).detach()
        original = values.flatten()[index.to(values.device)].cpu()
        entries[name] = MaskEntry(index=index, original=original, shape=tuple(values.shape))
    return entries


def _whole_weight(name: str, everyone: Sequence[Scores]) -> Tensor | None:
    for scores in everyone:
        entry = scores.entries[name]
        if entry.weight is not None and tuple(entry.weight.shape) == entry.shape:
            return entry.weight
    return None


def _weight_of(model: nn.Module, name: str) -> Tensor:
    """A weight of the model, detached; one that is offloaded or sharded over ranks is a copy."""
    try:
        weight: Tensor = plain_parameter(model, name)
    except AttributeError:
        raise ValueError(
            f"model must be the one that was scored, got one without {name}; pass the model the "
            "scores were made on"
        ) from None
    if weight.device.type == "meta":
        owner, _, leaf = name.rpartition(".")
        weight = materialised_weight(plain_submodule(model, owner), leaf)
    return whole(weight)


def _stored_values(name: str, index: Tensor, everyone: Sequence[Scores]) -> Tensor:
    """The original values at `index`, put together from what sparse scores hold."""
    values, found = None, torch.zeros_like(index, dtype=torch.bool)
    for scores in everyone:
        entry = scores.entries[name]
        if entry.index is None or entry.weight is None or not entry.index.numel():
            continue
        stored, held = (part.to(index.device) for part in (entry.index, entry.weight))
        if values is None:
            values = torch.zeros_like(index, dtype=held.dtype)
        places = torch.searchsorted(stored, index).clamp_max(stored.numel() - 1)
        here = stored[places] == index
        values = torch.where(here, held[places], values)
        found |= here
    if values is None or not found.all():
        raise ValueError(
            f"model must be given to couple these scores, got scores that do not hold the weights "
            f"of {name} at the selected entries; pass model="
        )
    return values
