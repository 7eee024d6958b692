"""Any other model as a workload: the caller's batches and the caller's per-example losses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fastdean.coupling.workloads.rank_blocks import Dealing
from fastdean.coupling.workloads.workload import BatchLosses, Pass, Workload
from fastdean.data.batching import send
from fastdean.data.example_digests import digest_of_batch, examples_digest
from fastdean.data.segments import CUMULATIVE_LENGTHS
from fastdean.data.token_columns import example_spans
from fastdean.models.trees import tensors

LossFunction = Callable[[Any, Mapping[str, Any]], Tensor]


@dataclass
class CustomLoss(Workload):
    """Any other model: the caller's batches, the caller's per-example losses.

    Attributes:
        first: the batch that is tried.
        firsts: the number of each batch's first example in the loader.
    """

    loss_fn: LossFunction
    digest: str
    first: Mapping[str, Any]
    firsts: list[int]
    of_its_own: ClassVar[tuple[str, str]] = ("loss_fn", "pass batches of one example")

    @classmethod
    def plan(
        cls, model: nn.Module, loader: Any, loss_fn: LossFunction, dealing: Dealing
    ) -> CustomLoss:
        batches = [loader] if isinstance(loader, Mapping) else list(loader)
        for position, batch in enumerate(batches):
            _require_batch(batch, position)
            _require_one_example_a_row(batch, position)
        if not batches:
            raise ValueError(
                "loader must yield at least one batch, got none; check the source and its filter"
            )
        sizes = [batch["input_ids"].shape[0] for batch in batches]
        # Rows of one example tell nothing about the order of rows, and short ones little: what
        # works in windows or chunks leaves texts shorter than one as they are.
        first = max(batches, key=lambda batch: _shows_order(*batch["input_ids"].shape))
        dealt = dealing.own([batch["input_ids"].numel() for batch in batches])
        here = [i for block in dealt for i in block]
        firsts = list(accumulate(sizes, initial=0))
        return cls(
            model=model,
            batches=[batches[i] for i in here],
            blocks=[len(block) for block in dealt],
            num_examples=sum(sizes),
            examples_here=sum(sizes[i] for i in here),
            firsts=[firsts[i] for i in here],
            loss_fn=loss_fn,
            digest=examples_digest(digest_of_batch(batch) for batch in batches),
            first=first,
        )

    @contextmanager
    def batch(self, number: int, device: torch.device) -> Iterator[Pass]:
        given = self.batches[number].items()
        batch = {k: send(v, device) if isinstance(v, Tensor) else v for k, v in given}
        size, width = batch["input_ids"].shape
        starts = torch.arange(size) * width
        segments = torch.stack([starts, starts + width], dim=1)
        numbers = range(self.firsts[number], self.firsts[number] + size)
        averaged = [1] * size

        def losses() -> BatchLosses:
            values = self._losses_of(batch)
            return BatchLosses(values, segments, size * width, numbers, averaged)

        yield Pass(segments, size * width, numbers, averaged, losses)

    @property
    def most_rows(self) -> int:
        return max((batch["input_ids"].numel() for batch in self.batches), default=0)

    @property
    def most_targets(self) -> int:
        return self.most_rows

    @property
    def longest(self) -> int:
        return max((batch["input_ids"].shape[1] for batch in self.batches), default=0)

    @property
    def all_rows(self) -> int:
        return sum(batch["input_ids"].numel() for batch in self.batches)

    @cached_property
    def _accepted(self) -> Callable[[str], bool]:
        return _accepted_inputs(self.model)

    def _losses_of(self, batch: Mapping[str, Any]) -> Tensor:
        inputs = {k: v for k, v in batch.items() if k != "labels" and self._accepted(k)}
        outputs = self.model(**inputs)
        losses = self.loss_fn(outputs, batch)
        size = len(batch["input_ids"])
        if not isinstance(losses, Tensor) or tuple(losses.shape) != (size,):
            got = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"loss_fn must return one loss per example, [{size}], got {got}; "
                "reduce over tokens only"
            )
        if torch.is_grad_enabled() and not losses.requires_grad and _carry_gradient(outputs):
            raise ValueError(
                "loss_fn must return losses that depend on the model with gradient, got losses "
                "without one; compute them from its outputs, not detached, nor under no_grad, nor "
                "through numbers that autograd does not follow"
            )
        return losses

    def alone(self) -> Self:
        sizes = [len(batch["input_ids"]) for batch in self.batches]
        ends = list(accumulate(self.blocks, initial=0))
        return replace(
            self,
            batches=[row for batch in self.batches for row in _rows(batch)],
            blocks=[sum(sizes[first:end]) for first, end in pairwise(ends)],
            firsts=[
                first + row
                for first, size in zip(self.firsts, sizes, strict=True)
                for row in range(size)
            ],
        )

    def only(self, numbers: Sequence[int]) -> Self:
        firsts = [self.firsts[i] for i in numbers]
        return replace(super().only(numbers), firsts=firsts)

    def excerpt(self, *, whole: bool = False) -> Self:
        return replace(self, batches=[self.first], blocks=[1], firsts=[0])

    def describe(self) -> dict[str, Any]:
        return {
            "data": {"examples": self.num_examples, "sha256": self.digest},
            "loss": "loss_fn of the caller",
        }


def _shows_order(examples: int, width: int) -> tuple[bool, int, int]:
    return examples > 1, width, examples


def _carry_gradient(outputs: Any) -> bool:
    """Whether what a model returned leads back to it."""
    known = isinstance(outputs, Tensor | Mapping | tuple | list)
    parts = outputs if known else getattr(outputs, "__dict__", {})
    return any(part.requires_grad for _, part in tensors(parts))


def _rows(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A batch of B examples as B batches: whatever has B entries is taken apart."""
    size = batch["input_ids"].shape[0]

    def part(value: Any, row: int) -> Any:
        shared = not isinstance(value, Tensor | list | tuple) or getattr(value, "ndim", 1) == 0
        return value if shared or len(value) != size else value[row : row + 1]

    return [{key: part(value, row) for key, value in batch.items()} for row in range(size)]


def _require_batch(batch: Any, position: int) -> None:
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        got = type(batch).__name__ if ids is None else getattr(ids, "shape", type(ids).__name__)
        raise ValueError(
            "loader must yield dictionaries with a tensor input_ids [B, T] when loss_fn is given, "
            f"got {got} at item {position}; collate the batches as the model takes them"
        )


def _require_one_example_a_row(batch: Mapping[str, Any], position: int) -> None:
    """Refuse rows of several examples: their gradients add up before the absolute value."""
    ids = batch["input_ids"]
    dividing = {"attention_mask": len(ids), "seq_idx": len(ids), "position_ids": 1}
    columns = {
        key: batch[key]
        for key, rows in dividing.items()
        if _numbers_each_token(batch.get(key), ids, rows)
    }
    columns |= {key: batch[key] for key in CUMULATIVE_LENGTHS if batch.get(key) is not None}
    for spans in example_spans(columns, [ids.shape[1]] * len(ids), position):
        if len(spans) > 1:
            raise ValueError(
                "loader must yield one example in each row when loss_fn is given, got a row of "
                f"{len(spans)} at item {position} (by {', '.join(columns)}); collate the examples "
                "with padding"
            )


def _numbers_each_token(column: Any, ids: Tensor, rows: int) -> bool:
    """Whether a column has a whole number, 0 or above, for each token of one or of `rows` rows."""
    return (
        isinstance(column, Tensor)
        and list(column.shape) in ([rows, ids.shape[1]], list(ids.shape))
        and not column.is_floating_point()
        and not column.is_complex()
        and not bool((column < 0).any())
    )


def _accepted_inputs(model: nn.Module) -> Callable[[str], bool]:
    """Which entries of a batch the model's forward names; all of them where it names none."""
    parameters = inspect.signature(model.forward).parameters
    if "input_ids" in parameters:
        return parameters.__contains__
    return lambda name: True
