"""Passes over text by ranks that hold one model together.

Every pass of a model that FSDP2 shards gathers its weights from all ranks: each has its own text,
and as many passes are run as the longest takes. The ranks over which tensor parallel splits a model
compute one pass together: they must have the same text. All else needs nothing of this.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from fastdean.data.batching import Batch
from fastdean.data.examples import Example
from fastdean.models.fitting import usual_starts
from fastdean.models.probes import numbers_from, undisturbed
from fastdean.models.ranks.distributed import Ranks
from fastdean.models.ranks.sharded import left_sharded, units_of
from fastdean.models.ranks.shards import is_sharded
from fastdean.models.ranks.tensor_parallel import training_ranks

# More tokens than a model is measured on.
_LOOKED_AT = 64


class SharedPasses:
    """Which ranks run a model's passes together; all of them make it.

    Args:
        model: below its wrappers.
    Attributes:
        ranks: of the job, in teams where tensor parallel splits the weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._in_step = bool(units_of(model))
        self._shared = self._in_step or any(map(is_sharded, model.parameters()))
        self.ranks = training_ranks(model) if self._shared else Ranks(0, 1)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Inside, a rank that fails between passes ends all; the model is left sharded."""
        with self.ranks.failing_together(), left_sharded(self._model):
            yield

    @contextmanager
    def planning(self, examples: Sequence[Example]) -> Iterator[None]:
        """Inside, the batches of a rank's own examples are planned.

        Raises:
            ValueError: ranks of a team have other examples.
        """
        if self.ranks.teams:
            self._require_same(examples)
        with undisturbed(self._model) if self._shared else nullcontext():
            if self._in_step and not self.ranks.all(not _has_positions(examples)):
                # What one rank would ask the model, all do.
                for start in usual_starts(self._model):
                    numbers_from(self._model, start)
            yield

    def measured_on(self, examples: Sequence[Example]) -> Sequence[Example]:
        """The examples on which this model is measured: of all ranks, where all must measure."""
        if not self._in_step:
            return examples
        kinds: dict[tuple[str, ...], list[Example]] = {}
        for example in examples:
            kinds.setdefault(tuple(sorted(example.columns)), []).append(example)
        # It looks at the first tokens of two of each kind, and at whether there are two.
        offered = [each.first(_LOOKED_AT) for of_kind in kinds.values() for each in of_kind[:2]]
        found = self.ranks.gather_objects(offered)
        return [example for of_rank in found for example in of_rank]

    def each(self, batches: Sequence[Batch]) -> Iterator[Batch | None]:
        """The batches, and behind them None for as long as another rank has one."""
        passes = self.ranks.highest(len(batches)) if self._in_step else len(batches)
        yield from batches
        yield from [None] * (passes - len(batches))

    def one(self) -> AbstractContextManager[None]:
        """Around one pass."""
        return self.ranks.together() if self._in_step else nullcontext()

    def _require_same(self, examples: Sequence[Example]) -> None:
        digest = hashlib.sha256()
        for example in examples:
            columns = {**example.columns, "input_ids": example.input_ids}
            for name, column in sorted(columns.items()):
                digest.update(f"{name} {len(column)} ".encode())
                digest.update(column.numpy().tobytes())
        own = torch.tensor([int.from_bytes(digest.digest()[:7])])
        digests = [int(found[0]) for found in self.ranks.gather([own])]
        others = [rank for rank in self.ranks.team if digests[rank] != digests[self.ranks.rank]]
        if others:
            raise ValueError(
                "loader must have the same text on all ranks over which tensor parallel splits the "
                f"model, {list(self.ranks.team)}, got another one on rank {others[0]} than on rank "
                f"{self.ranks.rank}; split the text among these groups of ranks alone"
            )


def _has_positions(examples: Sequence[Example]) -> bool:
    return any("position_ids" in example.columns for example in examples)
