"""What `score()` runs over: which batches, and the loss of every example in them.

Language models have this package's own loss and batches, any other module the caller's.
"""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastdean.coupling.manifest import examples_digest
from fastdean.data.batching import (
    Batch,
    Layout,
    plan_batches,
    require_targets,
    require_tokens_per_batch,
    send,
)
from fastdean.data.dealing import deal
from fastdean.data.examples import Example, numbered_examples
from fastdean.data.rendering import describe_rendering, rendering_cautions
from fastdean.data.segments import CUMULATIVE_LENGTHS
from fastdean.data.skipped import Skipped
from fastdean.data.token_columns import example_spans
from fastdean.models.distributed import Ranks
from fastdean.models.forward import (
    attention_for,
    exact_layout,
    fitted,
    label_shift,
    require_positions,
    target_logits,
    target_losses,
    tokens_per_batch_of,
)
from fastdean.models.trees import tensors
from fastdean.wording.log import logger

# An excerpt is to show what depends on the length of a text, and to cost next to nothing.
_EXCERPT_TOKENS = 32
_EXCERPT_FROM = 8

# Of a job whose bits are to be the same on 1, 2, 4, 8 and 16 ranks.
_BLOCKS = 16

LossFunction = Callable[[Any, Mapping[str, Any]], Tensor]


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
    """

    model: nn.Module
    batches: list[Any]
    blocks: list[int]
    num_examples: int
    examples_here: int

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


def plan_workload(
    model: nn.Module,
    loader: Any,
    *,
    ranks: Ranks,
    loss_fn: LossFunction | None = None,
    skip_bad_rows: bool = False,
    deterministic: bool = False,
    **options: Any,
) -> Workload:
    """Read the loader and split its examples over the ranks; arguments as `score` takes them.

    Examples (of a `loss_fn` whole batches) are dealt into blocks of about as many tokens, one for
    each rank, and batches are made of a block's examples alone. With `deterministic` there are 16
    blocks on any number of ranks that divides 16, and a rank has as many as every other.

    Raises:
        ValueError, TypeError: as `score` does for its loader.
    """
    with ranks.running_together():
        # Before the loader is read.
        if options.get("tokens_per_batch") is not None:
            require_tokens_per_batch(options["tokens_per_batch"])
        work: Workload
        dealing = _Dealing(ranks, blocks_of_a_rank(ranks, deterministic))
        if loss_fn is None:
            options |= {"dealing": dealing, "skip_bad_rows": skip_bad_rows}
            work = LanguageModelling.plan(model, loader, **options)
        elif skip_bad_rows:
            raise ValueError(
                "skip_bad_rows must be left out with loss_fn, whose batches are scored as they "
                "come, got True; leave bad rows out of the batches"
            )
        else:
            work = CustomLoss.plan(model, loader, loss_fn, dealing)
    _require_same_examples(work, ranks)
    return work


def blocks_of_a_rank(ranks: Ranks, deterministic: bool) -> int:
    """Of how many blocks each rank makes the sums."""
    return _BLOCKS // ranks.shares if deterministic and _BLOCKS % ranks.shares == 0 else 1


def _require_same_examples(work: Workload, ranks: Ranks) -> None:
    """Refuse loaders that already shard: most examples would never be scored."""
    digest = work.describe()["data"]["sha256"] if ranks.size > 1 else "0"
    if not ranks.hold_the_same(int(digest[:15], 16)):
        raise ValueError(
            "loader must give every rank the same examples, got different ones; leave out the "
            "distributed sampler, score() splits the examples itself"
        )


@dataclass(frozen=True)
class _Dealing:
    """Into how many blocks a workload is dealt, and which of them are this rank's."""

    ranks: Ranks
    blocks_of_a_rank: int

    def own(self, costs: Sequence[int]) -> list[list[int]]:
        """The numbers of the items in each of this rank's blocks."""
        each = self.blocks_of_a_rank
        dealt = deal(costs, each * self.ranks.shares)
        return dealt[self.ranks.share * each :][:each]


@dataclass
class LanguageModelling(Workload):
    """Causal and masked language models: our own loss, our own batches.

    Attributes:
        examples: of all ranks; `numbers`: their numbers in the loader, for messages.
        dealt: places in `examples` of those in each of this rank's blocks.
        tokenizer: that texts became tokens with; None where none was given.
    """

    examples: list[Example]
    numbers: list[int]
    shift: int
    layout: Layout
    tokens_per_batch: int
    dealt: list[list[int]]
    rendering: dict[str, Any]
    tokenizer: Any = None

    @classmethod
    def plan(
        cls,
        model: nn.Module,
        loader: Any,
        *,
        dealing: _Dealing,
        tokenizer: Any = None,
        template: str | None = None,
        max_length: int | None = None,
        tokens_per_batch: int | None = None,
        skip_bad_rows: bool = False,
    ) -> LanguageModelling:
        shift = label_shift(model)
        skipped = Skipped() if skip_bad_rows else None
        reading = {"tokenizer": tokenizer, "template": template, "max_length": max_length}
        numbered = numbered_examples(loader, **reading, skipped=skipped)
        if skipped is not None:
            numbered = _usable(model, numbered, shift, skipped)
        numbers = [number for number, _ in numbered]
        examples = fitted(model, [example for _, example in numbered])
        require_positions(model, examples)
        # On all examples, so that a bad one is refused under its own number on every rank alike.
        require_targets(examples, shift)
        rendering = describe_rendering(examples, tokenizer, template)
        first = dealing.ranks.first
        if tokenizer is not None and first:
            for caution in rendering_cautions(examples, numbers, tokenizer, "loader", template):
                logger.warning("%s", caution)
        if skipped is not None:
            rendering |= skipped.described()
            if first:
                skipped.warn("loader")
        if tokens_per_batch is None:
            tokens_per_batch = tokens_per_batch_of(model)
        dealt = dealing.own([len(example) for example in examples])
        layout = exact_layout(model, examples)
        batches, blocks = _planned_by_block(examples, dealt, shift, tokens_per_batch, layout)
        return cls(
            model=model,
            batches=batches,
            blocks=blocks,
            num_examples=len(examples),
            examples_here=sum(map(len, dealt)),
            examples=examples,
            numbers=numbers,
            shift=shift,
            layout=layout,
            tokens_per_batch=tokens_per_batch,
            dealt=dealt,
            rendering=rendering,
            tokenizer=tokenizer,
        )

    @contextmanager
    def batch(self, number: int, device: torch.device) -> Iterator[Pass]:
        batch = self.batches[number].to(device)
        # Until the caller is through with the backward pass, which may run layers again
        # (activation checkpointing).
        with target_logits(self.model) as logits_at, attention_for(self.model, batch):
            rows = batch.input_ids.numel()
            members = batch.example_index
            examples = [self.numbers[i] for i in members]
            averaged = [self.examples[i].num_targets(self.shift) for i in members]

            def losses() -> BatchLosses:
                values = self._losses_of(batch, logits_at)
                return BatchLosses(values, batch.segments, rows, examples, averaged)

            yield Pass(batch.segments, rows, examples, averaged, losses)

    @property
    def most_rows(self) -> int:
        return max((batch.input_ids.numel() for batch in self.batches), default=0)

    @property
    def most_targets(self) -> int:
        return max((batch.target_rows.numel() for batch in self.batches), default=0)

    @property
    def longest(self) -> int:
        return max((len(self.examples[i]) for block in self.dealt for i in block), default=0)

    @property
    def all_rows(self) -> int:
        return sum(batch.input_ids.numel() for batch in self.batches)

    def _losses_of(self, batch: Batch, logits_at: Callable[[Batch], Tensor]) -> Tensor:
        per_token = target_losses(logits_at(batch), batch)
        owner = batch.target_example.to(per_token.device)
        totals = per_token.new_zeros(batch.num_examples).index_add(0, owner, per_token)
        return totals / batch.target_counts.to(per_token.device)

    def alone(self) -> Self:
        layout = replace(self.layout, padded=self.layout.packed)
        batches, blocks = _planned_by_block(self.examples, self.dealt, self.shift, 1, layout)
        return replace(self, batches=batches, blocks=blocks)

    def excerpt(self, *, whole: bool = False) -> Self:
        """Two examples with every token a target; of two lengths if that is exact."""
        longest = sorted(self.examples[:_EXCERPT_FROM], key=len)[:-3:-1]
        texts = [example.predicting_itself() for example in longest]
        if not whole:
            most = max(2, min(_EXCERPT_TOKENS, self.layout.alone_above or _EXCERPT_TOKENS))
            texts = [text.first(most) for text in texts]
            if len(texts) == 2:
                # The second is the shorter one, and not longer than the first.
                apart = self.layout.packed or self.layout.padded
                ends = max(2, 2 * len(texts[0]) // 3) if apart else len(texts[1])
                first = texts[0] if apart else texts[0].first(len(texts[1]))
                texts = [first, texts[1].first(ends)]
        batches = _planned(texts, self.shift, sum(map(len, texts)) * 2, self.layout)
        dealt = [list(range(len(texts)))]
        return replace(self, examples=texts, batches=batches[:1], blocks=[1], dealt=dealt)

    def describe(self) -> dict[str, Any]:
        return {
            "data": {
                "examples": self.num_examples,
                "tokens": sum(len(example) for example in self.examples),
                "target_tokens": sum(example.num_targets(self.shift) for example in self.examples),
                "sha256": examples_digest(
                    _digest(e.input_ids, e.labels, columns=e.columns) for e in self.examples
                ),
                **self.rendering,
            },
            "loss": "cross-entropy in nats, mean over an example's target tokens",
            "label_shift": self.shift,
            "batching": {**vars(self.layout), "tokens_per_batch": self.tokens_per_batch},
        }


def _planned(
    examples: Sequence[Example], shift: int, tokens_per_batch: int, layout: Layout
) -> list[Batch]:
    return plan_batches(examples, shift=shift, tokens_per_batch=tokens_per_batch, **vars(layout))


def _planned_by_block(
    examples: Sequence[Example],
    dealt: Sequence[Sequence[int]],
    shift: int,
    tokens_per_batch: int,
    layout: Layout,
) -> tuple[list[Batch], list[int]]:
    """The batches of all blocks, with places in `examples`, and how many each block has."""
    batches, blocks = [], []
    for members in dealt:
        of_block = _planned([examples[i] for i in members], shift, tokens_per_batch, layout)
        for batch in of_block:
            places = [members[i] for i in batch.example_index]
            batches.append(replace(batch, example_index=places))
        blocks.append(len(of_block))
    return batches, blocks


def _usable(
    model: nn.Module, numbered: Sequence[tuple[int, Example]], shift: int, skipped: Skipped
) -> list[tuple[int, Example]]:
    """The examples that have a target for this model and no more tokens than its positions."""
    found = []
    for number, example in numbered:
        try:
            require_positions(model, [example], first=number)
            require_targets([example], shift, first=number)
        except ValueError as error:
            skipped.rows[number] = str(error)
        else:
            found.append((number, example))
    if not found:
        reason = next(iter(skipped.rows.values()))
        raise ValueError(f"loader must yield at least one example that can be used, got: {reason}")
    return found


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

    @classmethod
    def plan(
        cls, model: nn.Module, loader: Any, loss_fn: LossFunction, dealing: _Dealing
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
            digest=examples_digest(_digest_of_batch(batch) for batch in batches),
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


def _digest_of_batch(batch: Mapping[str, Any]) -> bytes:
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    return _digest(tensors.pop("input_ids"), columns=tensors)


def _digest(*tensors: Tensor, columns: Mapping[str, Tensor] | None = None) -> bytes:
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(_bytes_of(tensor))
    for name, tensor in sorted((columns or {}).items()):
        content.update(name.encode() + _bytes_of(tensor))
    return content.digest()


def _bytes_of(tensor: Tensor) -> bytes:
    # By bytes: NumPy knows no bfloat16.
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
