"""Classes of tokens: those of chosen words, for one tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional

from fastdean.collapse.forms import encode_forms, written_forms
from fastdean.collapse.matching import MAX_ID, Matcher
from fastdean.collapse.words import WORD, WordGroups, read_word_groups
from fastdean.data.batching import send
from fastdean.default_device import cpu_by_default
from fastdean.files.declared import Lists, Record, Row, Text, Whole, brief, require
from fastdean.models.ranks.sharded_rows import SharedRows
from fastdean.models.ranks.shards import is_sharded
from fastdean.wording.mendable import InputTypeError

MultiPiece = Literal["skip", "mean"]

_REASONS_SHOWN = 8
# The form of `to_dict`. Every class takes as much memory as the longest, so its length is bounded.
_STORED = Record(
    {
        "pieces": Lists(Lists(Whole(most=MAX_ID), least=1, most=1000)),
        "words": Lists(WORD),
        "groups": Lists(WORD),
        "left_out": Lists(Row((WORD, WORD, Text(longest=1000)))),
    }
)


class LeftOut(NamedTuple):
    """A form of a word that has no class, and the reason."""

    word: str
    group: str
    reason: str


@dataclass(frozen=True)
class CollapseClasses:
    """K classes, each of one token id, or of several for a word of several pieces.

    "he", " he", "He" and " He" are different classes where the tokenizer has a token for each, and
    one where it has one for all. A token counts everywhere, also as a piece of a longer word: "son"
    of "Stephenson", " he" of " heather" in some vocabularies.

    Attributes:
        pieces: the token ids of each class.
        words: the form of the word that was encoded, e.g. " she".
        groups: the name of the group each class belongs to.
        left_out: the forms that became no class, and why. A form that shares its token with another
            form in its group is in that class and not left out.
    Raises:
        ValueError: no classes, lengths that differ, pieces that are no token ids, or the same
            pieces twice.
    """

    pieces: tuple[tuple[int, ...], ...]
    words: tuple[str, ...]
    groups: tuple[str, ...]
    left_out: tuple[LeftOut, ...] = ()
    _tables: dict[torch.device, _Tables] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        lengths = (len(self.pieces), len(self.words), len(self.groups))
        if not self.pieces or len(set(lengths)) > 1:
            raise ValueError(
                "pieces, words and groups must have one entry for each of at least one class, got "
                f"{lengths[0]}, {lengths[1]} and {lengths[2]}; use from_words"
            )
        for pieces in self.pieces:
            if not pieces or not all(
                type(piece) is int and 0 <= piece <= MAX_ID for piece in pieces
            ):
                raise ValueError(
                    f"pieces must be token ids, at least one for each class, got {pieces!r}; "
                    "use from_words"
                )
        ((pieces, times),) = Counter(self.pieces).most_common(1)
        if times > 1:
            raise ValueError(
                f"pieces must differ from class to class, got {pieces!r} {times} times; "
                "leave the others out"
            )

    @classmethod
    def from_words(
        cls,
        tokenizer: Any,
        groups: WordGroups,
        *,
        multi_piece: MultiPiece = "skip",
        casing: bool = True,
        leading_space: bool = True,
    ) -> CollapseClasses:
        """Make the classes of grouped words, for one tokenizer.

        Args:
            tokenizer: of transformers, fast or slow, with any vocabulary.
            groups: "gender", "religion", "ethnicity"; a file, .txt with one word a line or .json
                with {"group": ["word", ...]}; or a mapping like the latter.
            multi_piece: "skip" leaves a form of several tokens out, "mean" makes these tokens one
                class, whose positions and rows are averaged. The published code uses the first
                piece instead, so that " and" became a class.
            casing: also the form with a capital first letter. No form is made lower case.
            leading_space: also the form that follows a space. Where that one splits, a form that
                is one token without a space is left out too: a piece of other words, not a word.
        Raises:
            ValueError: no form is left; a token is in two groups; the groups cannot be read.
            TypeError: the groups are no words.
        """
        if multi_piece not in get_args(MultiPiece):
            raise ValueError(
                f"multi_piece must be 'skip' or 'mean', got {multi_piece!r}; 'mean' averages the "
                "pieces of a word"
            )
        forms = [
            (form, group)
            for group, words in read_word_groups(groups).items()
            for word in words
            for form in written_forms(word, casing=casing, leading_space=leading_space)
        ]
        encoded = encode_forms(tokenizer, [form for form, _ in forms])
        in_text = dict(zip((form for form, _ in forms), encoded, strict=True))
        kept: dict[tuple[int, ...], tuple[str, str]] = {}
        left_out: dict[tuple, LeftOut] = {}
        for (form, group), pieces in zip(forms, encoded, strict=True):
            reason = _reason_against(pieces, tokenizer, multi_piece)
            if len(pieces) == 1 < len(in_text.get(f" {form}", pieces)):
                reason = "is a token only where no space precedes it"
            if reason:
                # Once, where the forms of a word are the same to the tokenizer.
                key = (form.strip().casefold(), group, pieces)
                left_out.setdefault(key, LeftOut(form, group, reason))
                continue
            first = kept.setdefault(pieces, (form, group))
            if first[1] != group:
                raise ValueError(
                    f"groups must share no token, got {form!r} of {group!r} with the token ids "
                    f"{list(pieces)} of {first[0]!r} in {first[1]!r}; leave one of them out"
                )
        if not kept:
            raise ValueError(_no_class_message(left_out.values()))
        words, names = zip(*kept.values(), strict=True)
        return cls(tuple(kept), words, names, tuple(left_out.values()))

    def __len__(self) -> int:
        return len(self.pieces)

    def __repr__(self) -> str:
        """The groups with their sizes; `report` has the words."""
        counted = Counter(self.groups)
        groups = ", ".join(f"{brief(group)[:30]} {n}" for group, n in islice(counted.items(), 8))
        more = f" and {len(counted) - 8} more groups" if len(counted) > 8 else ""
        return (
            f"CollapseClasses({len(self)} classes: {groups}{more}; "
            f"{len(self.left_out)} forms left out)"
        )

    def labels(self, token_ids: Tensor) -> Tensor:
        """The class of the token at each position; the host does not wait for the device.

        Every piece of a word has its class. A word counts only whole and inside one row, the last
        dimension. Where words overlap, the longest counts, of equally long ones the first.

        Args:
            token_ids: integers [..., T]. Values that are no token ids are of no class.
        Returns:
            int64, shape and device of the input: 0..K-1, or -1 for no class.
        Raises:
            TypeError, ValueError: no integers, or a single number.
        """
        kind = token_ids.dtype
        if kind.is_floating_point or kind.is_complex or kind == torch.bool:
            raise InputTypeError(
                f"token_ids must be integers, got {kind}; pass what the tokenizer gave"
            )
        if token_ids.dim() == 0:
            raise ValueError("token_ids must be [..., T], got a single number; pass a row")
        return self._on(token_ids.device).matcher.labels(token_ids.long())

    @property
    def token_ids(self) -> list[int]:
        """Every token id of a class, ascending and once."""
        return sorted({piece for pieces in self.pieces for piece in pieces})

    def rows(self, embedding: Tensor) -> Tensor:
        """The rows of the classes in an embedding, differentiable.

        `embedding[ids]` for classes of one token; else the mean over each class's pieces, computed
        in fp32 at least.

        Args:
            embedding: [V, D], of any floating dtype. Of one that is sharded over ranks (a DTensor)
                the rows alone are gathered, by all ranks together.
        Returns:
            [K, D] in the dtype of `embedding`.
        Raises:
            ValueError: not a matrix, or with too few rows for the classes' tokens; or a sharded one
                whose rows would need a gradient, which only who knows the model can put together.
        """
        self.check_embedding(embedding)
        if is_sharded(embedding):
            if embedding.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    "embedding must be a plain tensor where its rows need a gradient, got one that "
                    "is sharded over ranks; use CollapseRegularizer, or pass embedding.detach()"
                )
            return self.rows_of_listed(SharedRows(embedding, self.token_ids).gathered(embedding))
        tables = self._on(embedding.device)
        return _class_rows(functional.embedding(tables.pieces, embedding), tables)

    def rows_of_listed(self, listed: Tensor) -> Tensor:
        """`rows` of an embedding of which the rows of `token_ids` are given, [P, D]."""
        tables = self._on(listed.device)
        return _class_rows(functional.embedding(tables.places, listed), tables)

    def check_embedding(self, embedding: Tensor) -> None:
        """Raise ValueError unless an embedding is a matrix with a row for each token."""
        largest = max(map(max, self.pieces))
        if embedding.dim() != 2 or len(embedding) <= largest:
            raise ValueError(
                f"embedding must be [V, D] with V above {largest}, the largest token id, got "
                f"{list(embedding.shape)}; use the tokenizer of this model"
            )

    def report(self, most: int | None = 12) -> str:
        """The words of each group and those left out, as text.

        Args:
            most: words of each list that are named, the rest is counted; None: all.
        """
        lines = [f"{len(self)} classes, {len(self.left_out)} forms left out"]
        for group in dict.fromkeys((*self.groups, *(left.group for left in self.left_out))):
            kept = [w for w, g in zip(self.words, self.groups, strict=True) if g == group]
            left_out = [left for left in self.left_out if left.group == group]
            lines += ["", *_group_report(group, kept, left_out, most)]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "pieces": [list(pieces) for pieces in self.pieces],
            "words": list(self.words),
            "groups": list(self.groups),
            "left_out": [list(left) for left in self.left_out],
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> CollapseClasses:
        """The classes that `to_dict` described.

        Raises: ValueError if an entry is missing or does not describe classes.
        """
        require(stored, _STORED, "stored", advice="pass what to_dict() gave")
        return cls(
            tuple(tuple(pieces) for pieces in stored["pieces"]),
            tuple(stored["words"]),
            tuple(stored["groups"]),
            tuple(LeftOut(*left) for left in stored["left_out"]),
        )

    def _on(self, device: torch.device) -> _Tables:
        if device not in self._tables:
            # They are part of later backward passes: no tensors of an inference mode.
            with torch.inference_mode(False):
                self._tables[device] = _tables(self.pieces, device)
        return self._tables[device]


class _Tables(NamedTuple):
    """The tensors of `labels` and `rows` on one device.

    Attributes:
        pieces: int64 [K, longest]; shorter words are padded with their first id.
        places: the same as places in `token_ids`.
        present: bool [K, longest], False on padding.
    """

    matcher: Matcher
    pieces: Tensor
    places: Tensor
    present: Tensor


@cpu_by_default
def _tables(words: Sequence[tuple[int, ...]], device: torch.device) -> _Tables:
    longest = max(map(len, words))
    pieces = torch.tensor([[*word, *word[:1] * (longest - len(word))] for word in words])
    present = [[place < len(word) for place in range(longest)] for word in words]
    return _Tables(
        Matcher(words, device),
        send(pieces, device),
        send(torch.unique(pieces, return_inverse=True)[1], device),
        send(torch.tensor(present), device),
    )


def _class_rows(rows: Tensor, tables: _Tables) -> Tensor:
    """[K, D] of the rows of each class's pieces, [K, longest, D]."""
    if rows.shape[1] == 1:
        return rows.squeeze(1)
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    total = (wide * tables.present.unsqueeze(-1)).sum(1)
    return (total / tables.present.sum(1, keepdim=True)).to(rows.dtype)


def _reason_against(pieces: tuple[int, ...], tokenizer: Any, multi_piece: MultiPiece) -> str | None:
    if not pieces:
        return "has no token"
    if tokenizer.unk_token_id in pieces:
        return "is unknown to the tokenizer"
    if len(pieces) > 1 and multi_piece == "skip":
        return f"splits into {len(pieces)} pieces"
    return None


def _no_class_message(left_out: Iterable[LeftOut]) -> str:
    reasons = [f"{left.word!r} {left.reason}" for left in left_out]
    more = len(reasons) - _REASONS_SHOWN
    return (
        "groups must hold a word that is one token of the tokenizer, got none: "
        + ", ".join(reasons[:_REASONS_SHOWN])
        + (f" and {more} more" if more > 0 else "")
        + "; choose other words, or pass multi_piece='mean'"
    )


def _group_report(
    group: str, kept: Sequence[str], left_out: Sequence[LeftOut], most: int | None
) -> list[str]:
    words: dict[str, str] = {}
    for form in kept:
        words.setdefault(form.strip().casefold(), form.strip())
    whole: dict[str, str] = {}
    partly: list[str] = []
    for left in left_out:
        bare = left.word.strip()
        if bare.casefold() in words:
            partly.append(repr(left.word))
        else:
            whole.setdefault(bare.casefold(), f"{bare} ({left.reason})")
    lines = [f"{group}: {len(kept)} classes of {len(words)} words; {len(whole)} words left out"]
    for title, entries in (
        ("kept", words.values()),
        ("left out", whole.values()),
        ("left out in some forms", partly),
    ):
        if entries:
            named = [*entries][:most]
            more = len(entries) - len(named)
            lines.append(f"  {title}: {', '.join(named)}{f' and {more} more' if more else ''}")
    return lines
