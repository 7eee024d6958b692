"""Words in groups: the lists of the package, a file, or a mapping.

    gender | religion | ethnicity      a list of the package
    words.txt                          one word a line: one group, named after the file
    words.json                         {"group": ["word", ...], ...}

The project's authors chose the words of its lists: pronouns, kinship and roles of women, of men,
and of non-binary people together with the neutral forms; adherents and schools of religions;
demonyms. "Polish" is not "polish", so words have their English capitals. Short ones inside many
other words (ze, hir, gal, lad) are left out, because their tokens may be pieces of those. No list
is complete, and words have other meanings ("Black", "Native", "partner"): read the groups before
you rely on them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from fastdean.files.declared import Lists, Maps, Text, read_json, read_text, require
from fastdean.wording.mendable import InputTypeError

WORD_LISTS = ("gender", "religion", "ethnicity")

WordGroups = str | Path | Mapping[str, Sequence[str]]

# A form of a word, or the name of a group.
WORD = Text(longest=1000)
# The form of a file of words.
_GROUPS = Maps(Lists(WORD, least=1), least=1)
_MOST_BYTES = 1 << 24


def read_word_groups(groups: WordGroups) -> dict[str, list[str]]:
    """Group -> its words, in their order, without surrounding blanks or repetitions.

    Args:
        groups: see the module's docstring.
    Raises:
        ValueError: an unknown list, a file that is missing or of another form, a group or a word
            that is empty.
        TypeError: a group's words are not a sequence of text.
    """
    if isinstance(groups, Mapping):
        found = groups
    elif groups in WORD_LISTS:
        text = (resources.files("fastdean.data") / "words" / f"{groups}.json").read_text("utf-8")
        found = json.loads(text)
    elif isinstance(groups, str | Path):
        found = _read_file(Path(groups).expanduser())
    else:
        raise InputTypeError(
            f"groups must be a name, a file or a mapping of groups to words, got a "
            f'{type(groups).__name__}; write {{"group": ["word", ...]}}'
        )
    if not found:
        raise ValueError("groups must hold at least one group of words, got none; name one")
    return {str(name): _words_of(name, words) for name, words in found.items()}


def _read_file(path: Path) -> Mapping[str, Any]:
    if path.suffix not in (".txt", ".json"):
        raise ValueError(
            f"groups must be one of {', '.join(WORD_LISTS)}, a file ending in .txt or .json, or a "
            f"mapping of groups to words, got {str(path)!r}; choose one"
        )
    if not path.is_file():
        raise ValueError(f"groups must be an existing file, got {str(path)!r}; check the path")
    advice = "correct the file"
    if path.suffix == ".json":
        found = read_json(path, _GROUPS, advice=advice, most_bytes=_MOST_BYTES)
    else:
        lines = read_text(path, advice=advice, most_bytes=_MOST_BYTES).splitlines()
        found = {path.stem: [line for line in lines if line.strip()]}
        require(found, _GROUPS, path, advice=advice)
    try:
        return {name: _words_of(name, words) for name, words in found.items()}
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from None


def _words_of(name: str, words: Any) -> list[str]:
    if isinstance(words, str) or not isinstance(words, Sequence):
        raise InputTypeError(
            f"the words of group {name!r} must be a list, got a {type(words).__name__}; "
            'write ["word", ...]'
        )
    for word in words:
        if not isinstance(word, str):
            raise InputTypeError(
                f"the words of group {name!r} must be text, got {word!r}; write it in quotes"
            )
    stripped = list(dict.fromkeys(word.strip() for word in words))
    if not stripped or "" in stripped:
        found = "an empty one" if stripped else "none"
        raise ValueError(f"group {name!r} must hold words, got {found}; leave it out")
    return stripped
