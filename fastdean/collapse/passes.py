"""The passes over text that measure neural collapse: class moments first, then held-out tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fastdean.collapse.classes import CollapseClasses
from fastdean.collapse.labels import Shift, default_shift, position_labels
from fastdean.collapse.metrics import CollapseMetrics, NearestMean, count_nearest
from fastdean.collapse.moments import ClassMoments
from fastdean.collapse.output_embedding import check_width, measured_weight
from fastdean.collapse.representations import Features, Representations
from fastdean.collapse.shared_passes import SharedPasses
from fastdean.data.batching import Batch, send
from fastdean.data.examples import Example, read_examples
from fastdean.default_device import cpu_by_default
from fastdean.models.calling import call
from fastdean.models.forward import attention_for, prepare_batches
from fastdean.models.model_state import (
    eager,
    evaluation_state,
    input_device,
    max_tokens,
    unwrap,
)
from fastdean.models.ranks.shards import whole_features
from fastdean.wording.doing import titled


@cpu_by_default
def collapse_metrics(
    model: nn.Module,
    loader: Any,
    classes: CollapseClasses,
    *,
    held_out: Any = None,
    shift: Shift | None = None,
    features: Features = "base",
    tokenizer: Any = None,
    tokens_per_batch: int | None = None,
    progress: bool = True,
) -> CollapseMetrics:
    """Measure how far the representations of chosen words have collapsed, in one pass over text.

    Every token of a class counts, in prompts too. In a job of several processes each gives its own
    part of the text and merges:

        metrics = collapse_metrics(model, my_part, classes).across_ranks()
        nearest = nearest_mean_agreement(model, my_held_out_part, classes, metrics).across_ranks()
        metrics = metrics.with_nearest(nearest)

    So too where FSDP2 shards the model; all ranks must then call it. The ranks over which tensor
    parallel splits one must be given the same part, which counts once.

    Args:
        model: a causal or masked language model of transformers, in any dtype, also inside PEFT;
            run without dropout and left in its mode. A compiled one is run uncompiled. One that
            FSDP2 shards is left with all of its weights sharded.
        loader: batches as for `fastdean.score`, whose labels may be left out, `Example`s, or, with
            `tokenizer`, rows of text. A masked model sees the text unmasked; where labels hold
            what a mask token hides, that counts.
        classes: K classes of the model's tokenizer.
        held_out: other text, for NC4; None: not measured.
        shift: which token a representation stands for, see `position_labels`; None: by the model.
        features: "base" (published) or "head", see `Representations`.
        tokenizer: for rows of text.
        tokens_per_batch: a bound for memory; the result does not depend on it.
    Raises:
        ValueError, TypeError: a loader, model or option that does not fit, or representations that
            are not finite.
    Source:
        Collapsed language models promote fairness (arXiv 2410.04472).
    """
    if held_out is not None and held_out is loader:
        raise ValueError(
            "held_out must be other text than loader, got the same object; NC4 on the text of the "
            "class means says little"
        )
    passes = _Passes(model, classes, shift, features, tokenizer, tokens_per_batch, progress)
    weight = classes.rows(measured_weight(model)).clone()
    # MPS knows no fp64.
    home = torch.device("cpu") if weight.device.type == "mps" else weight.device
    moments = ClassMoments(*weight.shape, device=home)
    moments.teams = passes.shared.ranks.teams

    def count(rows: Tensor, labels: Tensor) -> None:
        check_width(rows, weight, features)
        moments.add_(rows, labels)

    passes.each_batch(loader, count, "class means")
    metrics = CollapseMetrics(moments, weight)
    if held_out is None:
        return metrics
    return metrics.with_nearest(_nearest(passes, held_out, metrics))


@cpu_by_default
def nearest_mean_agreement(
    model: nn.Module,
    held_out: Any,
    classes: CollapseClasses,
    metrics: CollapseMetrics,
    *,
    shift: Shift | None = None,
    features: Features = "base",
    tokenizer: Any = None,
    tokens_per_batch: int | None = None,
    progress: bool = True,
) -> NearestMean:
    """NC4 by itself: `held_out` counted against the class means of `metrics`, in one pass.

    For means that were merged first. Arguments and errors are those of `collapse_metrics`; give
    the ones that `metrics` was measured with.
    """
    if len(classes) != len(metrics.weight):
        raise ValueError(
            f"classes must be those of metrics, {len(metrics.weight)} classes, got {len(classes)}; "
            "measure and count the same ones"
        )
    passes = _Passes(model, classes, shift, features, tokenizer, tokens_per_batch, progress)
    return _nearest(passes, held_out, metrics)


def _nearest(passes: _Passes, held_out: Any, metrics: CollapseMetrics) -> NearestMean:
    moments = metrics.moments
    seen = (moments.counts > 0).cpu()
    home = moments.means.device
    means = moments.means[seen.to(home)]
    weight = metrics.weight.to(home)[seen.to(home)].double()
    agreeing = torch.zeros((), dtype=torch.int64, device=home)
    tokens = left_out = 0

    def count(features: Tensor, labels: Tensor) -> None:
        nonlocal tokens, left_out
        kept = seen[labels]
        tokens += int(kept.sum())
        left_out += int((~kept).sum())
        if kept.any():
            rows = send(kept.nonzero().squeeze(1), features.device)
            agreeing.add_(count_nearest(features.index_select(0, rows).to(home), means, weight))

    passes.each_batch(held_out, count, "held-out tokens")
    return NearestMean(int(agreeing), tokens, left_out, teams=passes.shared.ranks.teams)


@dataclass(frozen=True)
class _Passes:
    """Passes of one model with the same options."""

    model: nn.Module
    classes: CollapseClasses
    shift: Shift | None
    features: Features
    tokenizer: Any
    tokens_per_batch: int | None
    progress: bool

    @cached_property
    def shared(self) -> SharedPasses:
        return SharedPasses(unwrap(self.model))

    @torch.no_grad()
    def each_batch(self, loader: Any, count: Callable[[Tensor, Tensor], None], title: str) -> None:
        """`count(features [n, D], labels [n] on the CPU)` for each batch's tokens of a class."""
        from tqdm.auto import tqdm

        model, shared = unwrap(self.model), self.shared
        last = Representations(model, features=self.features, skip_logits=True)
        with shared.entered():
            examples, labels = self._labelled_examples(model, loader)
            with (
                eager(),
                evaluation_state(model),
                tqdm(
                    total=len(examples), desc=titled(title), unit="ex", disable=not self.progress
                ) as bar,
            ):
                # Nothing is predicted: only the segments are used.
                examples = [example.predicting_itself() for example in examples]
                with shared.planning(examples):
                    batches = prepare_batches(
                        model,
                        examples,
                        tokens_per_batch=self.tokens_per_batch,
                        shift=0,
                        measured_on=shared.measured_on,
                    )
                device = input_device(model)
                with last:
                    for batch in shared.each(batches):
                        if batch is None:
                            with shared.one():
                                call(model, {"input_ids": torch.zeros(1, 1).long().to(device)})
                            last.clear()
                            continue
                        rows, classes = _labelled_rows(batch, labels)
                        with shared.one(), attention_for(model, batch):
                            call(model, batch.to(device).model_inputs())
                        features = whole_features(last.features).flatten(0, 1)
                        count(features.index_select(0, send(rows, features.device)), classes)
                        last.clear()
                        bar.update(batch.num_examples)

    def _labelled_examples(
        self, model: nn.Module, loader: Any
    ) -> tuple[list[Example], list[Tensor]]:
        """The examples with a token of a class, and the class at each of their positions."""
        shift = default_shift(model) if self.shift is None else self.shift
        longest = max_tokens(model)
        examples, labels = [], []
        text = read_examples(loader, tokenizer=self.tokenizer, require_labels=False)
        for number, example in enumerate(text):
            if longest is not None and len(example) > longest:
                raise ValueError(
                    f"example {number} must have at most {longest} tokens (the model's positions), "
                    f"got {len(example)}; cut it with max_length of fastdean.data.read_examples"
                )
            found = position_labels(
                self.classes,
                example.input_ids.unsqueeze(0),
                labels=example.labels.unsqueeze(0),
                shift=shift,
            ).squeeze(0)
            if (found >= 0).any():
                examples.append(example)
                labels.append(found)
        return examples, labels


def _labelled_rows(batch: Batch, labels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Flattened rows [n] of the batch's tokens of a class, and those classes; on the CPU."""
    found = [labels[i] for i in batch.example_index]
    starts = batch.segments[:, 0].tolist()
    rows = [
        torch.arange(start, start + len(each)) for start, each in zip(starts, found, strict=True)
    ]
    joined = torch.cat(found)
    kept = joined >= 0
    return torch.cat(rows)[kept], joined[kept]
