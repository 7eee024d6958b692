"""The bias measures of a job: which are asked for, their figures, and what a training changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from fastdean.declared import Anything, Lists, Maps, Maybe, Real, Record, Text, Whole
from fastdean.evaluation import bias as measures
from fastdean.evaluation.bias import BiasResult
from fastdean.evaluation.bootstrap import Interval, change_between
from fastdean.pipeline.costs import Costs
from fastdean.pipeline.run_folder import RunFolder
from fastdean.provenance import public_source


def _winobias(model: nn.Module, tokenizer: Any, *source: str, **options: Any) -> Any:
    """Without the published pairs that differ in more than their pronouns; the note counts them."""
    return measures.winobias(model, tokenizer, *source, mismatched="leave_out", **options)


def _bec_pro(model: nn.Module, tokenizer: Any, *source: str, **options: Any) -> Any:
    """On one of the four templates where no file is given: a quarter of the time, twice a job."""
    rows = source or (measures.bec_pro_rows(templates=measures.TEMPLATES[:1]),)
    return measures.bec_pro(model, tokenizer, *rows, **options)


# Name -> the function, and whether it needs a source.
MEASURES = {
    "crows_pairs": (measures.crows_pairs, False),
    "stereoset": (measures.stereoset, False),
    "winobias": (_winobias, False),
    "seat": (measures.seat, True),
    "bec_pro": (_bec_pro, False),
}
# Enough for two digits of an interval's ends; the replicates are kept on disk.
_RESAMPLES = 2000

Found = dict[str, dict[str, Any]]

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
            "resamples": Whole(),
            "by_category": Maps(Record({"value": Real(), **_ENDS}, others=Anything())),
            "notes": Lists(_LABEL),
            "replicates": Lists(Real()),
        },
        others=Anything(),
    )
)


def check(asked: Sequence[str]) -> None:
    """Raise ValueError unless every entry is `name` or `name=SRC` of a known measure, once."""
    for entry in asked:
        name, source = _parts(entry)
        if name not in MEASURES:
            raise ValueError(f"bias must be one of {', '.join(MEASURES)}, got {name!r}")
        if MEASURES[name][1] and source is None:
            raise ValueError(
                f"bias {name!r} must come with its file, got the name alone; write {name}=FILE"
            )
    doubled = sorted({entry for entry in asked if list(asked).count(entry) > 1})
    if doubled:
        raise ValueError(f"bias must name each measure once, got {doubled[0]!r} again")


def measure(
    model: nn.Module,
    tokenizer: Any,
    asked: Sequence[str],
    folder: RunFolder,
    state: str,
    costs: Costs,
    *,
    seed: int,
    progress: bool,
) -> Found:
    """Every figure of the measures, by name; those that an earlier call kept are not taken again.

    Args:
        asked: as `check` takes them.
        state: of the model, such as "before"; names the kept files.
    """
    found: Found = {}
    for number, entry in enumerate(asked):
        name, source = _parts(entry)

        def take(name: str = name, source: str | None = source) -> dict[str, Any]:
            options = {"resamples": _RESAMPLES, "seed": seed, "progress": progress}
            arguments = [] if source is None else [source]
            result = MEASURES[name][0](model, tokenizer, *arguments, **options)
            return {each.name: stored(each) for each in results_of(result)}

        with costs.step(f"{name}, {state}"):
            kept = folder.figures(f"{state}-{number}-{name}", take, FIGURES)
        for title, figures in kept.items():
            # Two files of one measure have figures of the same name.
            where = "its own data" if source is None else public_source(source)
            for name in (title, f"{title} ({where})", f"{title} ({number + 1}: {where})"):
                if name not in found:
                    found[name] = figures
                    break
    return found


def results_of(result: Any) -> list[BiasResult]:
    """The figures of one measure, whose result may hold several."""
    return [result] if isinstance(result, BiasResult) else list(vars(result).values())


def stored(result: BiasResult) -> dict[str, Any]:
    """A figure as JSON, with what `results` needs to say how it changed."""
    return {**result.to_dict(), "replicates": list(map(float, result.interval.replicates))}


def results(states: Mapping[str, Found]) -> dict[str, dict[str, Any]]:
    """`report.bias_section`'s input from the figures "before" and, maybe, "after"."""
    before, after = states["before"], states.get("after")
    return {
        name: {
            "unit": figures["unit"],
            "neutral": figures["neutral"],
            "definition": "; ".join(figures["notes"]),
            "before": _numbers(figures),
            "by_category": {"before": figures["by_category"]},
            **({} if after is None else _compared(figures, after[name])),
        }
        for name, figures in before.items()
    }


def _compared(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    intervals = _interval(before), _interval(after)
    moved = _ends(change_between(*intervals))
    found = {
        "after": _numbers(after),
        "raw_change": moved,
        "change": moved,
        "by_category": {"before": before["by_category"], "after": after["by_category"]},
    }
    neutral = before["neutral"]
    if neutral is not None:
        found["change"] = _ends(change_between(*intervals, of=lambda value: abs(value - neutral)))
        found["definition"] = "; ".join(
            [*before["notes"], "the change is that of the distance to the neutral value"]
        )
    return found


def _interval(figures: Mapping[str, Any]) -> Interval:
    """A kept figure's interval."""
    low, high = (math.nan if figures[end] is None else figures[end] for end in ("low", "high"))
    return Interval(
        figures["value"],
        low,
        high,
        figures["n"],
        figures["confidence"],
        figures["resamples"],
        replicates=np.array(figures["replicates"]),
    )


def _ends(interval: Interval) -> dict[str, float | None]:
    low, high = (None if math.isnan(end) else end for end in (interval.low, interval.high))
    return {"value": interval.mean, "low": low, "high": high}


def _numbers(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {key: figures[key] for key in ("value", "low", "high", "n")}


def sentences(found: Found) -> list[str]:
    """What the figures of one state say, a sentence each for those that have a neutral value."""
    said = []
    for name, figures in found.items():
        if figures["neutral"] is None or figures["low"] is None:
            continue
        said.append(
            f"{name}: {figures['value']:.3g} {figures['unit']} [{figures['low']:.3g}, "
            f"{figures['high']:.3g}], where {figures['neutral']:g} is neutral: "
            f"{figures['verdict']}."
        )
    return said


def change_sentences(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a training did to each figure that has a neutral value."""
    said = []
    for name, row in table.items():
        moved = row.get("change") or {}
        if row["neutral"] is None or moved.get("low") is None:
            continue
        verdict = "no effect beyond noise"
        if moved["high"] < 0:
            verdict = "closer to neutral"
        elif moved["low"] > 0:
            verdict = "farther from neutral"
        said.append(
            f"{name}: {row['before']['value']:.3g} before, {row['after']['value']:.3g} after "
            f"(neutral {row['neutral']:g}): {verdict}."
        )
    return said


def _parts(entry: str) -> tuple[str, str | None]:
    name, _, source = entry.partition("=")
    return name, source or None
