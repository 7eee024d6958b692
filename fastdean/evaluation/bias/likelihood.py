"""How probable a model finds tokens of a text: what the likelihood-based measures ask of it.

A causal model gives the log-probability of a token after those before it. A masked model gives that
of a hidden token in its context: one token hidden at a time (pseudo-log-likelihood, Salazar et al.
2020), or all that are asked about at once. Natural logarithms throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdean.data import IGNORE_INDEX, Example
from fastdean.forward import label_shift, target_log_likelihood
from fastdean.model_state import max_tokens, unwrap


@dataclass(frozen=True)
class Encoded:
    """A tokenised text.

    ids: int64 [T] on the CPU, with the tokenizer's special tokens.
    own: places 0..T-1 of the text's own tokens, in order.
    offsets: [T], first and last character (exclusive) of each token; empty where not asked for.
    """

    ids: Tensor
    own: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...] = ()

    def covering(self, start: int, end: int) -> tuple[int, ...]:
        """Places of the own tokens that hold any of the characters `start` to `end`."""
        return tuple(i for i in self.own if self.offsets[i][0] < end and self.offsets[i][1] > start)


@dataclass(frozen=True)
class Question:
    """Tokens of a text whose log-probability is asked for.

    ids: int64 [T].
    asked: their places.
    hidden: places that a masked model must not see either, though nothing is asked about them.
    """

    ids: Tensor
    asked: tuple[int, ...]
    hidden: tuple[int, ...] = ()


def is_masked(model: nn.Module) -> bool:
    """Whether the model is a masked language model; ValueError where it is no language model."""
    try:
        return label_shift(unwrap(model)) == 0
    except ValueError:
        raise ValueError(
            "model must be a causal or masked language model, got "
            f"{type(unwrap(model)).__name__}; load it with AutoModelForCausalLM or "
            "AutoModelForMaskedLM"
        ) from None


def encode_text(tokenizer: Any, text: str, *, offsets: bool = False) -> Encoded:
    """Tokenise `text` with the tokenizer's special tokens.

    Raises:
        ValueError: `offsets` of a tokenizer that cannot tell which characters a token stands for,
            or a text without tokens.
    """
    if offsets and not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer must be a fast one, got {type(tokenizer).__name__}, which does not say "
            "which characters a token stands for; load it with AutoTokenizer"
        )
    encoded = tokenizer(
        text,
        return_special_tokens_mask=True,
        **({"return_offsets_mapping": True} if offsets else {}),
    )
    own = tuple(i for i, special in enumerate(encoded["special_tokens_mask"]) if not special)
    if not own:
        raise ValueError(
            f"text must have tokens of its own, got none for {text!r:.60}; leave the row out"
        )
    spans = tuple((start, end) for start, end in encoded["offset_mapping"]) if offsets else ()
    return Encoded(torch.tensor(encoded["input_ids"], dtype=torch.int64), own, spans)


def causal_log_likelihood(
    model: nn.Module, tokenizer: Any, questions: Sequence[Question], **options: Any
) -> tuple[Tensor, Tensor]:
    """log p of the asked tokens, each given everything before it.

    Where the tokenizer puts no token before a text, its BOS token, else its EOS token, stands
    there, so that the text's first token has a probability too. A tokenizer with neither leaves the
    first token without one, and it is not counted.

    Args:
        options: `tokens_per_batch` and `progress` of `target_log_likelihood`.
    Returns:
        sums: float64 [n], nats.
        counts: int64 [n], how many tokens each sum is over.
    """
    start = _start_token(tokenizer)
    examples = []
    for question in questions:
        labels = torch.full_like(question.ids, IGNORE_INDEX)
        places = list(question.asked)
        labels[places] = question.ids[places]
        ids = question.ids
        if start is not None and 0 in question.asked:
            ids = torch.cat([torch.tensor([start]), ids])
            labels = torch.cat([torch.tensor([IGNORE_INDEX]), labels])
        examples.append(Example(ids, labels))
    return _log_likelihood(model, examples, options)


def joint_log_likelihood(
    model: nn.Module, tokenizer: Any, questions: Sequence[Question], **options: Any
) -> tuple[Tensor, Tensor]:
    """log p of the asked tokens under a masked model, all of them and the `hidden` ones masked.

    The sum over the tokens of a word of several pieces takes the pieces as independent. Returns and
    options as in `causal_log_likelihood`.
    """
    mask = _mask_token(tokenizer)
    examples = [
        _masked(question.ids, question.asked, (*question.asked, *question.hidden), mask)
        for question in questions
    ]
    return _log_likelihood(model, examples, options)


def pseudo_log_likelihood(
    model: nn.Module, tokenizer: Any, questions: Sequence[Question], **options: Any
) -> tuple[Tensor, Tensor]:
    """Sum of log p of the asked tokens under a masked model, each masked in turn.

    `hidden` is masked in every turn. Costs one row per asked token. Returns and options as in
    `causal_log_likelihood`.
    """
    mask = _mask_token(tokenizer)
    turns, owners = [], []
    for number, question in enumerate(questions):
        for place in question.asked:
            turns.append(_masked(question.ids, (place,), (place, *question.hidden), mask))
            owners.append(number)
    by_turn, _ = _log_likelihood(model, turns, options)
    owner = torch.tensor(owners)
    sums = torch.zeros(len(questions), dtype=torch.float64).index_add_(0, owner, by_turn)
    return sums, torch.bincount(owner, minlength=len(questions))


def sentence_log_likelihood(
    model: nn.Module, tokenizer: Any, sentences: Sequence[str], **options: Any
) -> tuple[Tensor, Tensor]:
    """Log-likelihood of whole sentences, their special tokens left out.

    Causal models: `causal_log_likelihood` of every own token. Masked models:
    `pseudo_log_likelihood` of every own token. Returns and options as there.
    """
    encoded = [encode_text(tokenizer, sentence) for sentence in sentences]
    ask = pseudo_log_likelihood if is_masked(model) else causal_log_likelihood
    return ask(model, tokenizer, [Question(text.ids, text.own) for text in encoded], **options)


def _masked(ids: Tensor, asked: Sequence[int], masked: Sequence[int], mask: int) -> Example:
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[list(asked)] = ids[list(asked)]
    seen = ids.clone()
    seen[list(masked)] = mask
    return Example(seen, labels)


def _mask_token(tokenizer: Any) -> int:
    mask = getattr(tokenizer, "mask_token_id", None)
    if mask is None:
        raise ValueError(
            f"tokenizer must have a mask token for a masked model, got {type(tokenizer).__name__} "
            "without one; load the model's own tokenizer"
        )
    return mask


def _start_token(tokenizer: Any) -> int | None:
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos if bos is not None else getattr(tokenizer, "eos_token_id", None)


def _log_likelihood(
    model: nn.Module, examples: Sequence[Example], options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    limit = max_tokens(model)
    longest = max(map(len, examples))
    if limit is not None and longest > limit:
        raise ValueError(
            f"texts must fit the model's {limit} tokens, got one of {longest}; leave it out"
        )
    return target_log_likelihood(model, examples, **options)
