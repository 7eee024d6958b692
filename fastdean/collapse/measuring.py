"""The passes over text that measure neural collapse: class moments first, then held-out tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdean.collapse.classes import CollapseClasses
from fastdean.collapse.labels import Shift, default_shift, position_labels
from fastdean.collapse.metrics import CollapseMetrics, NearestMean, count_nearest
from fastdean.collapse.moments import ClassMoments
from fastdean.collapse.representations import Features, Representations, output_embedding
from fastdean.data.batching import Batch, send
from fastdean.data.examples import Example, read_examples
from fastdean.models.calling import call
from fastdean.models.forward import attention_for, prepare_batches
from fastdean.models.model_state import (
    eager,
    evaluation_state,
    input_device,
    materialised_weight,
    max_tokens,
    unwrap,
)
from fastdean.wording.doing import titled


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
    """How far the representations of chosen words have collapsed, in one pass over a text.

    Every token of the text counts that is of a class, prompts too. In a job of several processes
    each gives its own part of the text and merges:

        metrics = collapse_metrics(model, my_part, classes).across_ranks()
        nearest = nearest_mean_agreement(model, my_held_out_part, classes, metrics).across_ranks()
        metrics = metrics.with_nearest(nearest)

    Args:
        model: a causal or masked language model of transformers, in any dtype, also inside PEFT;
            run without dropout and left in its mode. A compiled one is run as it was before.
        loader: batches as for `fastdean.score`, whose labels may be left out, `Example`s, or, with
            `tokenizer`, rows of text. A masked model sees the text as it is; where labels hold what
            a mask token hides, that counts.
        classes: K classes of the model's tokenizer.
        held_out: other text of the same kinds, for NC4; None: not measured.
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
    weight = _class_weight(model, classes)
    moments = ClassMoments(*weight.shape, device=_home(weight))

    def count(states: Tensor, labels: Tensor) -> None:
        _require_width(states, weight, features)
        moments.add_(states, labels)

    reading = _Reading(classes, shift, features, tokenizer, tokens_per_batch, progress)
    reading.each_batch(model, loader, count, "class means")
    metrics = CollapseMetrics(moments, weight)
    if held_out is None:
        return metrics
    return metrics.with_nearest(_nearest(model, held_out, metrics, reading))


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

    For means that were merged first. Arguments and errors are those of `collapse_metrics`, and
    should be the ones `metrics` was measured with.
    """
    if len(classes) != len(metrics.weight):
        raise ValueError(
            f"classes must be those of metrics, {len(metrics.weight)} classes, got {len(classes)}; "
            "measure and count the same ones"
        )
    reading = _Reading(classes, shift, features, tokenizer, tokens_per_batch, progress)
    return _nearest(model, held_out, metrics, reading)


def _nearest(
    model: nn.Module, held_out: Any, metrics: CollapseMetrics, reading: _Reading
) -> NearestMean:
    moments = metrics.moments
    seen = (moments.counts > 0).cpu()
    home = moments.means.device
    means = moments.means[seen.to(home)]
    weight = metrics.weight.to(home)[seen.to(home)].double()
    agreeing = torch.zeros((), dtype=torch.int64, device=home)
    tokens = left_out = 0

    def count(states: Tensor, labels: Tensor) -> None:
        nonlocal tokens, left_out
        kept = seen[labels]
        tokens += int(kept.sum())
        left_out += int((~kept).sum())
        if kept.any():
            rows = send(kept.nonzero().squeeze(1), states.device)
            agreeing.add_(count_nearest(states.index_select(0, rows).to(home), means, weight))

    reading.each_batch(model, held_out, count, "held-out tokens")
    return NearestMean(int(agreeing), tokens, left_out)


@dataclass(frozen=True)
class _Reading:
    """How a text is read: the options that the two passes share."""

    classes: CollapseClasses
    shift: Shift | None
    features: Features
    tokenizer: Any
    tokens_per_batch: int | None
    progress: bool

    @torch.no_grad()
    def each_batch(
        self, model: nn.Module, loader: Any, take: Callable[[Tensor, Tensor], None], title: str
    ) -> None:
        """`take(states [n, D], labels [n] on the CPU)` for each batch's tokens of a class."""
        from tqdm.auto import tqdm

        model = unwrap(model)
        last = Representations(model, features=self.features, skip_logits=True)
        examples, labels = self._labelled_examples(model, loader)
        with (
            eager(),
            evaluation_state(model),
            tqdm(
                total=len(examples), desc=titled(title), unit="ex", disable=not self.progress
            ) as bar,
        ):
            batches = prepare_batches(
                model,
                # Nothing is predicted: only the segments are used.
                [example.predicting_itself() for example in examples],
                tokens_per_batch=self.tokens_per_batch,
                shift=0,
            )
            device = input_device(model)
            with last:
                for batch in batches:
                    rows, found = _labelled_rows(batch, labels)
                    with attention_for(model, batch):
                        call(model, batch.to(device).model_inputs())
                    states = last.features.flatten(0, 1)
                    take(states.index_select(0, send(rows, states.device)), found)
                    last.clear()
                    bar.update(batch.num_examples)

    def _labelled_examples(
        self, model: nn.Module, loader: Any
    ) -> tuple[list[Example], list[Tensor]]:
        """The examples with a token of a class, and the class at each of their positions.

        An example without one changes no class, so that it need not pass through the model.
        """
        shift = default_shift(model) if self.shift is None else self.shift
        longest = max_tokens(model)
        examples, labels = [], []
        read = read_examples(loader, tokenizer=self.tokenizer, require_labels=False)
        for number, example in enumerate(read):
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


def _class_weight(model: nn.Module, classes: CollapseClasses) -> Tensor:
    """The classes' rows [K, D] of the output embedding."""
    head = output_embedding(model)
    if hasattr(head, "base_layer"):
        raise ValueError(
            f"model must have a plain output embedding, got the adapter {type(head).__name__}; "
            "merge it first (merge_and_unload)"
        )
    weight = materialised_weight(head).detach()
    if not weight.is_floating_point():
        raise ValueError(
            f"model must have an output embedding in floating point, got {weight.dtype}; load it "
            "without quantisation of the output embedding"
        )
    return classes.rows(weight).clone()


def _home(weight: Tensor) -> torch.device:
    """Where the moments are kept: with the weight, unless its device knows no fp64."""
    return torch.device("cpu") if weight.device.type == "mps" else weight.device


def _require_width(states: Tensor, weight: Tensor, features: Features) -> None:
    if states.shape[1] != weight.shape[1]:
        raise ValueError(
            f"features={features!r} must have the {weight.shape[1]} dimensions of the output "
            f"embedding, got {states.shape[1]}; use features='head', which enters it"
        )
