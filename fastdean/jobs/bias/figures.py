"""The figures of a job's bias measures, taken, and kept in its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from fastdean.evaluation.bias import BiasResult
from fastdean.files.declared import Anything, Lists, Maps, Maybe, Real, Record, Text, Whole
from fastdean.files.provenance import public_source
from fastdean.jobs.bias.asked import FROM_START, MEASURES, PROMPTED, named, parts
from fastdean.jobs.session import Session

# Of what is no mean. Enough for two digits of an interval's ends; they are kept on disk.
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
    job, (name, _) = session.job, parts(entry)

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
    name, source = parts(entry)
    options: dict[str, Any] = {"resamples": _RESAMPLES, "seed": seed, "progress": progress}
    if name in FROM_START:
        options["start"] = start
    if name in PROMPTED:
        options["template"] = template
    arguments = [] if source is None else [source]
    with named(f"bias {entry!r}", "source"):
        result = MEASURES[name][0](model, tokenizer, *arguments, **options)
    return {each.name: stored(each) for each in results_of(result)}


def add(found: dict[str, Any], entry: str, number: int, figures: Mapping[str, Any]) -> None:
    """Put the figures of a measure, the job's `number`-th, beside those found before it."""
    _, source = parts(entry)
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


def _numbers_of(values: Sequence[float] | np.ndarray | None) -> list[float] | None:
    return None if values is None else list(map(float, values))
