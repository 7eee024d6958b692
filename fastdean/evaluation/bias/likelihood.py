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

from fastdean.data.examples import IGNORE_INDEX, Example
from fastdean.evaluation.bias.start import StartToken
from fastdean.models.forward import label_shift, target_log_likelihood
from fastdean.models.model_state import max_tokens, unwrap


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

    def question(self, asked: Sequence[int], hidden: Sequence[int] = ()) -> Question:
        """What is asked about this text; arguments as the attributes of `Question`."""
        return Question(self.ids, tuple(asked), tuple(hidden), lead=self.own[0])


@dataclass(frozen=True)
class Question:
    """Tokens of a text whose log-probability is asked for.

    ids: int64 [T].
    asked: their places.
    hidden: places that a masked model must not see either, though nothing is asked about them.
    lead: how many special tokens the tokenizer put before the text.
    """

    ids: Tensor
    asked: tuple[int, ...]
    hidden: tuple[int, ...] = ()
    lead: int = 0


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
    model: nn.Module, questions: Sequence[Question], start: StartToken, **options: Any
) -> tuple[Tensor, Tensor]:
    """log p of the asked tokens, each given everything before it.

    `start` stands before a text whose first token is asked for, so that this has a probability too,
    and in place of what the tokenizer put before any text. A start of no token leaves the first one
    without a probability, and it is not counted.

    Args:
        options: `tokens_per_batch` and `progress` of `target_log_likelihood`.
    Raises:
        ValueError: no token of a text has a probability.
    Returns:
        sums: float64 [n], nats.
        counts: int64 [n], how many tokens each sum is over.
    """
    return _log_likelihood(model, [_begun(question, start) for question in questions], options)


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
    model: nn.Module,
    tokenizer: Any,
    sentences: Sequence[str],
    start: StartToken | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Log-likelihood of whole sentences, their special tokens left out.

    Causal models: `causal_log_likelihood` of every own token. Masked models, for which `start` is
    None: `pseudo_log_likelihood` of every own token. Returns and options as there.
    """
    encoded = [encode_text(tokenizer, sentence) for sentence in sentences]
    questions = [text.question(text.own) for text in encoded]
    if start is None:
        return pseudo_log_likelihood(model, tokenizer, questions, **options)
    return causal_log_likelihood(model, questions, start, **options)


def _begun(question: Question, start: StartToken) -> Example:
    """The question with `start` before it, its asked tokens as targets."""
    labels = torch.full_like(question.ids, IGNORE_INDEX)
    places = list(question.asked)
    labels[places] = question.ids[places]
    ids = question.ids
    if not start.kept and (question.lead or 0 in question.asked):
        before = torch.tensor(start.ids, dtype=ids.dtype)
        ids = torch.cat([before, ids[question.lead :]])
        labels = torch.cat([torch.full_like(before, IGNORE_INDEX), labels[question.lead :]])
    if not bool((labels[1:] != IGNORE_INDEX).any()):
        raise ValueError(
            "text must have a token after its first where no start token stands before it, got a "
            "single one; pass start='eos' or a token, or leave the row out"
        )
    return Example(ids, labels)


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
