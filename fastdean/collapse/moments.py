"""Count, mean and scatter of each class's representations, in one pass and from any split of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from fastdean.data.batching import send
from fastdean.models.ranks.distributed import Ranks
from fastdean.wording.mendable import InputTypeError


class ClassMoments:
    """Count n_c, mean mu_c and scatter sum ||h - mu_c||^2 of each class's representations, in fp64.

    A batch's own means and scatter are merged with those so far (Chan, Golub and LeVeque 1979):

        scatter += scatter_b + ||mu_b - mu||^2 n n_b / (n + n_b)
        mu += (mu_b - mu) n_b / (n + n_b)

    Only differences from a mean are squared: sum h^2 - n mu^2 would lose digits where, as in
    language models, representations share a mean far larger than their differences. Any grouping of
    the same tokens gives the same moments up to fp64 rounding.

    Args:
        num_classes, num_features: K and D.
        device: of the moments, one with fp64.
    Attributes:
        counts: fp64 [K], whole numbers.
        means: fp64 [K, D]; 0 where nothing was counted.
        scatter: fp64 [K], sum over the class's tokens of ||h - mu_c||^2.
        teams: ranks that hold one model together (tensor parallel) and so counted the same tokens;
            empty where every rank counted its own.
    """

    def __init__(
        self, num_classes: int, num_features: int, *, device: torch.device | str | None = None
    ) -> None:
        if num_classes < 1 or num_features < 1:
            raise ValueError(
                "num_classes and num_features must be at least 1, "
                f"got {num_classes} and {num_features}; give K and D of the classes' weight [K, D]"
            )
        self.counts = torch.zeros(num_classes, dtype=torch.float64, device=device)
        self.means = self.counts.new_zeros(num_classes, num_features)
        self.scatter = torch.zeros_like(self.counts)
        self.teams: tuple[tuple[int, ...], ...] = ()

    def __repr__(self) -> str:
        num_classes, num_features = self.means.shape
        return f"ClassMoments({num_classes}, {num_features}, device={str(self.means.device)!r})"

    @property
    def variances(self) -> Tensor:
        """fp64 [K]: s2_c, the mean of ||h - mu_c||^2 (over n_c); 0 where nothing was counted."""
        return self.scatter / self.counts.clamp_min(1)

    @torch.no_grad()
    def add_(self, features: Tensor, labels: Tensor) -> None:
        """Count a batch of representations.

        Args:
            features: [N, D] floating point, any strides and device.
            labels: int64 [N], the class of each row, 0..K-1, or -1: such rows are ignored. Labels
                on the CPU spare a wait for the device.
        Raises:
            ValueError, TypeError: shapes, dtypes or labels are not these.
        """
        labels = self._checked(features, labels)
        rows = (labels >= 0).nonzero().squeeze(1)
        if not rows.numel():
            return
        # Sorted by class: sums over segments repeat their bits, scattered adds on a GPU do not.
        labels, order = labels[rows].sort(stable=True)
        present, lengths = labels.unique_consecutive(return_counts=True)
        home = self.means.device
        picked = features.index_select(0, send(rows[order], features.device)).to(home).double()
        self._merge_at_(send(present, home), _segment_moments(picked, send(lengths, home)))

    def __add__(self, other: ClassMoments) -> ClassMoments:
        """The moments of both sets of tokens. Raises: ValueError for other K or D."""
        if not isinstance(other, ClassMoments):
            return NotImplemented
        if other.means.shape != self.means.shape:
            raise ValueError(
                f"the other moments must be of [K, D] = {list(self.means.shape)}, got "
                f"{list(other.means.shape)}; measure the same classes on the same model"
            )
        home = self.means.device
        total = self._with(_merged(self._parts, [part.to(home) for part in other._parts]))
        total.teams = self.teams or other.teams
        return total

    def of(self, classes: Tensor) -> ClassMoments:
        """The moments of some of the classes, int64 [k] on the moments' device."""
        moments = ClassMoments(len(classes), self.means.shape[1], device=self.means.device)
        parts = [part.index_select(0, classes) for part in self._parts]
        moments.counts, moments.means, moments.scatter = parts
        return moments

    def across_ranks(self) -> ClassMoments:
        """Sum over all ranks into new moments, the same bits on each. All ranks must call it.

        What the ranks of a team counted, counts once.
        """
        ranks = replace(Ranks.current(), teams=self.teams)
        if ranks.size == 1:
            return self._with([part.clone() for part in self._parts])
        own = self.counts * (ranks.rank == ranks.team[0])
        counts, sums = own.clone(), self.means * own.unsqueeze(1)
        ranks.sum_([counts, sums])
        means = sums / counts.clamp_min(1).unsqueeze(1)
        scatter = self.scatter * (ranks.rank == ranks.team[0])
        scatter += own * (self.means - means).square().sum(1)
        ranks.sum_([scatter])
        return self._with([counts, means, scatter])

    @property
    def _parts(self) -> list[Tensor]:
        return [self.counts, self.means, self.scatter]

    def _with(self, parts: Iterable[Tensor]) -> ClassMoments:
        """Moments of this shape that hold `parts`."""
        moments = ClassMoments(*self.means.shape, device=self.means.device)
        moments.counts, moments.means, moments.scatter = parts
        moments.teams = self.teams
        return moments

    def _merge_at_(self, classes: Tensor, added: list[Tensor]) -> None:
        """Merge the moments of `classes` [P] in place: no other row is touched."""
        present = [part.index_select(0, classes) for part in self._parts]
        for part, merged in zip(self._parts, _merged(present, added), strict=True):
            part.index_copy_(0, classes, merged)

    def _checked(self, features: Tensor, labels: Tensor) -> Tensor:
        """The labels on the CPU."""
        num_classes, num_features = self.means.shape
        if features.dim() != 2 or features.shape[1] != num_features:
            raise ValueError(
                f"features must be of shape [N, {num_features}], got {list(features.shape)}; "
                "flatten batch and positions into rows"
            )
        if not features.is_floating_point():
            raise InputTypeError(
                f"features must be floating point, got {features.dtype}; cast them"
            )
        if labels.dtype != torch.int64 or labels.shape != features.shape[:1]:
            raise ValueError(
                f"labels must be int64 [{features.shape[0]}], got {labels.dtype} "
                f"{list(labels.shape)}; give one label for each row of features"
            )
        labels = labels.cpu()
        if labels.numel() and not -1 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise ValueError(
                f"labels must be from -1 to {num_classes - 1}, got values from "
                f"{int(labels.min())} to {int(labels.max())}; label other tokens -1"
            )
        return labels


def _segment_moments(rows: Tensor, lengths: Tensor) -> list[Tensor]:
    """Counts [P], means [P, D] and scatter [P] of consecutive segments of rows [N, D]."""
    counts = lengths.double()
    # unsafe=True leaves out checks that would make the host wait for the device.
    means = torch.segment_reduce(rows, "sum", lengths=lengths, unsafe=True)
    means = means / counts.unsqueeze(1)
    owners = torch.arange(lengths.numel(), device=rows.device)
    owners = owners.repeat_interleave(lengths, output_size=rows.shape[0])
    deviations = (rows - means.index_select(0, owners)).square().sum(1)
    scatter = torch.segment_reduce(deviations, "sum", lengths=lengths, unsafe=True)
    return [counts, means, scatter]


def _merged(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    """The moments of two sets of tokens, from the moments of each."""
    (n_a, mu_a, scatter_a), (n_b, mu_b, scatter_b) = a, b
    n = n_a + n_b
    share = n_b / n.clamp_min(1)
    delta = mu_b - mu_a
    means = mu_a + delta * share.unsqueeze(1)
    return [n, means, scatter_a + scatter_b + delta.square().sum(1) * n_a * share]
