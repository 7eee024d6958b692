"""Perplexity: what an edit costs a model on text it should still be good at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdean.data.examples import IGNORE_INDEX, Example, read_examples
from fastdean.default_device import cpu_by_default
from fastdean.evaluation.statistics.intervals import Interval, mean_interval
from fastdean.models.forward import target_log_likelihood
from fastdean.models.label_shift import label_shift
from fastdean.models.model_state import max_tokens, unwrap
from fastdean.wording.doing import titled
from fastdean.wording.mendable import InputTypeError

_LONGEST_DEFAULT_WINDOW = 2048


@dataclass(frozen=True, eq=False)
class Perplexity:
    """Perplexity over all target tokens, and what it is made of.

    nll_sums: float64 [n], nats, summed over each example's targets.
    token_counts: int64 [n], targets of each example.
    window, stride: of `perplexity_of_text`, else None. Values of different windows do not compare.
    """

    nll_sums: Tensor
    token_counts: Tensor
    window: int | None = None
    stride: int | None = None

    @property
    def tokens(self) -> int:
        """Number of target tokens."""
        return int(self.token_counts.sum())

    @property
    def nll_per_token(self) -> float:
        """Mean over tokens, not over examples, in nats."""
        return float(self.nll_sums.sum() / self.token_counts.sum())

    @property
    def value(self) -> float:
        """exp(nll_per_token); infinite where that overflows."""
        return float((self.nll_sums.sum() / self.token_counts.sum()).exp())


@cpu_by_default
def perplexity(
    model: nn.Module,
    examples: Iterable[Any],
    *,
    tokenizer: Any = None,
    template: str | None = None,
    tokens_per_batch: int | None = None,
    progress: bool = True,
) -> Perplexity:
    """Perplexity of the target tokens of `examples`: exp(sum of -log p / number of targets).

    Equivalent, for one example of a causal model:

        model(input_ids[None], labels=labels[None]).loss.exp()

    Args:
        model: a language model; evaluated without dropout and left in its mode.
        examples: `Example`s, batches of input_ids and labels, or, with `tokenizer`, rows of text as
            in `fastdean.data.encode`.
        tokens_per_batch: a bound for memory; the result does not depend on it.

    Raises:
        ValueError: no examples, an example without targets, or a masked model with a target that
            stands visible in its own input: mask those positions first.
    """
    examples = read_examples(examples, tokenizer=tokenizer, template=template)
    if label_shift(unwrap(model)) == 0:
        _check_targets_are_hidden(examples)
    return _measure(model, examples, tokens_per_batch, progress)


@cpu_by_default
def perplexity_of_text(
    model: nn.Module,
    tokenizer: Any,
    texts: str | Iterable[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    tokens_per_batch: int | None = None,
    progress: bool = True,
) -> Perplexity:
    """Perplexity of running text in windows of tokens, as wikitext-2-raw is usually measured.

    The texts are joined by an empty line, tokenised once and cut. The first token of the text, and
    with windows that do not overlap the first of each window, has no context and is not counted.

    Args:
        model: a causal language model.
        texts: a text, or the rows of a corpus in order.
        window: tokens of a window, at least 2. Default: what the model's positions hold, at most
            2048.
        stride: tokens from one window's start to the next, 1..window. Default: `window`, no
            overlap. With overlap each token is counted once, in the first window it stands in.

    Raises:
        TypeError: `texts` holds something that is no text.
        ValueError: options out of range, fewer than 2 tokens, or a masked model.
    """
    if label_shift(unwrap(model)) != 1:
        raise ValueError(
            "model must be a causal language model to measure running text, got the masked "
            f"{type(unwrap(model)).__name__}; mask positions yourself and use perplexity()"
        )
    longest = max_tokens(model)
    if window is None:
        window = min(longest or _LONGEST_DEFAULT_WINDOW, _LONGEST_DEFAULT_WINDOW)
    if window < 2 or (longest is not None and window > longest):
        bound = "" if longest is None else f" and at most the model's {longest} positions"
        raise ValueError(
            f"window must be at least 2 tokens{bound}, got {window}; leave it out for the default"
        )
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(
            f"stride must be from 1 to window ({window}), got {stride}; a larger one would leave "
            "out text"
        )
    token_ids = _tokenize_running_text(tokenizer, texts)
    examples = _windows(token_ids, window, stride)
    return _measure(model, examples, tokens_per_batch, progress, window, stride)


def compare_perplexity(
    before: Perplexity, after: Perplexity, *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Student's t interval of the ratio of perplexities, after / before, over the same examples.

    The log of the ratio is the token-weighted mean of the examples' changes; the interval is that
    of the log, exp of its ends. The interval's `mean` is the ratio over all examples, and 1 means
    that nothing changed. Windows of one running text are neighbours rather than independent
    examples: their interval is on the narrow side.

    Raises:
        ValueError: the two were not measured on the same examples, one of them is NaN or infinite,
            or their ratio overflows.
    """
    if not torch.equal(before.token_counts, after.token_counts):
        raise ValueError(
            "after must be measured on the same examples as before, got "
            f"{len(after.token_counts)} examples of {after.tokens} tokens against "
            f"{len(before.token_counts)} of {before.tokens}; measure both models on one list"
        )
    return mean_interval(
        after.nll_sums - before.nll_sums,
        weights=before.token_counts,
        no_effect=1.0,
        logs=True,
        confidence=confidence,
        seed=seed,
    )


def _measure(
    model: nn.Module,
    examples: list[Example],
    tokens_per_batch: int | None,
    progress: bool,
    window: int | None = None,
    stride: int | None = None,
) -> Perplexity:
    sums, counts = target_log_likelihood(
        model,
        examples,
        tokens_per_batch=tokens_per_batch,
        progress=progress,
        description=titled("perplexity"),
    )
    return Perplexity(-sums, counts, window, stride)


def _check_targets_are_hidden(examples: list[Example]) -> None:
    for number, example in enumerate(examples):
        visible = int((example.input_ids == example.labels).sum())
        if visible:
            raise ValueError(
                f"example {number} must hide its targets from a masked language model, got "
                f"{visible} of them visible in input_ids; put the mask token there"
            )


def _tokenize_running_text(tokenizer: Any, texts: str | Iterable[str]) -> Tensor:
    rows = [texts] if isinstance(texts, str) else list(texts)
    for number, row in enumerate(rows):
        if not isinstance(row, str):
            raise InputTypeError(
                f"texts must be text, got {type(row).__name__} in row {number}; pick the text "
                "column"
            )
    # verbose=False: the tokenizer would warn of a text longer than the model, which is the point
    # here.
    token_ids = tokenizer("\n\n".join(rows), verbose=False)["input_ids"]
    if len(token_ids) < 2:
        raise ValueError(
            f"texts must come to at least 2 tokens, got {len(token_ids)}; there is nothing to "
            "predict"
        )
    return torch.tensor(token_ids, dtype=torch.int64)


def _windows(token_ids: Tensor, window: int, stride: int) -> list[Example]:
    """Windows as examples; labels are -100 on what has no context or was counted before."""
    examples = []
    counted = 1
    for start in range(0, len(token_ids), stride):
        end = min(start + window, len(token_ids))
        labels = token_ids[start:end].clone()
        labels[: max(1, counted - start)] = IGNORE_INDEX
        if (labels != IGNORE_INDEX).any():
            examples.append(Example(token_ids[start:end], labels))
        counted = end
        if end == len(token_ids):
            break
    return examples
