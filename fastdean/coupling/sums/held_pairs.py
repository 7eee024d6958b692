"""Inputs and gradients of a window, kept until its end in place of sums (`holding.py` says when).

Rows are copied as they are delivered: what the model does with its tensors afterwards changes
nothing, and the operation at the end needs the rows of all batches in one tensor anyway. Whatever
was not foreseen (another dtype, more rows, another input than the trial saw) turns the pairs of a
target into its sums, with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fastdean.coupling.results.score_entry import ScoreEntry, fingerprint, values_at
from fastdean.coupling.sums.accumulators import Accumulator, DenseWeightAccumulator
from fastdean.coupling.sums.holding import Holding
from fastdean.coupling.sums.signed_sums import joined
from fastdean.coupling.targets.target import Target
from fastdean.models.model_state import execution_device
from fastdean.ops.importance_selection import select_importance

Span = tuple[int, int]


class Rows:
    """Rows of all batches, one below the other, [T, width] of which `count` are filled."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._buffer: Tensor | None = None
        self.count = 0

    def fits(self, rows: Tensor, number: int) -> bool:
        """Whether so many rows, like these, can be appended."""
        like = self._buffer
        same = like is None or (rows.dtype, rows.device, rows.shape[1]) == (
            like.dtype,
            like.device,
            like.shape[1],
        )
        return same and self.count + number <= self._tokens

    def append(self, rows: Tensor, spans: Sequence[Span]) -> None:
        if self._buffer is None:
            self._buffer = rows.new_empty((self._tokens, rows.shape[1]))
        for start, end in spans:
            self._buffer[self.count : self.count + end - start] = rows[start:end]
            self.count += end - start

    def equal(self, first: int, rows: Tensor, spans: Sequence[Span]) -> bool:
        """Whether the rows from `first` on are these."""
        for start, end in spans:
            if not torch.equal(self.between(first, first + end - start), rows[start:end]):
                return False
            first += end - start
        return True

    def between(self, first: int, end: int) -> Tensor:
        assert self._buffer is not None  # Something was appended.
        return self._buffer[first:end]


class SharedInputs:
    """The inputs of all targets that are given the same tensor, held once."""

    def __init__(self, tokens: int) -> None:
        self.rows = Rows(tokens)
        self._starts: list[int] = []

    def take(self, batch: int, x: Tensor, spans: Sequence[Span], number: int) -> bool:
        """Take a batch's rows from the first target that has them.

        Returns:
            False if they cannot be taken, or another target had others.
        """
        if batch < len(self._starts):
            start = self._starts[batch]
            fits = x.dtype == self.rows.between(0, 1).dtype and start + number <= self.rows.count
            return fits and self.rows.equal(start, x, spans)
        if batch > len(self._starts) or not self.rows.fits(x, number):
            return False
        self._starts.append(self.rows.count)
        self.rows.append(x, spans)
        return True


class HeldPairs:
    """The pairs of one target; at the end its top entries.

    Args:
        inputs: of this target and of those that share them.
        tokens, num_examples: of all batches together.
        k: how many entries are kept at most.
        new_sums: makes sums for a target that is not held after all.
        signs: keep signed sums too.
    """

    def __init__(
        self,
        target: Target,
        inputs: SharedInputs,
        tokens: int,
        num_examples: int,
        k: int,
        new_sums: Callable[[], DenseWeightAccumulator],
        impl: str | None,
        signs: bool,
    ) -> None:
        self._transposed, self._impl, self._signs = target.transposed, impl, signs
        self._inputs: SharedInputs | None = inputs
        self._gradients = Rows(tokens)
        # Of each batch, in its own rows of those that are held.
        self._segments: list[Tensor] = []
        self._num_examples, self._k, self._new_sums = num_examples, k, new_sums
        self._sums: DenseWeightAccumulator | None = None
        # Of what is held; sums are multiplied themselves.
        self._factor = 1.0

    def add_(self, x: Tensor, g: Tensor, segments: Tensor) -> None:
        if self._sums is None and self._take(x, g, segments):
            return
        self._summed().add_(x, g, segments)

    def tensors(self) -> list[Tensor]:
        """None while pairs are held, which they are in a process of its own alone."""
        return [] if self._sums is None else self._sums.tensors()

    def multiply_(self, factor: float) -> None:
        if self._sums is None:
            self._factor *= factor
        else:
            self._sums.multiply_(factor)

    def entry(self, weight: Tensor) -> ScoreEntry:
        """Of the top entries; of all where the pairs are not held.

        Raises:
            ValueError: an importance is NaN or infinite.
        """
        if self._sums is not None or not self._can_select(weight):
            return self._summed().entry(weight)
        weight = weight.detach()
        x, g, segments, batches = self._everything()
        if self._transposed:
            x, g = g, x
        sets = torch.zeros_like(batches)
        index, sums, signed = selected(
            x, g, segments, sets, weight, self._k, batches, self._impl, self._signs
        )
        self._forget()
        return ScoreEntry(
            sums=sums * self._factor,
            weight=values_at(weight, index),
            index=index,
            shape=tuple(weight.shape),
            unit_axis=None,
            fingerprint=fingerprint(weight),
            signed=None if signed is None else signed * self._factor,
        )

    def _take(self, x: Tensor, g: Tensor, segments: Tensor) -> bool:
        assert self._inputs is not None  # Let go of with the sums.
        spans = joined(segments)
        number = sum(end - start for start, end in spans)
        if not self._gradients.fits(g, number):
            return False
        if not self._inputs.take(len(self._segments), x, spans, number):
            return False
        first = self._gradients.count
        self._gradients.append(g, spans)
        lengths = segments[:, 1] - segments[:, 0]
        ends = first + lengths.cumsum(0)
        self._segments.append(torch.stack([ends - lengths, ends], dim=1))
        return True

    def _can_select(self, weight: Tensor) -> bool:
        """Whether what is held is all of the data set, beside its weight."""
        if sum(map(len, self._segments)) != self._num_examples:
            return False
        return weight.device == self._gradients.between(0, 1).device

    def _everything(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """X, G, the rows of each example and the batch of each, as they were delivered."""
        assert self._inputs is not None
        count = self._gradients.count
        numbers = [
            torch.full((len(each),), b, dtype=torch.int64, device="cpu")
            for b, each in enumerate(self._segments)
        ]
        return (
            self._inputs.rows.between(0, count),
            self._gradients.between(0, count),
            torch.cat(self._segments),
            torch.cat(numbers),
        )

    def _summed(self) -> DenseWeightAccumulator:
        """The sums of what came so far; from now on they are added to."""
        if self._sums is None:
            self._sums = self._new_sums()
            if self._segments:
                x, g, *_ = self._everything()
                for segments in self._segments:
                    self._sums.add_(x, g, segments)
                self._sums.multiply_(self._factor)
            self._forget()
        return self._sums

    def _forget(self) -> None:
        self._inputs, self._segments = None, []
        self._gradients = Rows(0)


def held_pairs(
    holding: Holding | None, targets: Sequence[Target], device: torch.device, impl: str | None
) -> dict[str, Accumulator]:
    """Accumulators for those of a window's targets that are held, by parameter name."""
    if holding is None:
        return {}
    inputs: dict[int, SharedInputs] = {}
    held = holding.held(targets)
    found: dict[str, Accumulator] = {}
    for target in targets:
        if target.parameter in held:
            source = holding.pairs[target.parameter].source
            where = execution_device(target.module, device)
            if source not in inputs:
                inputs[source] = SharedInputs(holding.tokens)
            found[target.parameter] = HeldPairs(
                target,
                inputs[source],
                holding.tokens,
                holding.num_examples,
                holding.count(target),
                partial(DenseWeightAccumulator, target, where, impl, holding.signs),
                impl,
                holding.signs,
            )
    return found


def selected(
    x: Tensor,
    g: Tensor,
    segments: Tensor,
    sets: Tensor,
    weight: Tensor,
    k: int,
    batches: Tensor,
    impl: str | None,
    signs: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Index, sums and, with `signs`, signed sums of the top k entries of one set."""
    ((index, sums, *signed),) = select_importance(
        x, g, segments, sets, weight, [k], batches=batches, signed=signs, impl=impl
    )
    return index, sums, signed[0] if signs else None
