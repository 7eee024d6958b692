"""How likely a model finds tokens of a text: what the likelihood-based measures ask of it.

A causal model gives the log-probability of a token after those before it. A masked model gives that
of a hidden token in its context: one token hidden at a time (pseudo-log-likelihood, Salazar et al.
2020), or all that are asked about at once. Natural logarithms throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdean.data.examples import IGNORE_INDEX, Example
from fastdean.evaluation.bias.finite import require_finite
from fastdean.evaluation.bias.start import Start, StartToken, start_token
from fastdean.models.forward import target_log_likelihood
from fastdean.models.label_shift import label_shift
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
    lead: number of special tokens that the tokenizer puts before the text.
    """

    ids: Tensor
    asked: tuple[int, ...]
    hidden: tuple[int, ...] = ()
    lead: int = 0


class Likelihoods:
    """A causal or masked language model and its tokenizer, asked for log-likelihoods in nats.

    Every method gives sums, float64 [n], and counts, int64 [n], how many tokens each is over. The
    model is evaluated without dropout and left in its mode.

    Attributes:
        start: what a causal model's text starts from; None for a masked model.

    Raises:
        ValueError: another kind of model, and what `start_token` raises.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        start: Start,
        *,
        tokens_per_batch: int | None,
        progress: bool,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._options: dict[str, Any] = {
            "tokens_per_batch": tokens_per_batch,
            "progress": progress,
        }
        self.start = start_token(tokenizer, start, masked=label_shift(unwrap(model)) == 0)

    def encode(self, text: str, *, offsets: bool = False) -> Encoded:
        """See `encode_text`."""
        return encode_text(self._tokenizer, text, offsets=offsets)

    def causal(self, questions: Sequence[Question]) -> tuple[Tensor, Tensor]:
        """log p of the asked tokens under a causal model, each given everything before it.

        `start` stands before a text whose first token is asked for, so that this has a probability
        too, and in place of what the tokenizer put before any text. A start of no token leaves the
        first one without a probability, and it is not counted.

        Raises:
            ValueError: no token of a text has a probability.
        """
        assert self.start is not None, "only causal models are asked this"
        return self._sums([_begun(question, self.start) for question in questions])

    def joint(self, questions: Sequence[Question]) -> tuple[Tensor, Tensor]:
        """log p of the asked tokens under a masked model, all of them and the `hidden` ones masked.

        The sum over the tokens of a word of several pieces takes the pieces as independent.
        """
        mask = self._mask_token()
        return self._sums([_masked(q, q.asked, mask) for q in questions])

    def pseudo(self, questions: Sequence[Question]) -> tuple[Tensor, Tensor]:
        """Sum of log p of the asked tokens under a masked model, each masked in turn.

        `hidden` is masked in every turn. Costs one row per asked token.
        """
        mask = self._mask_token()
        by_turn, _ = self._sums([_masked(q, (t,), mask) for q in questions for t in q.asked])
        counts = torch.tensor([len(question.asked) for question in questions])
        owner = torch.arange(len(questions)).repeat_interleave(counts)
        sums = torch.zeros(len(questions), dtype=torch.float64).index_add_(0, owner, by_turn)
        return sums, counts

    def sentences(self, sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
        """`causal` or `pseudo` of every token of whole sentences but for special ones."""
        encoded = [self.encode(sentence) for sentence in sentences]
        questions = [text.question(text.own) for text in encoded]
        return self.pseudo(questions) if self.start is None else self.causal(questions)

    def require_finite(self, found: Tensor, *name: Callable[[int], str]) -> None:
        """See `finite.require_finite`."""
        require_finite(self._model, found, *name)

    def _mask_token(self) -> int:
        mask = getattr(self._tokenizer, "mask_token_id", None)
        if mask is None:
            raise ValueError(
                "tokenizer must have a mask token for a masked model, got "
                f"{type(self._tokenizer).__name__} without one; load the model's own tokenizer"
            )
        return int(mask)

    def _sums(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        limit = max_tokens(self._model)
        longest = max(map(len, examples))
        if limit is not None and longest > limit:
            raise ValueError(
                f"texts must fit the model's {limit} tokens, got one of {longest}; leave it out"
            )
        return target_log_likelihood(self._model, examples, **self._options)


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


def _begun(question: Question, start: StartToken) -> Example:
    """The question with `start` before it, its asked tokens as targets."""
    ids, labels = question.ids, labels_at(question.ids, question.asked)
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


def _masked(question: Question, asked: Sequence[int], mask: int) -> Example:
    seen = question.ids.clone()
    seen[[*asked, *question.hidden]] = mask
    return Example(seen, labels_at(question.ids, asked))


def labels_at(ids: Tensor, places: Sequence[int]) -> Tensor:
    """Labels that ask for the tokens at `places` alone."""
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[list(places)] = ids[list(places)]
    return labels
