"""How far two judges agree beyond chance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from fastdean.wording.mendable import InputTypeError


@dataclass(frozen=True)
class Agreement:
    """Of two judges on the same answers.

    n: answers that both gave a label.
    share: of them, those with the same label; None for n = 0.
    kappa: Cohen's; None for n = 0, and where both gave one and the same label throughout.
    counts: (first's label, second's label) -> answers.
    """

    n: int
    share: float | None
    kappa: float | None
    counts: dict[tuple[Hashable, Hashable], int]

    def to_dict(self) -> dict[str, Any]:
        rows = [{"first": a, "second": b, "answers": n} for (a, b), n in self.counts.items()]
        return {"n": self.n, "share": self.share, "kappa": self.kappa, "counts": rows}


def cohen_kappa(first: Sequence[Hashable | None], second: Sequence[Hashable | None]) -> Agreement:
    """Agreement of two raters, with Cohen's kappa (1960).

        kappa = (p_o - p_e) / (1 - p_e)

    p_o is the share of equal labels, p_e what two raters with these frequencies of labels would
    reach by chance.

    Args:
        first, second: a label for each answer, None or NaN where there is none; such pairs do not
            count. A list, or an array or tensor of shape [n].

    Raises:
        ValueError: they are not of one length.
        TypeError: they are no lists of labels: words, numbers or the like.
    """
    first, second = _labels(first, "first"), _labels(second, "second")
    if len(first) != len(second):
        raise ValueError(
            f"second must have a label for each of first's {len(first)}, got {len(second)}; give "
            "both on the same answers"
        )
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if _is_label(a) and _is_label(b)]
    n = len(pairs)
    if n == 0:
        return Agreement(0, None, None, {})
    counts = Counter(pairs)
    own, other = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    same = sum(count for (a, b), count in counts.items() if a == b)
    # In whole numbers, so that 1 - p_e is 0 where it is.
    chance = sum(own[label] * other[label] for label in own)
    kappa = None if chance == n * n else (same * n - chance) / (n * n - chance)
    ordered = dict(sorted(counts.items(), key=lambda item: tuple(map(str, item[0]))))
    return Agreement(n, same / n, kappa, ordered)


def _labels(given: Any, name: str) -> list[Hashable | None]:
    """In a list, as Python's own values: a tensor's elements are equal, and hashed by place."""
    given = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(given, Sequence):
        raise InputTypeError(
            f"{name} must be a list of labels, got {type(given).__name__}; give one for each "
            "answer, in one order"
        )
    found = [each.tolist() if hasattr(each, "tolist") else each for each in given]
    for place, label in enumerate(found):
        try:
            hash(label)
        except TypeError:
            raise InputTypeError(
                f"{name} must hold a label for each answer, such as a word or a number, got "
                f"{label!r:.80} at index {place}; give one label, not several"
            ) from None
    return found


def _is_label(label: Hashable | None) -> bool:
    # Tables hold NaN where a value is missing, which is not even equal to itself.
    return label is not None and label == label
