"""How a tokenizer encodes a word: alone and after a space.

Byte-level ones have "he" and " he" as two tokens, SentencePiece has one for both ("▁he"), WordPiece
has no spaces. So every form is encoded; the spelling of a vocabulary's entries tells nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Hardly any tokenizer joins its token to the next word's.
_BEFORE = "a"


def written_forms(word: str, *, casing: bool, leading_space: bool) -> list[str]:
    """`word` as written, then with a capital; each also after a space if `leading_space`."""
    cased = [word, word[:1].upper() + word[1:]] if casing else [word]
    spaces = ("", " ") if leading_space else ("",)
    return list(dict.fromkeys(space + text for text in cased for space in spaces))


def encode_forms(tokenizer: Any, forms: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids of each form in running text, without special tokens.

    A form that begins with a space is encoded behind another word: alone it would have
    SentencePiece's own leading space twice.
    """
    before, *encoded = _encode(
        tokenizer, [_BEFORE, *(_BEFORE + form if form[0] == " " else form for form in forms)]
    )
    found = list(zip(forms, encoded, strict=True))
    joined = [form for form, ids in found if form[0] == " " and not _follows(before, ids)]
    alone = dict(zip(joined, _encode(tokenizer, joined), strict=True))
    return [alone.get(form, ids[len(before) :] if form[0] == " " else ids) for form, ids in found]


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[tuple[int, ...]]:
    if not texts:
        return []
    return [tuple(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def _follows(before: tuple[int, ...], ids: tuple[int, ...]) -> bool:
    return len(ids) > len(before) and ids[: len(before)] == before
