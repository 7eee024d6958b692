"""Gendered words and their counterparts: `words/gender_pairs.json`, or lists of its form.

- pairs: [[female, male], ...] in lower case; a word's first pair gives its counterpart
- ambiguous: {word: {use: counterpart or null}}, where it depends on the word's use
- names: {"female": [...], "male": [...]}, parallel
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from typing import Any

_KEYS = ("pairs", "ambiguous", "names")


@dataclass(frozen=True)
class GenderWords:
    """The lists as dictionaries.

    Attributes:
        pairs: (female, male) in lower case, in the lists' order.
        swaps: word -> counterpart, in lower case, by the first pair that has the word.
        uses: word -> {use: counterpart, or None: not swapped}; goes before `swaps`.
        names: name -> name, both ways, spelt as listed, and both in upper case.
    """

    pairs: tuple[tuple[str, str], ...]
    swaps: Mapping[str, str]
    uses: Mapping[str, Mapping[str, str | None]]
    names: Mapping[str, str]

    @classmethod
    def from_lists(cls, lists: Mapping[str, Any] | None = None) -> GenderWords:
        """Read lists of the form above; None: those of the package.

        Raises: ValueError if a key is missing, a pair is no pair of two words, a word is female and
            male, or the names are not parallel.
        """
        return _embedded() if lists is None else _read(lists)

    @property
    def female(self) -> frozenset[str]:
        return frozenset(female for female, _ in self.pairs)

    @property
    def male(self) -> frozenset[str]:
        return frozenset(male for _, male in self.pairs)

    def irreversible(self) -> tuple[str, ...]:
        """The words, sorted, that swapping twice may not give back.

        Their counterpart depends on their use ("her"), is such a word ("him" becomes "her"), or has
        another counterpart itself ("mum" becomes "dad", which becomes "mom").
        """
        swaps, uses = self.swaps, self.uses
        others = {word for word in swaps if swaps[word] in uses or swaps[swaps[word]] != word}
        return tuple(sorted({*uses, *others}))

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches any whole word of the lists, in any case; the longest one."""
        words = {*self.swaps, *self.uses, *self.names}
        longest_first = sorted(words, key=lambda word: (-len(word), word))
        either = "|".join(re.escape(word).replace("'", "['’]") for word in longest_first)
        return re.compile(rf"(?<!\w)(?:{either})(?!\w)" if words else r"(?!)", re.IGNORECASE)


@cache
def _embedded() -> GenderWords:
    text = (resources.files("fastdean.data") / "words" / "gender_pairs.json").read_text("utf-8")
    return _read(json.loads(text))


def _read(lists: Mapping[str, Any]) -> GenderWords:
    missing = [key for key in _KEYS if key not in lists]
    if missing:
        raise ValueError(
            f"lists must have the keys {', '.join(_KEYS)}, got no {missing[0]!r}; leave lists out "
            "for those of the package"
        )
    pairs = tuple(_pair(pair) for pair in lists["pairs"])
    both = {female for female, _ in pairs} & {male for _, male in pairs}
    if both:
        raise ValueError(
            f"lists must have every word on one side of its pairs, got {min(both)!r} on both; "
            "correct the pairs"
        )
    swaps: dict[str, str] = {}
    for female, male in pairs:
        swaps.setdefault(female, male)
        swaps.setdefault(male, female)
    uses = {word.lower(): dict(found) for word, found in lists["ambiguous"].items()}
    return GenderWords(pairs, swaps, uses, _names(lists["names"]))


def _pair(pair: Any) -> tuple[str, str]:
    if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(w, str) and w for w in pair):
        raise ValueError(
            f"lists must have pairs of two words [female, male], got {pair!r}; correct the pair"
        )
    return pair[0].lower(), pair[1].lower()


def _names(names: Mapping[str, Any]) -> dict[str, str]:
    female, male = names.get("female", ()), names.get("male", ())
    if len(female) != len(male):
        raise ValueError(
            "lists must have as many female as male names, got "
            f"{len(female)} and {len(male)}; the names at one place are each other's counterpart"
        )
    swaps: dict[str, str] = {}
    for one, other in zip(female, male, strict=True):
        if one in swaps or other in swaps or one == other:
            repeated = other if other in swaps else one
            raise ValueError(
                f"lists must have every name once, got {repeated!r} twice; leave one place out"
            )
        swaps |= {one: other, other: one}
        swaps |= {one.upper(): other.upper(), other.upper(): one.upper()}
    return swaps
