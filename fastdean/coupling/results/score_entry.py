"""The scores of one matrix, dense or its top entries alone, and the checksum of its weight."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from fastdean.models.ranks.shards import OwnBlock
from fastdean.ops.bits import bit_sums
from fastdean.ops.selection import select_top
from fastdean.wording.mendable import StateError


@dataclass(frozen=True)
class ScoreEntry:
    """The score of one matrix, or of another parameter.

    Attributes:
        sums: fp32; dense weight scores have the weight's shape, unit scores [C], sparse ones [M].
        weight: dense and unit scores: the stored weight, sharing the model's memory unless
            read from a file; sparse: its values [M]. None for unit scores read from a file.
        index: int64 [M], ascending flat indices of sparse scores; None when dense.
        shape: shape of the stored weight.
        unit_axis: for unit scores, the axis of the weight that counts units; else None.
        fingerprint: exact checksum of the weight when it was scored.
        matrices: in how many equal parts along the first axis entries compete for selection: one,
            or with `expert_scope="expert"` one for each expert.
        unseen: of a stacked weight, the experts that no token reached.
        weightless: how many of the last experts of a stacked weight use none of it: they hand their
            tokens on, and are never unseen.
        signed: fp32, shape of `sums`: the sum over examples of the gradients themselves (of units:
            of activation x gradient); None where scores were made without signs.
        routed: of a stacked weight, the tokens that each expert was given; None where read from a
            file, whose manifest has them.
        stacked: whether the weight holds a matrix for each of several experts.
    """

    sums: Tensor
    weight: Tensor | None
    index: Tensor | None
    shape: tuple[int, ...]
    unit_axis: int | None
    fingerprint: int
    signed: Tensor | None = None
    matrices: int = 1
    unseen: tuple[int, ...] = ()
    routed: tuple[int, ...] | None = None
    stacked: bool = False
    weightless: int = 0

    @classmethod
    def of(
        cls,
        sums: Tensor,
        weight: Tensor,
        unit_axis: int | None = None,
        signed: Tensor | None = None,
        stacked: bool = False,
    ) -> ScoreEntry:
        """The dense entry of a weight, or of its units."""
        weight = weight.detach()
        return cls(
            sums,
            weight,
            None,
            tuple(weight.shape),
            unit_axis,
            fingerprint(weight),
            signed,
            unseen=_all_zero(sums) if stacked else (),
            stacked=stacked,
        )

    @property
    def numel(self) -> int:
        """How many entries (weights or units) there are."""
        return math.prod(self.shape) if self.unit_axis is None else self.shape[self.unit_axis]

    @property
    def competing(self) -> int:
        """How many of them compete for selection with each other."""
        return self.numel // self.matrices

    @property
    def num_experts(self) -> int:
        """Of a stacked weight; 0 of another."""
        return self.shape[0] if self.stacked else 0

    def with_weightless(self, number: int) -> ScoreEntry:
        """The same entry, of whose experts so many of the last use no weight."""
        first = self.num_experts - number
        unseen = tuple(expert for expert in self.unseen if expert < first)
        return replace(self, unseen=unseen, weightless=number)

    def scoped(self, expert_scope: str) -> ScoreEntry:
        """The same entry, selected from expert by expert or as one tensor."""
        return replace(
            self, matrices=self.num_experts if self.num_experts and expert_scope == "expert" else 1
        )

    def require_unchanged(self, name: str) -> None:
        """Raise RuntimeError if the weight, called `name`, has changed since it was scored."""
        owns_values = self.index is not None and self.unit_axis is None
        if self.weight is None or owns_values or fingerprint(self.weight) == self.fingerprint:
            return
        raise StateError(
            f"{name} has changed since it was scored; restore the mask that is applied, or score "
            "again"
        )

    @property
    def factor(self) -> Tensor | None:
        """What the sums are multiplied with: the weight, or nothing for units."""
        return None if self.unit_axis is not None else self.weight

    def select(self, num_examples: int, k: int) -> Tensor:
        """int64, ascending: flat indices (unit numbers) of the k most important entries.

        Of several matrices the k most important of each. They stay on the device of the sums.
        """
        return self._flat_index(self._top(num_examples, k))

    def keep(self, num_examples: int, k: int) -> ScoreEntry:
        """The sparse entry of the k most important ones, of several matrices of each."""
        weight, factor = self.weight, self.factor
        chosen = self._top(num_examples, k)
        if factor is not None:
            weight = values_at(factor, chosen.to(factor.device))
        return replace(
            self,
            sums=values_at(self.sums, chosen),
            weight=weight,
            index=self._flat_index(chosen),
            signed=None if self.signed is None else values_at(self.signed, chosen),
        )

    def signs(self) -> Tensor:
        """int8, shape of `sums`: of the sum over examples of W * dL/dW (of units of a * dL/da)."""
        assert self.signed is not None  # `Scores.signs` refused the other.
        return _signs(self.signed, self.factor)

    def signs_at(self, index: Tensor) -> Tensor:
        """int8 [M]: `signs` at flat indices (unit numbers), which sparse scores must hold."""
        assert self.signed is not None  # `require_signs` refused the other.
        places = index.to(self.signed.device)
        if self.index is not None:
            places = torch.searchsorted(self.index, places)
        factor = self.factor
        if factor is not None:
            factor = values_at(factor, places.to(factor.device))
        return _signs(values_at(self.signed, places), factor)

    def __add__(self, other: ScoreEntry) -> ScoreEntry:
        """The entry over the examples of both, which are dense; signed where both are."""
        signed = None
        if self.signed is not None and other.signed is not None:
            signed = self.signed + other.signed.to(self.signed.device)
        unseen = tuple(expert for expert in self.unseen if expert in other.unseen)
        sums = self.sums + other.sums.to(self.sums.device)
        return replace(self, sums=sums, signed=signed, unseen=unseen, routed=None)

    def _top(self, num_examples: int, k: int) -> Tensor:
        """Which of the sums, by their position in them."""
        if self.matrices == 1:
            return select_top(self.sums, self.factor, num_examples, k)
        found = []
        for first, of_sums in self._parts():
            factor = None if self.factor is None else self.factor[of_sums]
            found.append(select_top(self.sums[of_sums], factor, num_examples, k) + first)
        return torch.cat(found)

    def _parts(self) -> Iterator[tuple[int, int | slice]]:
        """Of each matrix the position of its first entry in the sums, and where it is there."""
        if self.index is None:
            yield from ((matrix * self.competing, matrix) for matrix in range(self.matrices))
            return
        starts = torch.arange(self.matrices + 1, device=self.index.device) * self.competing
        bounds = torch.searchsorted(self.index, starts).tolist()
        yield from ((first, slice(first, end)) for first, end in pairwise(bounds))

    def _flat_index(self, chosen: Tensor) -> Tensor:
        return chosen if self.index is None else self.index[chosen]


def _all_zero(sums: Tensor) -> tuple[int, ...]:
    """The experts that nothing was added for."""
    # Of most a few sums show it, and not all need be read.
    maybe = (~sums[:, :1].flatten(1).any(1)).nonzero().squeeze(1).tolist()
    return tuple(expert for expert in maybe if not sums[expert].any())


def values_at(tensor: Tensor, index: Tensor) -> Tensor:
    """Entries by flat index, [M]; nothing of the tensor's size is copied, whatever its strides."""
    if tensor.dim() == 0:
        return tensor.expand(1)[index]
    return tensor[torch.unravel_index(index, tensor.shape)]


def _signs(signed: Tensor, factor: Tensor | None) -> Tensor:
    found = signed.sign().to(torch.int8)
    if factor is not None:
        found *= factor.sign().to(found.device, torch.int8)
    return found


def fingerprint(weight: Tensor, block: OwnBlock | None = None) -> int:
    """Exact checksum of a weight, the same on any device and for any layout in memory.

    sum_i (2 i + 1) b_i modulo 2^64, as an int64, with i the row-major index of an entry and b_i its
    bits as a signed integer. The multipliers are odd, so that every change of one entry shows, and
    they differ, so that a swap of two shows.

    Args:
        block: where `weight` lies in a larger one: then the part of its sum that is made here.
    """
    # With i = columns r + c the sum needs only those of each row and of each column.
    of_rows, of_columns = bit_sums(weight)
    columns = max(1, len(of_columns))
    places = torch.arange(max(len(of_rows), columns), device=of_rows.device)
    of_row, of_column = places[: len(of_rows)], places[: len(of_columns)]
    if block is not None and block.tensor.dim() > 1:
        of_row, of_column = (each.to(of_rows.device) for each in block.rows_and_columns())
        columns = max(1, block.shape[-1])
    elif block is not None:
        of_row = block.flat_index(of_row)
    in_rows = ((2 * of_column + 1) * of_columns).sum()
    total = in_rows + 2 * columns * (of_row * of_rows).sum()
    return int(total)
