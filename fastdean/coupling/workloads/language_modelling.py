"""Causal and masked language models as a workload: the package's own loss and batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fastdean.coupling.workloads.rank_blocks import Dealing
from fastdean.coupling.workloads.workload import BatchLosses, Pass, Workload
from fastdean.data.batching import Batch, Layout, plan_batches, require_targets
from fastdean.data.example_digests import digest, examples_digest
from fastdean.data.examples import Example, numbered_examples
from fastdean.data.rendering import describe_rendering, rendering_cautions
from fastdean.data.skipped import Skipped
from fastdean.models.batch_size import tokens_per_batch_of
from fastdean.models.exact_layout import exact_layout
from fastdean.models.fitting import fitted, require_positions
from fastdean.models.forward import attention_for, target_logits, target_losses
from fastdean.models.label_shift import label_shift
from fastdean.wording.log import logger

# An excerpt is to show what depends on the length of a text, and to cost next to nothing.
_EXCERPT_TOKENS = 32
_EXCERPT_FROM = 8


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
    of_its_own: ClassVar[tuple[str, str]] = (
        "model",
        "leave it out of target_modules, or load the model in float32",
    )

    @classmethod
    def plan(
        cls,
        model: nn.Module,
        loader: Any,
        *,
        dealing: Dealing,
        tokenizer: Any = None,
        template: str | None = None,
        max_length: int | None = None,
        tokens_per_batch: int | None = None,
        skip_bad_rows: bool = False,
    ) -> LanguageModelling:
        shift = label_shift(model, "pass loss_fn= to define its per-example loss")
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
            row = self.layout.longest_row or 2 * _EXCERPT_TOKENS
            alone_above = self.layout.alone_above or _EXCERPT_TOKENS
            # Half a row, so that the two stand in one.
            most = max(2, min(_EXCERPT_TOKENS, alone_above, row // 2))
            texts = [text.first(most) for text in texts]
            if len(texts) == 2:
                # The second is the shorter one, and not longer than the first.
                apart = self.layout.packed or self.layout.padded
                ends = max(2, 2 * len(texts[0]) // 3) if apart else len(texts[1])
                first = texts[0] if apart else texts[0].first(len(texts[1]))
                texts = [first, texts[1].first(ends)]
        tokens = 2 * sum(map(len, texts))
        # What does not share the first batch is no part of it, nor of `alone`.
        texts = [
            texts[i] for i in _planned(texts, self.shift, tokens, self.layout)[0].example_index
        ]
        batches = _planned(texts, self.shift, tokens, self.layout)
        dealt = [list(range(len(texts)))]
        return replace(self, examples=texts, batches=batches, blocks=[1], dealt=dealt)

    def describe(self) -> dict[str, Any]:
        return {
            "data": {
                "examples": self.num_examples,
                "tokens": sum(len(example) for example in self.examples),
                "target_tokens": sum(example.num_targets(self.shift) for example in self.examples),
                "sha256": examples_digest(
                    digest(e.input_ids, e.labels, columns=e.columns) for e in self.examples
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
