"""Control classes: as many words as the chosen ones, chosen without regard to their meaning.

With them a regulariser shows its effect whatever the words mean.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, NamedTuple

from fastdean.collapse.classes import CollapseClasses
from fastdean.collapse.forms import encode_forms

_NEAREST = 10


class _Candidate(NamedTuple):
    token_id: int
    word: str


def random_control(classes: CollapseClasses, tokenizer: Any, *, seed: int) -> CollapseClasses:
    """Draw as many control words from the whole words, each equally likely.

    A candidate is a token for a word of two or more letters behind a space, of ASCII letters where
    all words of `classes` are. Tokens and words of `classes`, in any form, are no candidates. Each
    control class has one token. Some tokens only begin words: no vocabulary tells.

    Args:
        classes: the chosen ones.
        tokenizer: the one they were made with.
        seed: of the draw.
    Returns:
        K classes; the one at place k belongs to the group "control of ..." the group of class k.
    Raises:
        ValueError: the vocabulary has fewer candidates than K.
    """
    candidates = _candidates(classes, tokenizer)
    return _control(classes, Random(seed).sample(candidates, len(classes)))


def frequency_matched_control(
    classes: CollapseClasses,
    tokenizer: Any,
    *,
    counts: Mapping[int, int] | None = None,
    seed: int,
) -> CollapseClasses:
    """Draw as many control words, each about as frequent as the class at its place.

    The candidates are those of `random_control`. The frequency of a token is log(1 + its count),
    or without `counts` log(1 + its id), a proxy: most vocabularies are numbered by frequency or by
    the order of merges. A class of several pieces is as frequent as its rarest piece.

    The classes, in random order, each draw one of the 10 remaining candidates nearest in frequency,
    all 10 equally likely; candidates of the same frequency are in random order before. The match is
    greedy, not the best overall.

    Args:
        classes, tokenizer, seed: as in `random_control`.
        counts: how often each token id occurs in a corpus; 0 for ids that are missing.
    Returns:
        K classes, as `random_control`'s.
    Raises:
        ValueError: the vocabulary has fewer candidates than K, or a count is negative.
    """
    if counts is not None and min(counts.values(), default=0) < 0:
        raise ValueError(
            f"counts must be 0 or above, got {min(counts.values())}; count the tokens of a corpus"
        )
    rng = Random(seed)
    candidates = _candidates(classes, tokenizer)
    rng.shuffle(candidates)
    candidates.sort(key=lambda candidate: _frequency((candidate.token_id,), counts))
    frequencies = [_frequency((candidate.token_id,), counts) for candidate in candidates]
    chosen: dict[int, _Candidate] = {}
    for number in rng.sample(range(len(classes)), len(classes)):
        place = _draw_near(_frequency(classes.pieces[number], counts), frequencies, rng)
        frequencies.pop(place)
        chosen[number] = candidates.pop(place)
    return _control(classes, [chosen[number] for number in range(len(classes))])


def _frequency(pieces: Sequence[int], counts: Mapping[int, int] | None) -> float:
    if counts is None:
        return math.log1p(max(pieces))
    return math.log1p(min(counts.get(piece, 0) for piece in pieces))


def _draw_near(frequency: float, frequencies: Sequence[float], rng: Random) -> int:
    """A random index among the nearest of the sorted `frequencies`."""
    middle = bisect_left(frequencies, frequency)
    window = range(max(0, middle - _NEAREST), min(len(frequencies), middle + _NEAREST))
    return rng.choice(
        heapq.nsmallest(_NEAREST, window, key=lambda place: abs(frequencies[place] - frequency))
    )


def _candidates(classes: CollapseClasses, tokenizer: Any) -> list[_Candidate]:
    """In the order of their ids. Raises ValueError if they are fewer than the classes."""
    excluded = {word.strip().casefold() for word in classes.words}
    excluded |= {left.word.strip().casefold() for left in classes.left_out}
    ascii_only = all(word.isascii() for word in classes.words)
    own = {piece for pieces in classes.pieces for piece in pieces}
    texts = {i: tokenizer.decode([i]).strip() for i in range(len(tokenizer))}
    words = {
        token_id: text
        for token_id, text in texts.items()
        if token_id not in own
        and len(text) > 1
        and text.isalpha()
        and (text.isascii() or not ascii_only)
        and text.casefold() not in excluded
    }
    forms = [f" {word}" for word in words.values()]
    found = [
        _Candidate(token_id, form)
        for token_id, form, pieces in zip(words, forms, encode_forms(tokenizer, forms), strict=True)
        if pieces == (token_id,)
    ]
    if len(found) < len(classes):
        raise ValueError(
            f"classes must be at most as many as the {len(found)} whole words of the vocabulary "
            f"that can be their control, got {len(classes)}; use fewer words"
        )
    return found


def _control(classes: CollapseClasses, chosen: Sequence[_Candidate]) -> CollapseClasses:
    return CollapseClasses(
        pieces=tuple((candidate.token_id,) for candidate in chosen),
        words=tuple(candidate.word for candidate in chosen),
        groups=tuple(f"control of {group}" for group in classes.groups),
    )
