"""Text with its gendered words swapped: she for he, her mother for his father, Mary for James.

The lists of `gender_words` give each word its counterpart, or several, by the word's use, which the
words beside it tell:

- her, his: a determiner before a word that is none of `_FUNCTION_WORDS` ("her car", "his own
  book"), else "her" is an object and "his" a pronoun ("saw her in town", "the car is his.").
  Wrong where an object meets a noun or verb ("gave her flowers", "let her win").
- a title: capitalised before a capitalised word ("Sir John", "Father Brown"; also "Founding
  Fathers"); elsewhere capitalised "Lord" is the deity.
- a verb: "groom" after "to", a modal or a personal pronoun; "miss" where it is no title.

A swapped word has the case of the original: lower, Capitalised or UPPER. Names in lower case
("grace", "mark") and words of mixed case are not swapped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fastdean.debias.gender_words import GenderWords

_TEXT_KEYS = ("prompt", "response", "unsafe", "text", "premise", "hypothesis")

# Words that begin no noun phrase after a possessive. All gendered pronouns are among them and no
# gendered noun is, so that swapping the next word never changes the use of this one.
_FUNCTION_WORDS_LISTED = """
a an the this that these those some any every each all both no not
i you we they it he she me us them him her his hers himself herself mine yours theirs who whom
and or but nor so yet because although though while when whenever where wherever if unless
until till since before after as than whether how why what
about above across against along among around at behind below beneath beside besides between
beyond by despite down during except for from in inside into near of off on onto out outside
over past per through throughout to toward towards under up upon via with within without
is are was were be been being am has have had do does did will would shall should can could
may might must
again ago alone already also always away else ever forever here instead now often once please
rather right sometimes soon there then today together tomorrow tonight too twice yesterday
"""
_BEFORE_A_VERB_LISTED = """
to i you we they who will would shall should can could may might must do does did not
"""
_FUNCTION_WORDS = frozenset(_FUNCTION_WORDS_LISTED.split())
_BEFORE_A_VERB = frozenset(_BEFORE_A_VERB_LISTED.split())
_NEXT_WORD = re.compile(r"\s+[\"'“‘]?(\w+)")
_PREVIOUS_WORD = re.compile(r"(\w+)[\"'”’]?\s+\Z")
# Characters searched for the previous word; a bound for long texts.
_LOOK_BACK = 40


def counterfactual(text: str, *, lists: Mapping[str, Any] | None = None) -> str | None:
    """`text` with its gendered words and names swapped, or None where nothing was.

    Twice gives the original for the words whose counterpart is theirs alone; `irreversible_words`
    lists the others.

    Args:
        text: any text; only whole words are looked at.
        lists: in the form of `gender_words`; None: the lists of the package.
    Raises:
        ValueError: the lists are not of that form.
    """
    return _swap_text(text, GenderWords.from_lists(lists))


def irreversible_words(*, lists: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """The words, sorted, that swapping twice may not give back; see `GenderWords.irreversible`."""
    return GenderWords.from_lists(lists).irreversible()


def augment(
    rows: Iterable[Mapping[str, Any]], *, lists: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Return each row followed by its gender-swapped copy, so that both occur equally often.

    Args:
        rows: of `fastdean.data.load_rows`: text, prompt and response, messages, or premise and
            hypothesis. Other columns are copied.
        lists: see `counterfactual`.
    Returns:
        New dictionaries; a row in which nothing was swapped has no copy.
    Raises:
        ValueError: the lists are not of that form, or a turn of `messages` has no "content".
    """
    words = GenderWords.from_lists(lists)
    augmented = []
    for row in rows:
        augmented.append(dict(row))
        swapped = {key: _swap_value(value, key, words) for key, value in row.items()}
        if swapped != dict(row):
            augmented.append(swapped)
    return augmented


def _swap_value(value: Any, key: str, words: GenderWords) -> Any:
    if key == "messages" and value is not None:
        return [_swap_turn(turn, words) for turn in value]
    return _swapped_or_same(value, words) if key in _TEXT_KEYS else value


def _swap_turn(turn: Any, words: GenderWords) -> dict[str, Any]:
    if not isinstance(turn, Mapping) or "content" not in turn:
        found = f"the keys {sorted(turn)}" if isinstance(turn, Mapping) else f"{turn!r:.80}"
        raise ValueError(
            f'messages must be turns with a "content", got {found}; write "content": null where a '
            "turn has no text"
        )
    return {**turn, "content": _swapped_or_same(turn["content"], words)}


def _swapped_or_same(value: Any, words: GenderWords) -> Any:
    swapped = _swap_text(value, words) if isinstance(value, str) else None
    return value if swapped is None else swapped


def _swap_text(text: str, words: GenderWords) -> str | None:
    swapped = words.pattern.sub(lambda match: _swap_word(match, words), text)
    return None if swapped == text else swapped


def _swap_word(match: re.Match[str], words: GenderWords) -> str:
    word = match.group().replace("’", "'")
    if word in words.names:
        return words.names[word]
    recase = _case_of(word)
    if recase is None:
        return match.group()
    plain = word.lower()
    if plain in words.uses:
        use = _use_of(plain, match, words.uses[plain])
        counterpart = None if use is None else words.uses[plain].get(use)
    else:
        counterpart = words.swaps.get(plain)
    return match.group() if counterpart is None else recase(counterpart)


def _case_of(word: str) -> Callable[[str], str] | None:
    """Gives another word this one's case; None where that is mixed."""
    for recase in (str.lower, _capitalised, str.upper, _capitalised_parts):
        if word == recase(word):
            return recase
    return None


def _capitalised(word: str) -> str:
    return word[:1].upper() + word[1:].lower()


def _capitalised_parts(word: str) -> str:
    return "-".join(_capitalised(part) for part in word.split("-"))


def _use_of(word: str, match: re.Match[str], uses: Mapping[str, str | None]) -> str | None:
    """One of the word's listed uses, by the rules of the module's docstring."""
    following, previous = _neighbours(match)
    if "determiner" in uses:
        if following and following.lower() not in _FUNCTION_WORDS:
            return "determiner"
        return next((use for use in ("object", "pronoun") if use in uses), None)
    if "title" in uses and _is_title(match.group(), following, previous):
        return "title"
    if "deity" in uses and _is_capitalised(match.group()):
        return "deity"
    if "verb" in uses and (previous.lower() in _BEFORE_A_VERB or "noun" not in uses):
        return "verb"
    return next((use for use in ("noun", "address") if use in uses), None)


def _neighbours(match: re.Match[str]) -> tuple[str, str]:
    """The words after and before, or "" where anything but space is between."""
    text, start = match.string, match.start()
    following = _NEXT_WORD.match(text, match.end())
    previous = _PREVIOUS_WORD.search(text[max(0, start - _LOOK_BACK) : start])
    return (following.group(1) if following else "", previous.group(1) if previous else "")


def _is_title(word: str, following: str, previous: str) -> bool:
    if not _is_capitalised(word):
        return False
    plural = word.endswith("s")
    return _is_capitalised(previous if plural and previous else following)


def _is_capitalised(word: str) -> bool:
    return len(word) > 1 and word[0].isupper() and word[1:].islower()
