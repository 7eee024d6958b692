"""Which bias measures a job is asked for, and whether they can be taken."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from fastdean.evaluation import bias as measures
from fastdean.evaluation import over_refusal
from fastdean.evaluation.bias.bbq import bbq_rows
from fastdean.evaluation.bias.bec_pro import rows_of as bec_pro_source_rows
from fastdean.evaluation.bias.crows_pairs import crows_pairs_rows
from fastdean.evaluation.bias.gender_facts import gender_fact_rows
from fastdean.evaluation.bias.seat import seat_sets
from fastdean.evaluation.bias.start import start_token as start_of
from fastdean.evaluation.bias.stereoset import stereoset_rows
from fastdean.evaluation.bias.winobias import winobias_rows
from fastdean.evaluation.over_refusal import benign_rows
from fastdean.models.label_shift import label_shift


def _winobias(model: nn.Module, tokenizer: Any, *source: str, **options: Any) -> Any:
    """Without the published pairs that differ in more than their pronouns; the note counts them."""
    return measures.winobias(model, tokenizer, *source, mismatched="leave_out", **options)


def _bec_pro(model: nn.Module, tokenizer: Any, *source: str, **options: Any) -> Any:
    """On one of the four templates where no file is given: a quarter of the time, twice a job."""
    rows = source or (measures.bec_pro_rows(templates=measures.TEMPLATES[:1]),)
    return measures.bec_pro(model, tokenizer, *rows, **options)


# Name -> the function, and whether it needs a source.
MEASURES: dict[str, tuple[Callable[..., Any], bool]] = {
    "crows_pairs": (measures.crows_pairs, False),
    "stereoset": (measures.stereoset, False),
    "winobias": (_winobias, False),
    "seat": (measures.seat, True),
    "bec_pro": (_bec_pro, False),
    "bbq": (measures.bbq, False),
    "gender_facts": (measures.gender_facts, False),
    "over_refusal": (over_refusal, False),
}
# Name -> what reads its source, before there is a model.
READERS: dict[str, Callable[[str], object]] = {
    "crows_pairs": crows_pairs_rows,
    "stereoset": stereoset_rows,
    "winobias": winobias_rows,
    "seat": seat_sets,
    "bec_pro": bec_pro_source_rows,
    "bbq": bbq_rows,
    "gender_facts": gender_fact_rows,
    "over_refusal": benign_rows,
}
# Those that rest on likelihoods, and so on the token that a text starts from.
FROM_START = frozenset({"crows_pairs", "stereoset", "winobias", "bec_pro", "bbq", "gender_facts"})
# Those that ask prompts, and so in a template, and which there are.
PROMPTED = frozenset({"over_refusal"})
_TEMPLATES = ("raw", "chat")
# Of files that measures read.
_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")

# Advice to pass the argument of a measure.
_TEMPLATE = re.compile(r"(?<![\w'])template=")


def check(asked: Sequence[str], start: str | int = "auto", template: str | None = None) -> None:
    """Raise ValueError unless every entry is `name` or `name=SRC` of a known measure, once.

    Also for a `start` other than "auto" and for a `template` that none of them would use.
    """
    for entry in asked:
        name, source = parts(entry)
        if name not in MEASURES:
            raise ValueError(
                f"bias must be one of {', '.join(MEASURES)}, got {name!r}; pass NAME, or NAME=SRC "
                "for rows of your own"
            )
        if entry.endswith("="):
            raise ValueError(
                f"bias {entry!r} must name a source behind its '=', got none; write {name}=FILE"
            )
        if MEASURES[name][1] and source is None:
            raise ValueError(
                f"bias {name!r} must come with its file, got the name alone; write {name}=FILE"
            )
    doubled = sorted({entry for entry in asked if list(asked).count(entry) > 1})
    if doubled:
        raise ValueError(f"bias must name each measure once, got {doubled[0]!r} again")
    if start != "auto" and not any(parts(entry)[0] in FROM_START for entry in asked):
        raise ValueError(
            "start_token must be 'auto' without a measure of "
            f"{', '.join(sorted(FROM_START))}, got "
            f"{start!r}; leave it out"
        )
    if template is None:
        return
    if template not in _TEMPLATES:
        raise ValueError(
            f"bias_template must be one of {', '.join(_TEMPLATES)}, got {template!r}; leave it "
            "out for chat where the tokenizer has a template"
        )
    if not any(parts(entry)[0] in PROMPTED for entry in asked):
        raise ValueError(
            f"bias_template must come with a measure of {', '.join(sorted(PROMPTED))}, got "
            f"{template!r}; leave it out"
        )


def require_readable(asked: Sequence[str]) -> None:
    """Refuse files before a model is loaded, and not when their measure runs.

    What may be of the hub is left to its measure: a run that is resumed may not need it any more.

    Raises:
        ValueError, OSError: a file that is not there, cannot be read, or has other columns.
    """
    for entry in asked:
        name, source = parts(entry)
        file = Path((source or "").partition("::")[0]).expanduser()
        # Without a suffix it may be of the hub.
        if source is not None and file.suffix.lower() in _SUFFIXES and not file.exists():
            raise ValueError(
                f"bias {entry!r} must name an existing file, got {str(file)!r}; check the path"
            )
        if source is not None and file.exists():
            with named(f"bias {entry!r}", "source"):
                READERS[name](source)


def require_start(asked: Sequence[str], start: str | int, model: nn.Module, tokenizer: Any) -> None:
    """Raise ValueError for a start that the tokenizer does not have, if a measure asks for one."""
    if any(parts(entry)[0] in FROM_START for entry in asked):
        masked = label_shift(model) == 0
        with named("start_token", "start"):
            start_of(tokenizer, start, masked=masked)


@contextmanager
def named(name: str, below: str) -> Iterator[None]:
    """A ValueError calls what it is about by the name that the job has for it."""
    try:
        yield
    except ValueError as error:
        # A job's `template`, where it has one, is of other rows.
        text = _TEMPLATE.sub("bias_template=", str(error))
        if text.startswith(f"{below} "):
            raise ValueError(f"{name} {text.removeprefix(below).lstrip()}") from error
        # A row, for example: of which source is not said below.
        raise ValueError(f"{name}: {text}") from error


def parts(entry: str) -> tuple[str, str | None]:
    name, _, source = entry.partition("=")
    return name, source or None
