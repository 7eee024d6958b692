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

from fastdean.models.ranks.distributed import Ranks
from fastdean.models.ranks.sharded import resharded, sharded_parameters, units_of
from fastdean.models.ranks.shards import is_sharded


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
    return _teams(meshes, ranks)


def training_ranks(model: nn.Module) -> Ranks:
    """The ranks that train a model together, in teams where tensor parallel splits its weights.

    Also in the middle of a pass, while FSDP2 has weights gathered. All ranks call it where any
    weight is sharded.

    Raises:
        ValueError: as `in_teams`; or FSDP2 shards weights over a part of the teams.
    """
    ranks = Ranks.of_group()
    managed = [each for each, _ in sharded_parameters(model)]
    if not managed:
        return in_teams(model, ranks) if any(map(is_sharded, model.parameters())) else ranks
    meshes, sizes = set(), set()
    for each in managed:
        mesh, dims = each.sharded_param.device_mesh, each.mesh_info.mesh.ndim
        sizes.add(each.mesh_info.mesh.size())
        if mesh.ndim > dims:
            # The dimensions of FSDP2 come first.
            own = mesh.mesh[tuple(mesh.get_coordinate()[:dims])]
            meshes.add(tuple(own.flatten().tolist()))
    if meshes:
        ranks = _teams(meshes, ranks)
    with ranks.failing_together():
        if sizes != {ranks.shares}:
            raise ValueError(
                f"model must be sharded by fully_shard over all {ranks.shares} ranks that have "
                f"examples of their own, got a mesh of {min(sizes)}; start as many ranks as the "
                "mesh has, or shard it over all"
            )
    return ranks


def _teams(meshes: set[tuple[int, ...]], ranks: Ranks) -> Ranks:
    """`ranks` in teams, of which this rank's are the ranks of these meshes."""
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
