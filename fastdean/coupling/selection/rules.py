"""The rules of `couple()`: from the top entries of a matrix on each data set to the coupled ones.

With N_f, N_p, N_g the top-r entries on fairness, privacy and general examples:

    paper:     (N_f & N_p) - N_g
    released:  { A_j : A_j not in N_g and B_j not in N_g },  A, B the ascending lists of N_f and N_p

`released` is what DEAN's published code computes: it compares the two lists position by position
and is no intersection. The controls show what a part of the rule does by itself, after the same
subtraction.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TopSets:
    """The top entries of one matrix, int64 ascending without repetition, on one device.

    Attributes:
        general: the union of those of all general data sets.
        numel: entries of the matrix.
        wanted: of the entries in first and second, those that may be selected; None: all.
        seed: for "random".
        matrices: in how many equal parts the entries compete, each by itself.
    """

    first: Tensor
    second: Tensor
    general: Tensor
    numel: int
    seed: str
    matrices: int = 1
    wanted: Tensor | None = None

    @classmethod
    def of(
        cls,
        first: Tensor,
        second: Tensor,
        general: Sequence[Tensor],
        numel: int,
        seed: str = "",
        matrices: int = 1,
        wanted: Tensor | None = None,
    ) -> TopSets:
        """The sets, brought to where `first` is: scores may be on several devices."""
        spared = [first[:0], *(index.to(first.device) for index in general)]
        return cls(first, second.to(first.device), _union(*spared), numel, seed, matrices, wanted)

    def coupled_and_removed(self) -> tuple[int, int]:
        """How many entries are in first and second, and how many of these are in general too."""
        coupled = in_both(self.first, self.second)
        removed = coupled & in_both(self.first, self.general)
        return tuple(torch.stack([coupled.sum(), removed.sum()]).tolist())

    def expected_by_chance(self) -> float:
        """How many entries two independent sets of these sizes have in common."""
        return sum(p.first.numel() * p.second.numel() / p.numel for p in self.parts())

    def parts(self) -> Iterator[TopSets]:
        """The sets of each matrix by itself, counted from its first entry."""
        if self.matrices == 1:
            yield self
            return
        size = self.numel // self.matrices
        sets = (self.first, self.second, self.general)
        bounds = [
            torch.searchsorted(
                index, torch.arange(self.matrices + 1, device=index.device) * size
            ).tolist()
            for index in sets
        ]
        for m in range(self.matrices):
            first, second, general = (
                index[starts[m] : starts[m + 1]] - m * size
                for index, starts in zip(sets, bounds, strict=True)
            )
            wanted = None
            if self.wanted is not None:
                here = self.wanted // size == m
                wanted = self.wanted[here] - m * size
            yield TopSets(first, second, general, size, f"{self.seed}/{m}", wanted=wanted)


def _paper(sets: TopSets) -> Tensor:
    coupled = sets.first[in_both(sets.first, sets.second)] if sets.wanted is None else sets.wanted
    return _difference(coupled, sets.general)


def _released(sets: TopSets) -> Tensor:
    if sets.first.numel() != sets.second.numel():
        raise ValueError(
            "first and second must select equally many entries, as they are compared by position, "
            f"got {sets.first.numel()} and {sets.second.numel()}; use one ratio for both"
        )
    spared = in_both(sets.first, sets.general) | in_both(sets.second, sets.general)
    return sets.first[~spared]


def _random(sets: TopSets) -> Tensor:
    size = sets.numel // sets.matrices
    drawn = [_random_of_matrix(part) + m * size for m, part in enumerate(sets.parts())]
    return torch.cat(drawn)


def _random_of_matrix(sets: TopSets) -> Tensor:
    """Uniform without replacement outside `general`: ranks among the others, then their places."""
    outside = range(sets.numel - sets.general.numel())
    drawn = random.Random(sets.seed).sample(outside, _paper(sets).numel())
    device = sets.general.device
    below = sets.general - torch.arange(sets.general.numel(), device=device)
    ranks = torch.tensor(sorted(drawn), dtype=torch.int64, device=device)
    return ranks + torch.searchsorted(below, ranks, right=True)


RULES: dict[str, Callable[[TopSets], Tensor]] = {
    "paper": _paper,
    "released": _released,
    "first": lambda sets: _difference(sets.first, sets.general),
    "second": lambda sets: _difference(sets.second, sets.general),
    "union": lambda sets: _difference(_union(sets.first, sets.second), sets.general),
    "random": _random,
}


def in_both(a: Tensor, b: Tensor) -> Tensor:
    """Which entries of `a` are in `b`, both ascending without repetition: bool, shape of `a`."""
    if b.numel() == 0:
        return torch.zeros_like(a, dtype=torch.bool)
    return b[torch.searchsorted(b, a).clamp_max(b.numel() - 1)] == a


def _difference(a: Tensor, b: Tensor) -> Tensor:
    return a[~in_both(a, b)]


def _union(*sets: Tensor) -> Tensor:
    return torch.cat(sets).unique()
