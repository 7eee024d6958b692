"""What results look like, in memory and in their file: any section and any figure may be missing.

A figure is a number or null; what is not finite is allowed in memory and never in a file, where
JSON has no word for it. Keys that no section knows hold anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdean.files.declared import (
    Anything,
    Either,
    Flag,
    Kind,
    Lists,
    Maps,
    Maybe,
    Number,
    Record,
    Row,
    Text,
    Whole,
    read_json,
)

_ANYTHING = Anything(finite=False)
_WORDS = Text(longest=1_000_000)


def _partial(**fields: Kind) -> Record:
    """An object of which any field may be missing or null, and which may hold others."""
    optional = {name: Maybe(kind) for name, kind in fields.items()}
    return Record(optional=optional, others=_ANYTHING)


def _numbers(*names: str, **fields: Kind) -> Record:
    return _partial(**dict.fromkeys(names, Number()), **fields)


# What the answers of the unedited model are called.
ORIGINAL = "original"
COUNTS = ("numel", "k", "first", "second", "coupled", "removed", "kept")
# Of a mask whose scores had signs.
SIGNS = ("same", "opposite", "same_by_chance")
_ENDS = _numbers("value", "low", "high", "n", "p_value", "p_holm", "detects")
# A change of a measure: also how many items changed and, in %, how many of all may.
_MOVED = _numbers(
    *("value", "low", "high", "n", "p_value", "p_holm", "detects"), "changed", "changed_most"
)
# A change with its test, and of texts the divergence from the unedited model.
_CHANGE = _numbers(
    *("mean", "low", "high", "weights", "value", "ratio", "p_value", "p_holm", "detects"),
    *("changed", "changed_most"),
    kl=_numbers("mean", "low", "high"),
)
_MASKS = Maps(Maybe(_CHANGE))
# How tests that are read together were adjusted for each other.
_TESTS = _numbers("tests", "confidence", "confidence_of_each", "power")

_PERPLEXITY = _numbers("origin", "tokens", masks=_MASKS, text=_WORDS, set=_WORDS)

# Part of an example's text, and what it is: prompt or target.
_SHOWN = Row((_WORDS, _WORDS))

# Of each figure of a measure: the model before and, where it was changed, after.
_MEASURES = Maps(
    Maybe(
        _numbers(
            "neutral",
            unit=_WORDS,
            definition=_WORDS,
            before=_ENDS,
            after=_ENDS,
            change=_MOVED,
            raw_change=_MOVED,
        )
    )
)
_ID = Either((Whole(), _WORDS))
_SAID = Maps(Maybe(_WORDS))
# Answers of several models to the same prompts, those that differ first.
_ANSWERS = _numbers(
    "of",
    variants=Maps(_numbers("prompts", "changed", "refusals", "empty", change=_CHANGE)),
    tests=_TESTS,
    rows=Lists(
        _partial(
            id=_ID,
            prompt=_WORDS,
            answers=_SAID,
            refusals=Maps(Maybe(Flag())),
            verdicts=Maps(_SAID),
        )
    ),
)
_JUDGED = _numbers(
    *("answers", "safe", "unsafe", "unparsed", "safe_by_refusing", "safe_by_answering"),
    *("refusals", "refusals_by_phrases"),
    judge=_WORDS,
    variant=_WORDS,
    awareness=_numbers("share", "low", "high", "n"),
)
_COMPARED = _numbers("pairs", judge=_WORDS, variant=_WORDS, change=_CHANGE)

_GROUP = Record(
    dict.fromkeys(("modules", "parameters", "scored", "unscorable"), Whole()), others=_ANYTHING
)

RESULTS = _partial(
    title=_WORDS,
    created=_WORDS,
    command=_WORDS,
    versions=Maps(_ANYTHING),
    findings=Lists(_ANYTHING),
    warnings=Lists(_ANYTHING),
    model=_numbers("parameters", name=_WORDS),
    data=Maps(_numbers("examples", "tokens", "target_tokens", source=_WORDS, sha256=_WORDS)),
    options=Maps(_ANYTHING),
    shown=Maps(_partial(row=Number(), tokens=Number(), rendered=_WORDS, parts=Lists(_SHOWN))),
    coverage=_numbers(
        "scored_parameters", "targets", "share", groups=Maps(_GROUP), left_out=Maps(_WORDS)
    ),
    coupling=_partial(
        rows=Lists(_numbers(*COUNTS, *SIGNS, name=_WORDS, module=_WORDS, layer=Whole())),
        total=_numbers(*COUNTS, *SIGNS),
    ),
    # Of a mixture of experts, by data set.
    expert_load=Maps(
        Maybe(
            Lists(
                _numbers(
                    *("layer", "experts", "tokens", "least", "median", "most", "number_unseen"),
                    name=_WORDS,
                    counts=_WORDS,
                    unseen=_WORDS,
                    shared=Lists(_WORDS),
                )
            )
        )
    ),
    overlap=Lists(_numbers("ratio", "k", "coupled", "expected_by_chance", "removed", "kept")),
    margins=Maps(
        Maybe(
            _numbers(
                "pairs",
                "confidence",
                unit=_WORDS,
                origin=_numbers("mean", "low", "high"),
                masks=_MASKS,
            )
        )
    ),
    perplexity=_PERPLEXITY,
    tests=_TESTS,
    general_grid=_numbers(
        "chosen",
        tests=_TESTS,
        rows=Lists(
            _numbers("general_ratio", "selected", "weights", margins=_MASKS, perplexity=_MASKS)
        ),
    ),
    # In its place where several sets are spared.
    perplexities=Maps(Maybe(_PERPLEXITY)),
    hsic=_numbers(
        "n",
        layers=Lists(
            _numbers("before", "after", "null_low", "null_high", layer=Either((Whole(), _WORDS)))
        ),
    ),
    collapse=_partial(
        metrics=Maps(
            Maybe(
                _partial(
                    definition=_WORDS,
                    values=Maps(Maybe(Either((Number(), _WORDS)))),
                    notes=Maps(_WORDS),
                )
            )
        ),
        classes=_numbers("kept", "left_out", groups=Maps(Maybe(Number()))),
        settings=Maps(_ANYTHING),
        # By state of the model: of a group of words, and of each word.
        groups=Maps(Maps(_numbers("words", "nc3_mean", "unc3_std", "nc1_k1"))),
        words=Lists(_numbers("tokens", word=_WORDS, group=_WORDS, alignment=Maps(Maybe(Number())))),
    ),
    training=_partial(
        history=Lists(_numbers("step", "loss", "base", "collapse")),
        evaluations=Lists(Maps(_ANYTHING)),
    ),
    bias=_MEASURES,
    # Of `eval`.
    measures=_MEASURES,
    # Of a run: what else its masks changed.
    price=Maps(
        Maybe(_numbers("neutral", unit=_WORDS, definition=_WORDS, origin=_ENDS, masks=_MASKS))
    ),
    answers=_ANSWERS,
    judged=Lists(_JUDGED),
    judges=Maps(Maps(_ANYTHING)),
    agreement=Lists(_numbers("n", "share", "kappa", first=_WORDS, second=_WORDS, on=_WORDS)),
    changes=Lists(_COMPARED),
    # Of `answer`, `judge` and `eval`, which a reader of the page finds elsewhere on it.
    variants=Maps(_ANYTHING),
    skipped=Maps(_ANYTHING),
    phrases_version=Number(),
    table=_WORDS,
    mask=Maps(_ANYTHING),
    refusal_changes=Lists(_COMPARED),
    cost=Lists(_numbers("seconds", "tokens", "peak_bytes", step=_WORDS)),
    files=Maps(_ANYTHING),
    manifest=Maps(_ANYTHING),
)


def perplexities(results: Mapping[str, Any], unnamed: str = "general") -> dict[str, dict]:
    """The perplexity tables by the name of their set.

    Args:
        unnamed: the set of a table that does not name it.
    """
    one = results.get("perplexity")
    found = {one.get("set") or unnamed: one} if one else {}
    several = results.get("perplexities") or {}
    return found | {name: table for name, table in several.items() if table}


def edited_answers(results: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the answers of each variant but the original; none where none was asked."""
    variants = (results.get("answers") or {}).get("variants") or {}
    return {name: found for name, found in variants.items() if name != ORIGINAL}


def read_results(file: Path) -> dict[str, Any]:
    """The results of a run as `render_report` takes them.

    Raises:
        ValueError: the file is missing, cannot be read, or does not hold results; the text names it
            and the field.
    """
    return read_json(file, RESULTS, advice="pass the results.json of a finished run")
