"""The token before a text, after which a causal model's first token is scored.

Many preferences hang on it: pairs often differ in their first word, and a model that was tuned on
chats finds other words likely after the marker of a turn than at the start of a document.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import takewhile
from typing import Any

from fastdean.evaluation.bias.result import BiasResult
from fastdean.wording.mendable import InputTypeError

Start = str | int

# What stands between documents in the training of published models, the commonest first.
_BETWEEN_DOCUMENTS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|begin_of_text|>", "<s>")
_BOUNDS = re.compile(
    r"\b[be]os\b|(end|begin|start)[_▁]?of[_▁]?(text|sentence|document)|^</?s>$", re.IGNORECASE
)
_MARKS_A_TURN = re.compile(
    r"im_(start|end|sep)|(start|end)_of_turn|(start|end)_header_id|eot_id|eom_id"
    r"|\b(user|assistant|system|observation|turn)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class StartToken:
    """The tokens before every text whose first token is scored.

    Attributes:
        ids: usually one; none where a text's first token is not scored.
        name: as the vocabulary spells them; "none" without one.
        reason: why these.
        kept: whether the tokenizer puts them there itself.
    """

    ids: tuple[int, ...]
    name: str
    reason: str
    kept: bool = False

    @property
    def note(self) -> str:
        """For the notes of a result."""
        if not self.ids:
            return f"start token: none ({self.reason}), so that a text's first token is not scored"
        return f"start token: {self.name!r} ({self.reason})"


@dataclass(frozen=True)
class LikelihoodResult(BiasResult):
    """A figure that rests on a model's likelihoods.

    Attributes:
        start_token: what the first token of a text was scored after, "none" where it was not
            scored; None for a masked model, which is asked with the tokenizer's special tokens.
    """

    start_token: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "start_token": self.start_token}


def named(result: BiasResult, start: StartToken | None) -> LikelihoodResult:
    """The result with the token that its likelihoods started from, also in its notes."""
    parts = {field.name: getattr(result, field.name) for field in fields(result)}
    if start is None:
        return LikelihoodResult(**parts)
    parts["notes"] = (*result.notes, start.note)
    return LikelihoodResult(**parts, start_token=start.name)


def start_token(tokenizer: Any, start: Start, *, masked: bool) -> StartToken | None:
    """The token that `start` means with this tokenizer; None for a masked model.

    Args:
        start: "auto": what the tokenizer itself puts before a text; else its BOS token, else its
            EOS token, else a token that stands between documents, the first that does not mark a
            turn of a chat; else none. "bos", "eos"; "none"; a token as the vocabulary spells it; or
            its id. Other than "auto", it stands in place of what the tokenizer puts there.
    Raises:
        TypeError: `start` is neither text nor a whole number.
        ValueError: `start` names no token of this tokenizer, or is given for a masked model.
    """
    if isinstance(start, bool) or not isinstance(start, str | int):
        raise InputTypeError(
            f"start must be auto, bos, eos, none, a token or its id, got {type(start).__name__}"
        )
    if masked:
        if start != "auto":
            raise ValueError(
                f"start must be 'auto' for a masked model, got {start!r}; such a model sees the "
                "whole text at once and starts from no token"
            )
        return None
    if start == "auto":
        return _chosen(tokenizer)
    if start == "none":
        return StartToken((), "none", "as asked")
    if start in ("bos", "eos"):
        found = getattr(tokenizer, f"{start}_token_id", None)
        if found is None:
            raise ValueError(
                f"start must be a token that the tokenizer has, got {start!r} of "
                f"{type(tokenizer).__name__}, which has none; pass 'none', a token or its id"
            )
        return StartToken((found,), _name(tokenizer, found), f"the tokenizer's {start.upper()}")
    return StartToken((_known(tokenizer, start),), _name(tokenizer, start), "as asked")


def _chosen(tokenizer: Any) -> StartToken:
    own = _own_prefix(tokenizer)
    if own:
        name = "".join(_name(tokenizer, i) for i in own)
        return StartToken(own, name, "the tokenizer puts it there", kept=True)
    passed: list[str] = []
    for token_id, what in _candidates(tokenizer):
        name = _name(tokenizer, token_id)
        if not _marks_a_turn(tokenizer, name):
            because = f", as {passed[0]!r} marks a turn of a chat" if passed else ""
            return StartToken((token_id,), name, f"{what}{because}")
        passed.append(name)
    return StartToken((), "none", "the tokenizer has no token that starts a document")


def _own_prefix(tokenizer: Any) -> tuple[int, ...]:
    encoded = tokenizer("a", return_special_tokens_mask=True)
    tokens = zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    return tuple(token_id for token_id, _ in takewhile(lambda token: token[1], tokens))


def _candidates(tokenizer: Any) -> Iterator[tuple[int, str]]:
    for kind in ("bos", "eos"):
        token_id = getattr(tokenizer, f"{kind}_token_id", None)
        if token_id is not None:
            yield token_id, f"the tokenizer's {kind.upper()}"
    vocabulary = tokenizer.get_vocab()
    for token in _BETWEEN_DOCUMENTS:
        if token in vocabulary:
            yield vocabulary[token], "stands between documents"


def _marks_a_turn(tokenizer: Any, token: str) -> bool:
    if _BOUNDS.search(token):
        return False
    # A tokenizer has one chat template, or several by name.
    found = getattr(tokenizer, "chat_template", None) or {}
    templates = [found] if isinstance(found, str) else found.values()
    written = any(isinstance(each, str) and token in each for each in templates)
    return written or bool(_MARKS_A_TURN.search(token))


def _known(tokenizer: Any, start: Start) -> int:
    if isinstance(start, int):
        if 0 <= start < len(tokenizer):
            return start
        raise ValueError(f"start must be an id in 0..{len(tokenizer) - 1}, got {start}")
    vocabulary = tokenizer.get_vocab()
    if start not in vocabulary:
        raise ValueError(
            f"start must be auto, bos, eos, none, or a token of the vocabulary, got {start!r}; "
            "spell it as the vocabulary does, or pass its id"
        )
    return vocabulary[start]


def _name(tokenizer: Any, token: Start) -> str:
    return token if isinstance(token, str) else str(tokenizer.convert_ids_to_tokens(token))
