"""What a file of answers holds, and how it is read: one of ours, or anybody's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdean.data.columns import has_lone_surrogate
from fastdean.data.prompts import prompt_row, prompt_text
from fastdean.data.sources import load_table
from fastdean.evaluation.answers.generation import Answer
from fastdean.files.declared import Anything, Either, Kind, Maybe, Misfit, Record, Text, Whole

ORIGINAL = "original"
VARIANT = Text(longest=1000)
_LONGEST = 100_000_000
RECORD = Record(
    {
        "id": Whole(least=1),
        "variant": VARIANT,
        "prompt": Text(longest=_LONGEST),
        "answer": Text(longest=_LONGEST),
        "tokens": Maybe(Whole()),
        "finish": Text(longest=1000),
    },
    optional={"messages": Anything()},
)
# What tells one answer from another.
KEY = ("variant", "id")
ANY_ID = Either((Whole(), Text(longest=1000)))


@dataclass(frozen=True)
class Answered:
    """An answer and what it answers.

    id: of the prompt; the answers of all variants to one prompt share it.
    variant: which model answered, as in "original".
    """

    id: int | str
    variant: str
    prompt: str
    answer: str


def record(number: int, row: Mapping[str, Any], variant: str, answer: Answer) -> dict[str, Any]:
    """A line of an answers file.

    Args:
        number: of the prompt in its source, from 1.
        row: as `prompts.prompt_row` gives it.
    """
    asked = {"messages": row["messages"]} if "messages" in row else {}
    return {
        "id": number,
        "variant": variant,
        "prompt": prompt_text(row),
        **asked,
        "answer": answer.text,
        "tokens": answer.tokens,
        "finish": answer.finish,
    }


def require_variant(argument: str, name: Any) -> None:
    """Raise ValueError unless answers may be those of a variant of this name."""
    fault = _fault_of_variant(name)
    if fault is not None:
        raise ValueError(
            f"{argument} must be {fault.expected} as the name of its answers, got {fault.got}; "
            "choose another name"
        )


def _fault_of_variant(name: Any) -> Misfit | None:
    return Misfit("", "a text", "an empty one") if name == "" else _fault(name, VARIANT)


def _fault(value: Any, kind: Kind) -> Misfit | None:
    try:
        kind.check(value, "")
    except Misfit as misfit:
        return misfit
    return None


def read_answers(source: str) -> list[Answered]:
    """The answers of a file: ours, or any table with `prompt` and `answer` (or `response`).

    A row without `id` has its number as its id, one without `variant` is "original".

    Raises:
        ValueError: no such file, a row that lacks text, or two answers of one variant to one id.
    """
    place = Path(source).expanduser()
    inside = place / "answers.jsonl"
    try:
        rows = load_table(str(inside) if place.is_dir() else source)
    except ValueError as error:
        raise ValueError(re.sub(r"^source\b", "answers", str(error))) from None
    found = [_answered(row, number, source) for number, row in enumerate(rows, start=1)]
    seen: set[tuple[str, int | str]] = set()
    for each in found:
        if (each.variant, each.id) in seen:
            raise ValueError(
                f"answers {source!r} must have one answer of each variant to each id, got two of "
                f"{each.variant!r} to {each.id!r}; give each its own id"
            )
        seen.add((each.variant, each.id))
    return found


def variants_of(answers: Sequence[Answered]) -> list[str]:
    """The variants, in the order of their first answers, the original first."""
    names = dict.fromkeys(each.variant for each in answers)
    return sorted(names, key=lambda name: name != ORIGINAL)


def _answered(row: Any, number: int, source: str) -> Answered:
    def refused(text: str) -> ValueError:
        return ValueError(f"answers {source!r}: row {number} {text}")

    if not isinstance(row, Mapping):
        raise refused(f"must be an object, got {type(row).__name__}; see `fastdean answer`")
    try:
        asked = prompt_row(row, asked={"prompt": row["prompt"]} if "prompt" in row else {})
        prompt = prompt_text(asked)
    except ValueError as error:
        raise refused(str(error)) from None
    text = row.get("answer", row.get("response"))
    if not isinstance(text, str) or has_lone_surrogate(text):
        raise refused(
            f"must have text in the column 'answer' or 'response', got {sorted(map(str, row))}; "
            "rename the column"
        )
    own, variant = row.get("id", number), row.get("variant", ORIGINAL)
    for name, fault in (("id", _fault(own, ANY_ID)), ("variant", _fault_of_variant(variant))):
        if fault is not None:
            raise refused(f"must have {fault.expected} as its {name}, got {fault.got}; correct it")
    return Answered(own, variant, prompt, text)
