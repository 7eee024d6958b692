"""Models that tensor parallel splits over ranks: transformers' plans, torch's `parallelize_module`.

Weights are DTensors, and stay so while the model runs: each rank computes with its block, and the
ranks that hold one model together, a team, exchange what its layers return. So they must be given
the same batches. Ranks beyond the first team hold the same model again, for other examples.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastdean.models.distributed import Ranks
from fastdean.models.sharded import resharded, units_of
from fastdean.models.shards import is_sharded


def is_split(model: nn.Module) -> bool:
    """Whether tensor parallel splits the weights of a model.

    Raises:
        ValueError: they are sharded in another way than FastDEAN knows.
    """
    return resharded(model) and not units_of(model)


def in_teams(model: nn.Module, ranks: Ranks) -> Ranks:
    """The ranks of a job on such a model, in teams; all ranks call it.

    Raises:
        ValueError: the meshes of its weights are no teams that are as large as each other.
    """
    meshes = {tuple(p.device_mesh.mesh.flatten().tolist()) for p in _split_parameters(model)}
    with ranks.failing_together():
        if len(meshes) > 1:
            one, other = sorted(meshes)[:2]
            raise _unfit(f"some on ranks {list(one)}, others on ranks {list(other)}")
    own = torch.full((ranks.size,), -1, dtype=torch.int64, device="cpu")
    mesh = next(iter(meshes))
    own[: len(mesh)] = torch.tensor(mesh)
    teams = sorted({tuple(t[0][t[0] >= 0].tolist()) for t in ranks.gather([own])})
    everyone = sorted(rank for team in teams for rank in team)
    with ranks.failing_together():
        if everyone != list(range(ranks.size)) or len({len(team) for team in teams}) > 1:
            raise _unfit(f"ranks {', '.join(str(list(team)) for team in teams)} of {ranks.size}")
    return replace(ranks, teams=tuple(teams))


def _split_parameters(model: nn.Module) -> list[Any]:
    return [parameter for parameter in model.parameters() if is_sharded(parameter)]


def _unfit(found: str) -> ValueError:
    return ValueError(
        f"model must have all its split weights on one mesh, with every rank in one of as many "
        f"ranks, got {found}; start as many ranks as whole models need"
    )
