"""The bias measures of a job: which are asked for, their figures, and what a training changed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fastdean.evaluation import Interval, change_between, change_of_distance, over_refusal
from fastdean.evaluation import bias as measures
from fastdean.evaluation.bias import BiasResult
from fastdean.evaluation.bias.bbq import bbq_rows
from fastdean.evaluation.bias.bec_pro import rows_of as bec_pro_source_rows
from fastdean.evaluation.bias.crows_pairs import crows_pairs_rows
from fastdean.evaluation.bias.gender_facts import gender_fact_rows
from fastdean.evaluation.bias.seat import seat_sets
from fastdean.evaluation.bias.start import start_token as start_of
from fastdean.evaluation.bias.stereoset import stereoset_rows
from fastdean.evaluation.bias.winobias import winobias_rows
from fastdean.evaluation.changes import of_confidence
from fastdean.evaluation.families import Change, judged_together
from fastdean.evaluation.intervals import BOOTSTRAP, share_interval
from fastdean.evaluation.over_refusal import benign_rows
from fastdean.files.declared import Anything, Lists, Maps, Maybe, Real, Record, Text, Whole
from fastdean.files.provenance import public_source
from fastdean.jobs.session import Session
from fastdean.models.forward import label_shift
from fastdean.wording.digits import apart
from fastdean.wording.verdicts import (
    ABOVE,
    BELOW,
    CLOSER,
    FARTHER,
    HIGHER,
    LOWER,
    reading,
    reworded,
)


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
_FROM_START = frozenset({"crows_pairs", "stereoset", "winobias", "bec_pro", "bbq", "gender_facts"})
# Those that ask prompts, and so in a template, and which there are.
_PROMPTED = frozenset({"over_refusal"})
_TEMPLATES = ("raw", "chat")
# Of files that measures read.
_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
# Of what is no mean. Enough for two digits of an interval's ends; they are kept on disk.
_RESAMPLES = 2000

Found = dict[str, dict[str, Any]]
# Advice to pass the argument of a measure.
_TEMPLATE = re.compile(r"(?<![\w'])template=")

_LABEL = Text(longest=10_000)
_ENDS = {"low": Maybe(Real()), "high": Maybe(Real()), "n": Whole()}
# What `stored` gives of each figure of a measure, by its name.
FIGURES = Maps(
    Record(
        {
            "value": Real(),
            "unit": _LABEL,
            "neutral": Maybe(Real()),
            "verdict": _LABEL,
            **_ENDS,
            "confidence": Real(above=0, most=1),
            "by_category": Maps(Record({"value": Real(), **_ENDS}, others=Anything())),
            "notes": Lists(_LABEL),
            "made_of": Record(
                {
                    "values": Maybe(Lists(Real())),
                    "weights": Maybe(Lists(Real())),
                    "whole": Maybe(Real()),
                    "resamples": Maybe(Whole()),
                    "replicates": Maybe(Lists(Real())),
                }
            ),
        },
        others=Anything(),
    )
)


def check(asked: Sequence[str], start: str | int = "auto", template: str | None = None) -> None:
    """Raise ValueError unless every entry is `name` or `name=SRC` of a known measure, once.

    Also for a `start` other than "auto" and for a `template` that none of them would use.
    """
    for entry in asked:
        name, source = _parts(entry)
        if name not in MEASURES:
            raise ValueError(f"bias must be one of {', '.join(MEASURES)}, got {name!r}")
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
    if start != "auto" and not any(_parts(entry)[0] in _FROM_START for entry in asked):
        raise ValueError(
            "start_token must be 'auto' without a measure of "
            f"{', '.join(sorted(_FROM_START))}, got "
            f"{start!r}; leave it out"
        )
    if template is None:
        return
    if template not in _TEMPLATES:
        raise ValueError(
            f"bias_template must be one of {', '.join(_TEMPLATES)}, got {template!r}; leave it "
            "out for chat where the tokenizer has a template"
        )
    if not any(_parts(entry)[0] in _PROMPTED for entry in asked):
        raise ValueError(
            f"bias_template must come with a measure of {', '.join(sorted(_PROMPTED))}, got "
            f"{template!r}; leave it out"
        )


def require_readable(asked: Sequence[str]) -> None:
    """Refuse files before a model is loaded, and not when their measure runs.

    What may be of the hub is left to its measure: a run that is resumed may not need it any more.

    Raises:
        ValueError, OSError: a file that is not there, cannot be read, or has other columns.
    """
    for entry in asked:
        name, source = _parts(entry)
        file = Path((source or "").partition("::")[0]).expanduser()
        # Without a suffix it may be of the hub.
        if source is not None and file.suffix.lower() in _SUFFIXES and not file.exists():
            raise ValueError(
                f"bias {entry!r} must name an existing file, got {str(file)!r}; check the path"
            )
        if source is not None and file.exists():
            with _named(f"bias {entry!r}", "source"):
                READERS[name](source)


def require_start(asked: Sequence[str], start: str | int, model: nn.Module, tokenizer: Any) -> None:
    """Raise ValueError for a start that the tokenizer does not have, if a measure asks for one."""
    if any(_parts(entry)[0] in _FROM_START for entry in asked):
        masked = label_shift(model) == 0
        with _named("start_token", "start"):
            start_of(tokenizer, start, masked=masked)


@contextmanager
def _named(name: str, below: str) -> Iterator[None]:
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


def measure(session: Session, state: str, model: nn.Module, tokenizer: Any) -> Found:
    """Every figure of the job's measures, by name, unless an earlier call finished the step.

    Args:
        state: of the model, such as "before"; names the files of the figures.
    """
    found: Found = {}
    for number, entry in enumerate(session.job.bias):
        kept = measure_one(session, state, number, entry, model, tokenizer)
        add(found, entry, number, kept)
    return found


def measure_one(
    session: Session, state: str, number: int, entry: str, model: nn.Module, tokenizer: Any
) -> Found:
    """The figures of the job's `number`-th measure, by name, as `measure` takes them."""
    job, (name, _) = session.job, _parts(entry)

    def take() -> dict[str, Any]:
        return measured(
            entry,
            model,
            tokenizer,
            start=job.start_token,
            template=job.bias_template,
            seed=job.seed,
            progress=session.progress,
        )

    with session.costs.step(f"{name}, {state}"):
        return session.folder.figures(f"{state}-{number}-{name}", take, FIGURES)


def measured(
    entry: str,
    model: nn.Module,
    tokenizer: Any,
    *,
    start: str | int,
    template: str | None,
    seed: int,
    progress: bool,
) -> Found:
    """Every figure of one measure, `name` or `name=SRC`, by its name."""
    name, source = _parts(entry)
    options: dict[str, Any] = {"resamples": _RESAMPLES, "seed": seed, "progress": progress}
    if name in _FROM_START:
        options["start"] = start
    if name in _PROMPTED:
        options["template"] = template
    arguments = [] if source is None else [source]
    with _named(f"bias {entry!r}", "source"):
        result = MEASURES[name][0](model, tokenizer, *arguments, **options)
    return {each.name: stored(each) for each in results_of(result)}


def add(found: dict[str, Any], entry: str, number: int, figures: Mapping[str, Any]) -> None:
    """Put the figures of a measure, the job's `number`-th, beside those found before it."""
    _, source = _parts(entry)
    # Two files of one measure have figures of the same name.
    where = "its own data" if source is None else public_source(source)
    for title, kept in figures.items():
        for name in (title, f"{title} ({where})", f"{title} ({number + 1}: {where})"):
            if name not in found:
                found[name] = kept
                break


def results_of(result: Any) -> list[BiasResult]:
    """The figures of one measure, whose result may hold several."""
    return [result] if isinstance(result, BiasResult) else list(vars(result).values())


def stored(result: BiasResult) -> dict[str, Any]:
    """A figure as JSON, with what `results` needs to say how it changed."""
    interval = result.interval
    return {
        **result.to_dict(),
        "made_of": {
            "values": _numbers_of(interval.values),
            "weights": _numbers_of(interval.weights),
            "whole": interval.whole,
            "resamples": interval.resamples,
            "replicates": _numbers_of(interval.replicates),
        },
    }


def start_token(found: Found) -> str | None:
    """What the likelihoods of these figures started from; None where there are none."""
    names = (figures.get("start_token") for figures in found.values())
    return next((name for name in names if name is not None), None)


# Of the changes of a table: their name, and which of them; or another test that is read with them.
_Key = tuple[str, str]
_VALUE, _CHANGE, _DISTANCE = "before", "raw_change", "change"


def results(
    states: Mapping[str, Found],
    *,
    others: Mapping[str, Change] | None = None,
    seed: int = 0,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any], dict[str, dict[str, Any]]]:
    """`report.bias_section`'s input from the figures "before" and, maybe, "after".

    All tests of the table are one family: of one model those of its figures against their neutral
    values, of two each figure's change and, where it has a neutral value, that of its distance to
    it.

    Args:
        others: changes that are read with them, by name, as `judged_together` takes them.
        seed: of the tests' draws.
    Returns:
        The table; how its tests were adjusted, empty without a test; and `others`, judged.
    """
    before, after = states["before"], states.get("after")
    changes: dict[_Key, Change] = {}
    for name, figures in before.items():
        if after is not None:
            changes |= _changes_of(name, figures, after[name], seed)
        elif figures["neutral"] is not None:
            changes[name, _VALUE] = _tested(figures, partial(_at, figures, seed))
    for name, change in (others or {}).items():
        changes[name, ""] = change
    judged, family = judged_together(changes)
    table = {}
    for name, figures in before.items():
        row = {
            "unit": figures["unit"],
            "neutral": figures["neutral"],
            "definition": "; ".join(figures["notes"]),
            "before": _numbers(figures) | _test_of(judged.get((name, _VALUE)), BELOW, ABOVE),
            "by_category": {"before": figures["by_category"]},
        }
        if after is not None:
            row["after"] = _numbers(after[name])
            moved = _moved_items(figures, after[name], family.confidence_of_each)
            row["by_category"]["after"] = after[name]["by_category"]
            row[_CHANGE] = _change(judged[name, _CHANGE]) | moved
            # That of the figure itself where there is nothing to come closer to.
            row[_DISTANCE] = row[_CHANGE]
            if (name, _DISTANCE) in judged:
                row[_DISTANCE] = _change(judged[name, _DISTANCE], CLOSER, FARTHER) | moved
                row["definition"] = "; ".join(
                    [*figures["notes"], "closer and farther are of the distance to the neutral "
                     "value"]
                )  # fmt: skip
        table[name] = row
    told = {name: judged[name, ""] for name in others or {}}
    return table, family.to_dict() if family.tests else {}, told


def _changes_of(
    name: str, before: Mapping[str, Any], after: Mapping[str, Any], seed: int
) -> dict[_Key, Change]:
    found: dict[_Key, Change] = {(name, _CHANGE): change_of(before, after, seed)}
    neutral = before["neutral"]
    if neutral is not None:
        found[name, _DISTANCE] = _tested(
            before,
            lambda confidence: change_of_distance(
                _at(before, seed, confidence), _at(after, seed, confidence), neutral, seed=seed
            ),
        )
    return found


def _moved_items(
    before: Mapping[str, Any], after: Mapping[str, Any], confidence: float
) -> dict[str, Any]:
    """How many items changed and, in %, how many of all such items do at most.

    Of items that are all as they were a mean has no spread, and its interval no width; the share
    that changes has an exact one. Nothing of a figure that is not made of items.
    """
    old, new = (each["made_of"]["values"] for each in (before, after))
    if old is None or new is None or not len(old) == len(new) > 1:
        return {}
    moved = np.not_equal(old, new)
    share = share_interval(100.0 * moved, 100.0, confidence=confidence)
    return {"changed": int(moved.sum()), "changed_most": share.high}


def change_of(before: Mapping[str, Any], after: Mapping[str, Any], seed: int = 0) -> Change:
    """How a kept figure changed, as `judged_together` takes it."""
    return _tested(
        before,
        lambda confidence: change_between(
            _at(before, seed, confidence), _at(after, seed, confidence), seed=seed
        ),
    )


def _tested(figures: Mapping[str, Any], take: Callable[[float], Interval]) -> Change:
    """`take`, or what it gives of a figure whose interval has no test."""
    if figures["interval_method"] == BOOTSTRAP:
        return take(figures["confidence"])
    return take


def _at(figures: Mapping[str, Any], seed: int, confidence: float) -> Interval:
    """A kept figure's interval of a confidence."""
    return of_confidence(_interval(figures), confidence, seed=seed)


def _test_of(judged: Mapping[str, Any] | None, lower: str, higher: str) -> dict[str, Any]:
    """The test of a figure against its neutral value, and its interval among the others'."""
    if judged is None:
        return {}
    kept = ("low", "high", "p_value", "p_holm", "test", "detects")
    verdict = reworded(judged["verdict"], lower, higher)
    return {key: judged[key] for key in kept} | {"verdict": verdict}


def _interval(figures: Mapping[str, Any]) -> Interval:
    """A kept figure's interval, with what changes are computed from."""
    low, high = (math.nan if figures[end] is None else figures[end] for end in ("low", "high"))
    made_of = dict(figures["made_of"])
    for name in ("values", "weights", "replicates"):
        made_of[name] = None if made_of[name] is None else np.array(made_of[name])
    return Interval(
        figures["value"],
        low,
        high,
        figures["n"],
        figures["confidence"],
        figures["interval_method"],
        no_effect=figures["neutral"],
        p_value=figures["p_value"],
        test=figures["test"],
        **made_of,
    )


def _numbers_of(values: Sequence[float] | np.ndarray | None) -> list[float] | None:
    return None if values is None else list(map(float, values))


def _change(judged: Mapping[str, Any], lower: str = LOWER, higher: str = HIGHER) -> dict[str, Any]:
    found = dict(judged)
    verdict = reworded(found["verdict"], lower, higher)
    return {"value": found.pop("mean"), **found, "verdict": verdict}


def _numbers(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {key: figures[key] for key in ("value", "low", "high", "n")}


def sentences(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the figures of one model say, a sentence each for those that have an interval."""
    said = []
    for name, row in table.items():
        found = row["before"]
        if found["low"] is None:
            continue
        value, low, high = apart(*(found[key] for key in ("value", "low", "high")), least=3)
        p = "" if found.get("p_holm") is None else f", Holm-adjusted p = {found['p_holm']:.2g}"
        judged = ""
        if row["neutral"] is not None:
            judged = f", where {row['neutral']:g} is neutral: {found['verdict']}"
        said.append(f"{name}: {value} {row['unit']} [{low}, {high}]{p}{judged}.")
    return said


def change_sentences(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a training did to each figure that has an interval: bias, and what it may cost."""
    said = []
    for name, row in table.items():
        moved = row.get("change") or {}
        if moved.get("low") is None:
            continue
        before, after = apart(row["before"]["value"], row["after"]["value"], least=3)
        neutral = "" if row["neutral"] is None else f" (neutral {row['neutral']:g})"
        of = "change" if row["neutral"] is None else "change of the distance to it"
        said.append(f"{name}: {before} before, {after} after{neutral}, {of} {change_words(moved)}.")
    return said


def change_words(
    moved: Mapping[str, Any], key: str = "value", no_effect: float = 0.0, n: int | None = None
) -> str:
    """A change with its interval, its p-value, and what may be said about it.

    Args:
        moved: one of `results`, or of `judged_together`, with its estimate under `key`.
        no_effect: the estimate that means "nothing changed".
        n: of its items, to be told; None: it is not.
    """
    counted = "" if n is None else f", n = {n}"
    p = "" if moved.get("p_holm") is None else f", Holm-adjusted p = {moved['p_holm']:.2g}"
    verdict = reading(moved["low"], moved["high"], no_effect, moved["verdict"], moved.get("p_holm"))
    return f"{with_ends(moved, key)}{counted}{p}: {verdict}"


def with_ends(figure: Mapping[str, Any], key: str = "value") -> str:
    """An estimate and its interval, where it has one; of a change of no item, what that bounds."""
    if figure[key] is None:
        return "not measured"
    if figure.get("changed") == 0 and figure["low"] == figure["high"]:
        return (
            f"{apart(figure[key])[0]} (no item changed; of all such items at most "
            f"{figure['changed_most']:.2g} % do, by the exact interval)"
        )
    if figure["low"] is None:
        return apart(figure[key])[0]
    value, low, high = apart(*(figure[name] for name in (key, "low", "high")), least=3)
    return f"{value} [{low}, {high}]"


def _parts(entry: str) -> tuple[str, str | None]:
    name, _, source = entry.partition("=")
    return name, source or None
