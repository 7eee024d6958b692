"""Awareness without a judge: how much more probable the safe answer is than the unsafe one.

The DEAN paper lets a second language model judge generated answers. A margin needs no generation
and no judge: both answers are given, and the model says how probable it finds them. It also moves
with an edit that is too small to change a greedy answer.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastdean.data.examples import IGNORE_INDEX, Example, encode
from fastdean.default_device import cpu_by_default
from fastdean.evaluation.statistics.intervals import (
    Interval,
    by_unit,
    mean_interval,
    share_change_interval,
)
from fastdean.models.forward import target_log_likelihood
from fastdean.models.label_shift import label_shift
from fastdean.models.model_state import unwrap
from fastdean.wording.doing import titled


@dataclass(frozen=True)
class Pair:
    """One prompt with an answer that should be preferred and one that should not."""

    prompt: str
    safe: str
    unsafe: str


@dataclass(frozen=True, eq=False)
class Margins:
    """Margins of n pairs, in the order they were given.

    safe, unsafe: float64 [n], mean log p of the answer's tokens given the prompt. The mean, not the
        sum: otherwise the shorter answer wins by its length.
    values: float64 [n], safe - unsafe.
    prompts: of each pair, what tells its prompt from others; None where every pair has its own.
    """

    values: Tensor
    safe: Tensor
    unsafe: Tensor
    unit: str = "nats per token"
    prompts: Sequence[Hashable] | None = None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        """Mean margin over the pairs."""
        return float(self.values.mean())

    @property
    def share_positive(self) -> float:
        """Share of pairs whose safe answer is the more probable one, per token."""
        return float((self.values > 0).double().mean())


def encode_pairs(
    rows: Iterable[Pair | Mapping[str, Any]],
    tokenizer: Any,
    *,
    template: str | None = None,
    max_length: int | None = None,
) -> list[tuple[Example, Example]]:
    """Tokenise pairs into (safe, unsafe) examples that share their prompt.

    Args:
        rows: `Pair`s, or mappings with the keys "prompt", "response" (the safe answer) and
            "unsafe".
        template, max_length: as in `fastdean.data.encode`. An answer cut by `max_length` is
            measured on the tokens that remain.

    Raises:
        ValueError: a row lacks a key, or an answer has no tokens (left).
    """
    pairs = [_as_pair(row, number) for number, row in enumerate(rows)]
    safe, unsafe = (
        encode(
            [{"prompt": pair.prompt, "response": getattr(pair, side)} for pair in pairs],
            tokenizer,
            template=template,
            max_length=max_length,
        )
        for side in ("safe", "unsafe")
    )
    return list(zip(safe, unsafe, strict=True))


@cpu_by_default
def response_margins(
    model: nn.Module,
    pairs: Sequence[tuple[Example, Example]],
    *,
    tokens_per_batch: int | None = None,
    progress: bool = True,
) -> Margins:
    """Margin of each pair: mean log p(safe | prompt) - mean log p(unsafe | prompt), per token.

    Equivalent, for one example of a causal model:

        log_p = model(input_ids[None]).logits[0, :-1].log_softmax(-1)
        mean = log_p.gather(1, input_ids[1:, None])[labels[1:] != -100].mean()

    Args:
        model: a causal language model; evaluated without dropout and left in its mode.
        pairs: (safe, unsafe) examples, see `encode_pairs`.
        tokens_per_batch: a bound for memory; the result does not depend on it.

    Raises:
        ValueError: no pairs, or a model that is not causal: a masked one sees the token it is asked
            about, which makes every answer probable.
    """
    if not pairs:
        raise ValueError(
            "pairs must hold at least one pair, got none; check the source of the rows"
        )
    if label_shift(unwrap(model)) != 1:
        raise ValueError(
            "model must be a causal language model, got the masked "
            f"{type(unwrap(model)).__name__}; a masked model sees the answer it would be asked "
            "about"
        )
    safe_examples, unsafe_examples = zip(*pairs, strict=True)
    # One call for both sides, so that examples of either fill the same batches.
    sums, counts = target_log_likelihood(
        model,
        [*safe_examples, *unsafe_examples],
        tokens_per_batch=tokens_per_batch,
        progress=progress,
        description=titled("margins"),
    )
    safe, unsafe = (sums / counts).split(len(pairs))
    return Margins(safe - unsafe, safe, unsafe, prompts=[_prompt(safe) for safe, _ in pairs])


def margin_interval(margins: Margins, *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Student's t interval of the mean margin; pairs of one prompt as in `compare_margins`.

    Raises:
        ValueError: a margin that is NaN or infinite.
    """
    return _interval(margins, margins.values, confidence=confidence, seed=seed)


def compare_margins(
    before: Margins, after: Margins, *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Student's t interval of the mean change of margin, after - before, over the same pairs.

    Pairs of one prompt are alike and count as one unit, so that n is the number of prompts; where
    all share a single prompt, its answers are what was sampled, and the pairs are the units.

    Raises:
        ValueError: other pairs or another order, or a margin that is NaN or infinite.
    """
    _check_same_pairs(before, after)
    changes = after.values - before.values
    return _interval(before, changes, confidence=confidence, seed=seed)


def compare_shares(
    before: Margins, after: Margins, *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Interval of the change of `share_positive`, after - before, over the same pairs.

    With McNemar's exact test; where pairs share a prompt, Student's t over the prompts.

    Raises:
        ValueError: other pairs or another order, or a margin that is NaN or infinite.
    """
    _check_same_pairs(before, after)
    for margins in (before, after):
        _check_finite(margins)
    changes = (after.values > 0).double() - (before.values > 0).double()
    if _shared_prompts(before) is not None:
        return _interval(before, changes, confidence=confidence, seed=seed)
    return share_change_interval(changes, confidence=confidence, seed=seed)


def _interval(margins: Margins, values: Tensor, **options: Any) -> Interval:
    prompts = _shared_prompts(margins)
    if prompts is None:
        return mean_interval(values, **options)
    sums, counts = by_unit(values, prompts)
    return mean_interval(sums, weights=counts, **options)


def _shared_prompts(margins: Margins) -> Sequence[Hashable] | None:
    """Of each pair, where some but not all pairs have one prompt; otherwise None."""
    prompts = margins.prompts
    return prompts if prompts is not None and 1 < len(set(prompts)) < len(margins) else None


def _prompt(example: Example) -> Hashable:
    """The tokens before the first target, which every answer to one prompt shares."""
    is_target = (example.labels != IGNORE_INDEX).int()
    return tuple(example.input_ids[: int(is_target.argmax())].tolist())


def _check_finite(margins: Margins) -> None:
    bad = (~margins.values.isfinite()).nonzero()
    if len(bad):
        raise ValueError(
            f"margins must be finite, got {float(margins.values[bad[0, 0]])} of pair "
            f"{int(bad[0, 0])}; drop that pair"
        )


def _as_pair(row: Pair | Mapping[str, Any], number: int) -> Pair:
    if isinstance(row, Pair):
        return row
    missing = [key for key in ("prompt", "response", "unsafe") if not isinstance(row.get(key), str)]
    if missing:
        raise ValueError(
            f"row {number} must have the text columns 'prompt', 'response' and 'unsafe', got no "
            f"{' and no '.join(missing)}; margins need both answers to each prompt"
        )
    return Pair(row["prompt"], row["response"], row["unsafe"])


def _check_same_pairs(before: Margins, after: Margins) -> None:
    if len(before) != len(after):
        raise ValueError(
            f"after must be of the same pairs as before ({len(before)}), got {len(after)}; "
            "measure both models on one list of pairs"
        )
    old, new = before.prompts, after.prompts
    if old is not None and new is not None and list(old) != list(new):
        place = next(i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
        raise ValueError(
            f"after must be of the same pairs as before, in their order, got another prompt in "
            f"pair {place}; measure both models on one list of pairs"
        )
