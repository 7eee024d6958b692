"""The model of a scoring, whichever way its weights are held.

Whole in memory (perhaps offloaded by accelerate), in its files (`StreamedModel`), sharded over the
ranks by FSDP2, or split over teams of ranks by tensor parallel. What the steps of `scoring.py` do
otherwise for one of these is asked of here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from fastdean.coupling.asked import Asked
from fastdean.coupling.order import Order, require_room_for_dense
from fastdean.coupling.sums.accumulators import split_by_memory
from fastdean.coupling.sums.holding import least_held_bytes
from fastdean.coupling.sums.team_entries import in_blocks, require_even_blocks
from fastdean.coupling.targets.finding import find_targets, require_own_parameters
from fastdean.coupling.targets.survey import Survey, survey
from fastdean.coupling.targets.target import Target
from fastdean.data.examples import Example
from fastdean.models.adapters import require_no_prompts
from fastdean.models.layers.streaming import StreamedModel
from fastdean.models.layers.windows import (
    OffloadedModel,
    Windows,
    beginning,
    outside_layers,
    resident_layers,
    stream_of,
)
from fastdean.models.model_state import input_device, unwrap
from fastdean.models.probes import own_autocast
from fastdean.models.ranks.distributed import Ranks
from fastdean.models.ranks.sharded import ShardedModel, resharded
from fastdean.models.ranks.shards import OwnBlock, is_sharded
from fastdean.models.ranks.tensor_parallel import in_teams, is_split, training_ranks
from fastdean.wording.log import logger


@dataclass(frozen=True)
class Subject:
    """The model of a scoring.

    Attributes:
        model: below its wrappers.
        found: what it is made of.
        ranks: those that score it together.
        stream, sharded: the model, where its weights stay in their files, or are sharded over
            ranks.
        read_before: bytes of weights that the stream had read before.
    """

    model: nn.Module
    found: Survey
    ranks: Ranks
    stream: StreamedModel | None = None
    sharded: ShardedModel | None = None
    read_before: int = 0

    @classmethod
    def of(cls, given: Any, ranks: Ranks) -> Subject:
        """All ranks call it.

        Args:
            given: a module, a `StreamedModel`, or the name of a folder or hub id.
        Raises:
            ValueError, TypeError: it is no model, or held in a way that is not known here.
        """
        stream = stream_of(given)
        model = unwrap(given) if stream is None else stream.model
        require_no_prompts(model)
        if stream is not None:
            return cls(model, survey(model), ranks, stream, read_before=stream.bytes_read)
        in_parts = isinstance(model, nn.Module) and resharded(model)
        if in_parts and is_split(model):
            return cls(model, survey(model), in_teams(model, ranks))
        found = survey(model)
        if not in_parts:
            return cls(model, found, ranks)
        # In teams where tensor parallel splits what FSDP2 shards.
        ranks = training_ranks(model)
        return cls(model, found, ranks, sharded=ShardedModel(model, found.layers, ranks))

    @property
    def parts(self) -> ShardedModel | StreamedModel | None:
        """The model, where it is never whole in memory."""
        return self.sharded or self.stream

    @cached_property
    def device(self) -> torch.device:
        """Where it computes."""
        return input_device(self.model) if self.parts is None else self.parts.device

    @property
    def layers(self) -> Mapping[str, nn.Module]:
        """Name -> decoder layer."""
        return self.found.layers

    def own_autocast(self) -> AbstractContextManager[Any]:
        """Layers and losses by themselves compute as they do inside of the model's forward pass."""
        cast = own_autocast(self.model) if self.parts is None else None
        return nullcontext() if cast is None else torch.autocast(self.device.type, cast)

    @property
    def windows(self) -> Windows:
        return self.sharded or self.stream or OffloadedModel(self.model, self.layers)

    @property
    def resident(self) -> Sequence[str]:
        """The layers whose weights are in memory all the time."""
        return resident_layers(self.layers) if self.parts is None else ()

    @property
    def bytes_read(self) -> int:
        """Of streamed weights, by this process, for the job."""
        return 0 if self.stream is None else self.stream.bytes_read - self.read_before

    @property
    def order(self) -> Order | None:
        """The only order in which it can be scored; None: either."""
        if self.sharded is not None:
            why = "its weights are sharded over the ranks, and a layer's are gathered twice"
            return Order(True, why)
        return None if self.stream is None else Order(True, "its weights stay in their files")

    def outside_layers(self) -> AbstractContextManager[None]:
        """Inside, the weights outside of the layers are in memory."""
        return outside_layers(self.parts)

    def beginning(self) -> AbstractContextManager[Mapping[str, str]]:
        """Inside, the model can be run as a whole; yields which layers stand for which."""
        return beginning(self.parts)

    def fitting(self, asked: Asked) -> Asked:
        """What is asked for, as it is for such a model.

        Raises:
            ValueError: such a model cannot be scored like this.
        """
        dense = asked.keep_top is None and asked.granularity == "weight"
        if self.ranks.teams and self.parts is None:
            if asked.resume is not None and dense:
                raise ValueError(
                    "keep_top must be given with resume for a model that tensor parallel splits "
                    "over ranks, of whose weights no rank has all, got None; pass keep_top=1e-3"
                )
            # By layers where the job may be resumed.
            order = "batches" if asked.resume is None else "layers"
            return replace(asked, order=order) if asked.order == "auto" else asked
        if self.parts is None:
            return asked
        kind = "streamed model" if self.stream else "model sharded over ranks (FSDP2)"
        if asked.order == "batches":
            remedy = "load the model first" if self.stream else "load the model whole on every rank"
            raise ValueError(
                f"order must be 'layers' or 'auto' for a {kind}, got 'batches'; leave it out, or "
                f"{remedy}"
            )
        if self.stream is not None and dense:
            raise ValueError(
                "keep_top must be given for a streamed model, whose weights are gone when its "
                "scores are read, got None; pass keep_top=1e-3"
            )
        if asked.resume is not None and dense:
            raise ValueError(
                "keep_top must be given with resume for a model sharded over ranks (FSDP2), whose "
                "weights are gone when a job goes on, got None; pass keep_top=1e-3"
            )
        told = asked.order == "auto" and self.ranks.first
        # Who streams a model knows.
        if told and self.order is not None and self.stream is None:
            logger.info("order='layers': %s", self.order.why)
        return asked

    def targets(self, asked: Asked) -> list[Target]:
        """The targets that are asked for; with tensor parallel this rank's blocks of them.

        Raises:
            ValueError: nothing matches, or `memory_budget` holds no target's sums: a budget that is
                too small is refused before anything runs.
        """
        targets = find_targets(self.model, asked.target_modules, asked.granularity, self.found)
        require_own_parameters(self.model, targets)
        if self.ranks.teams:
            with self.ranks.failing_together():
                targets = in_blocks(targets, self._block)
            if asked.memory_budget is not None:
                require_even_blocks(targets, self.ranks)
        # Layer by layer more is needed than the sums, or less, and all of it is told at once, when
        # the batches are known.
        if asked.memory_budget is not None and asked.order != "layers" and self.parts is None:
            all_sums = asked.sums_bytes(self.ranks)
            may_hold = asked.order == "auto" and asked.keep_top is not None
            may_hold = may_hold and asked.granularity == "weight"
            may_hold = may_hold and asked.sums_at_a_time(self.ranks) == 1
            least = partial(least_held_bytes, all_sums=all_sums) if may_hold else all_sums
            if not all(least([target]) <= asked.memory_budget for target in targets):
                split_by_memory(targets, all_sums, asked.memory_budget)
        return targets

    def _block(self, target: Target) -> OwnBlock:
        """What this rank has of a weight while the model runs."""
        if self.sharded is None:
            return OwnBlock.of(target.weight)
        return self.sharded.block(target.module, target.leaf)

    def require_room(self, asked: Asked, targets: Sequence[Target], sets: int) -> None:
        """ValueError where dense sums of so many data sets do not fit into memory."""
        dense = sets * asked.kept_bytes(targets)
        if self.sharded is not None and asked.granularity == "weight":
            # Which are gone when their windows close.
            dense += sets * sum(target.weight.nbytes for target in targets)
        if self.sharded is not None:
            asked = replace(asked, order="layers")
        require_room_for_dense(asked, dense, self.device)

    def with_tokenizer(
        self, reading: Mapping[str, Any], loaders: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """How the loaders are read: with the tokenizer beside a streamed model's weights."""
        if self.stream is None or reading.get("tokenizer") is not None:
            return reading
        if all(map(_read_already, loaders.values())):
            return reading
        return {**reading, "tokenizer": self.stream.tokenizer}

    def weight(self, target: Target, asked: Asked) -> torch.Tensor:
        """The weight of a target, whose window is open, as its score is to have it."""
        if self.sharded is None:
            return target.materialised()
        weight = self.sharded.original(target.module, target.leaf)
        if asked.keep_top is not None or asked.granularity == "unit" or is_sharded(weight):
            return weight
        # It outlives its window with the dense sums, and goes where they do.
        return weight.to("cpu" if asked.memory_budget is not None else weight.device, copy=True)


def _read_already(loader: Any) -> bool:
    return isinstance(loader, Sequence) and all(isinstance(each, Example) for each in loader)
