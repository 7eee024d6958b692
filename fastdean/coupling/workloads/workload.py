"""The examples of a `score()` in batches, and what one forward pass over a batch gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class BatchLosses:
    """What one forward pass gave.

    Attributes:
        values: the loss of each example, [B], on the graph that leads back to the model.
        segments: int64 [B, 2] on the CPU, the first token row of each example and the one past its
            last; never changed in place.
        rows: token rows of the batch, padding included.
        examples: the number of each of the B examples, for messages.
        averaged: over how many target tokens each loss is a mean, as far as that is known; else 1.
    """

    values: Tensor
    segments: Tensor
    rows: int
    examples: Sequence[int]
    averaged: Sequence[int]


@dataclass(frozen=True)
class Pass:
    """A batch that is about to go through the model.

    Attributes:
        segments, rows, examples, averaged: as in `BatchLosses`.
        losses: runs the model and returns the losses; may be called again.
    """

    segments: Tensor
    rows: int
    examples: Sequence[int]
    averaged: Sequence[int]
    losses: Callable[[], BatchLosses]


@dataclass
class Workload(ABC):
    """The examples of a `score()` and their losses.

    Attributes:
        batches: of this rank, in the order in which they are scored.
        blocks: of how many batches each block of this rank is, in order; no batch is in two.
        num_examples: on all ranks together.
        examples_here: how many this rank scores.
        of_its_own: for messages, who makes the losses, and what to do if those of an example are
            others beside another one.
    """

    model: nn.Module
    batches: list[Any]
    blocks: list[int]
    num_examples: int
    examples_here: int
    of_its_own: ClassVar[tuple[str, str]]

    @abstractmethod
    def batch(self, number: int, device: torch.device) -> AbstractContextManager[Pass]:
        """A batch of this rank; the model is set up for it inside, backward pass included."""

    @property
    @abstractmethod
    def most_rows(self) -> int:
        """Token rows of the largest batch, padding included."""

    @property
    @abstractmethod
    def most_targets(self) -> int:
        """The most rows of a batch whose logits are made; all rows where that is not known."""

    @property
    @abstractmethod
    def longest(self) -> int:
        """Token rows of the longest example."""

    @property
    @abstractmethod
    def all_rows(self) -> int:
        """Token rows of all batches of this rank, padding included."""

    def losses(self, device: torch.device) -> Generator[BatchLosses, None, None]:
        """Run the model over this rank's batches, one by one; may be called again.

        Work is put on the device's queue, and nothing but the model's own code waits for results.
        The model may carry a hook until the generator is closed.
        """
        for number in range(len(self.batches)):
            with self.batch(number, device) as one:
                # In a call of its own, so that no name here keeps the graph meanwhile.
                yield one.losses()

    def only(self, numbers: Sequence[int]) -> Self:
        """These of its batches, by their place in `batches`, in one block."""
        return replace(self, batches=[self.batches[i] for i in numbers], blocks=[len(numbers)])

    def by_block(self) -> Iterator[Self]:
        """Its blocks, each as a workload of its own."""
        ends = list(accumulate(self.blocks))
        for size, end in zip(self.blocks, ends, strict=True):
            yield self.only(range(end - size, end))

    @abstractmethod
    def alone(self) -> Self:
        """The same with every example in a batch of its own."""

    @abstractmethod
    def excerpt(self, *, whole: bool = False) -> Self:
        """One batch, the same on all ranks, of at least two examples where that is possible.

        Args:
            whole: of whole texts, however long; else of their beginnings, if that is exact.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Examples, loss and batching, for the manifest; `data.sha256` tells examples apart."""
