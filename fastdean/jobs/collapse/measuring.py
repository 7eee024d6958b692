"""The job of `fastdean collapse`: neural collapse of a model on chosen words, and its bias."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import isinf
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from torch import nn

from fastdean.collapse import (
    CollapseClasses,
    CollapseMetrics,
    collapse_metrics,
    default_shift,
    frequency_matched_control,
    random_control,
)
from fastdean.data.examples import Example
from fastdean.data.rendering import describe_rendering, rendering_cautions
from fastdean.data.skipped import Skipped
from fastdean.files.declared import (
    Anything,
    Either,
    Exactly,
    Lists,
    Maps,
    Maybe,
    Real,
    Record,
    Text,
    Whole,
)
from fastdean.jobs import cautions
from fastdean.jobs.bias import asked as bias_asked
from fastdean.jobs.bias import changes as bias_changes
from fastdean.jobs.bias import figures as bias_figures
from fastdean.jobs.bias import sentences as bias_sentences
from fastdean.jobs.collapse.job import CollapseJob
from fastdean.jobs.folder import RESULTS_FILE
from fastdean.jobs.inputs import benchmark_digests
from fastdean.jobs.published import described_model, published
from fastdean.jobs.rows import encode_usable, take_rows
from fastdean.jobs.session import Session
from fastdean.models.identity import json_digest
from fastdean.models.ranks.distributed import Ranks

_HELD_OUT = 0.2
# Of `FIGURES`, what is more than one figure of all words.
_TABLES = ("metrics", "alignments", "tokens", "groups")
_METRIC = Record(
    {
        "value": Maybe(Either((Real(), Exactly("inf")))),
        "definition": Text(),
        "note": Maybe(Text()),
    }
)
# Of the words of one group: the spread and mean of their alignment among all words, and their NC1.
_METRICS_OF_GROUP = Record(
    {
        "words": Whole(),
        "unc3_std": Maybe(Real()),
        "nc3_mean": Maybe(Real()),
        "nc1_k1": Maybe(Real()),
    }
)
# What `collapse_figures` gives; the job's closing words name some of the metrics.
FIGURES = Record(
    {
        "shift": Text(),
        "features": Text(),
        "examples": Whole(),
        "held-out examples": Whole(),
        "tokens of a class": Whole(),
        "classes seen": Whole(),
        "metrics": Record({"unc3_std": _METRIC, "nc3_mean": _METRIC}, others=_METRIC),
        # Of each class, in their order.
        "alignments": Lists(Maybe(Real())),
        "tokens": Lists(Whole()),
        "groups": Maps(_METRICS_OF_GROUP),
    },
    others=Anything(),
)


def run(
    job: CollapseJob,
    out: str | Path,
    *,
    command: str = "",
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Do the job and return its results (the content of results.json).

    Args and errors as for `jobs.run`.
    """
    Ranks.require_alone("collapse")
    # Reading, loading, checking, collapse, and each measure of bias.
    session = Session.open(job, out, command, overwrite, progress, steps=4 + len(job.bias))
    with session.costs.step("read data"):
        skipped = Skipped() if job.skip_bad_rows else None
        rows, _ = take_rows(job.text, job.examples, job.seed, name="text", skipped=skipped)
        bias_asked.require_readable(job.bias)
    session.compare({"text": json_digest(rows), **benchmark_digests(job.bias)})
    model, tokenizer = session.load_model()
    bias_asked.require_start(job.bias, job.start_token, model, tokenizer)
    classes = classes_of(job, tokenizer)
    session.compare_model(model, tokenizer, words=json_digest(classes.to_dict()))
    options = {"template": job.template, "max_length": job.max_length, "name": "text"}
    rows, examples = encode_usable(rows, skipped, job.text, tokenizer, model, **options)
    told = [] if skipped is None else skipped.told("text")
    told += rendering_cautions(examples, [n for n, _ in rows], tokenizer, "text", job.template)
    session.warn(told)
    with session.writing():
        session.folder.claim()
        table = collapse_figures(session, "measured", model, examples, classes)
        found = bias_figures.measure(session, "bias", model, tokenizer)
        measures, tests, _ = bias_changes.results({"before": found}, seed=job.seed)
        public = published(job)
        results = session.results(
            "FastDEAN: neural collapse on chosen words",
            {
                "model": described_model(job.model, model),
                "data": {
                    "text": {
                        "source": public["text"],
                        "examples": len(examples),
                        **describe_rendering(examples, tokenizer, job.template),
                        **({} if skipped is None else skipped.described()),
                    }
                },
                "options": public,
                "collapse": collapse_results(classes, {"measured": table}),
                "bias": measures,
                "tests": tests,
                "findings": [
                    collapse_sentence(classes, table),
                    *bias_sentences.sentences(measures),
                ],
                "warnings": [
                    *session.folder.other_versions,
                    *told,
                    *cautions.about_classes(len(classes), table),
                ],
                "cost": session.costs.steps,
                "files": {"figures": RESULTS_FILE},
                "manifest": {
                    "job": public,
                    "classes": classes.to_dict(),
                    "start_token": bias_figures.start_token(found),
                },
            },
        )
        session.finish(results)
    return results


def classes_of(job: Any, tokenizer: Any) -> CollapseClasses:
    """The classes that a job's `words`, `multi_piece`, `control` and `seed` describe."""
    classes = CollapseClasses.from_words(tokenizer, job.words, multi_piece=job.multi_piece)
    if job.control == "random":
        return random_control(classes, tokenizer, seed=job.seed)
    if job.control == "frequency":
        return frequency_matched_control(classes, tokenizer, seed=job.seed)
    return classes


def collapse_figures(
    session: Session,
    state: str,
    model: nn.Module,
    examples: Sequence[Example],
    classes: CollapseClasses,
) -> dict[str, Any]:
    """The metrics of one state of a model, unless an earlier call finished the step.

    Args:
        state: "measured", or of a training "before" and "after".
    """
    file, step = ("collapse", "neural collapse")
    if state != "measured":
        file, step = f"{state}-{file}", f"{step}, {state}"
    with session.costs.step(step, sum(map(len, examples))):
        return session.folder.figures(
            file, lambda: _measured(session, model, examples, classes), FIGURES
        )


def _measured(
    session: Session, model: nn.Module, examples: Sequence[Example], classes: CollapseClasses
) -> dict[str, Any]:
    """The metrics; NC4 on the last fifth of the examples."""
    job = session.job
    held_out = max(1, round(_HELD_OUT * len(examples))) if len(examples) > 1 else 0
    metrics = collapse_metrics(
        model,
        list(examples[: len(examples) - held_out]),
        classes,
        held_out=list(examples[len(examples) - held_out :]) or None,
        shift=job.shift,
        features=job.features,
        tokens_per_batch=job.tokens_per_batch,
        progress=session.progress,
    )
    return {
        "shift": job.shift or default_shift(model),
        "features": job.features,
        "examples": len(examples) - held_out,
        "held-out examples": held_out,
        "tokens of a class": int(metrics.moments.counts.sum()),
        "classes seen": int((metrics.moments.counts > 0).sum()),
        "metrics": _metric_table(metrics),
        "alignments": metrics.alignments,
        "tokens": [int(count) for count in metrics.moments.counts.tolist()],
        "groups": _group_table(metrics, classes.groups),
    }


def _group_table(metrics: CollapseMetrics, groups: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By group: the mean and spread of its words' alignment, and NC1 among them."""
    found = {}
    for group in dict.fromkeys(groups):
        places = [place for place, name in enumerate(groups) if name == group]
        known = [a for a in (metrics.alignments[place] for place in places) if a is not None]
        nc1 = metrics.among(places).values["nc1_k1"].value
        found[group] = {
            "words": len(known),
            "unc3_std": stdev(known) if len(known) > 1 else None,
            "nc3_mean": fmean(known) if known else None,
            "nc1_k1": None if nc1 is None or isinf(nc1) else nc1,
        }
    return found


def _metric_table(metrics: CollapseMetrics) -> dict[str, dict[str, Any]]:
    return {
        name: {
            # JSON knows no infinity, and here it is a result: two classes with one mean.
            "value": "inf" if metric.value is not None and isinf(metric.value) else metric.value,
            "definition": metric.definition,
            "note": metric.note,
        }
        for name, metric in metrics.values.items()
    }


def collapse_results(
    classes: CollapseClasses, states: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """`report.collapse_section`'s input: each metric in each state of the model."""
    first = next(iter(states.values()))
    return {
        "classes": {
            "kept": len(classes),
            "left_out": len(_bare(left.word for left in classes.left_out) - _bare(classes.words)),
            "groups": dict(Counter(classes.groups)),
        },
        "settings": {key: value for key, value in first.items() if key not in _TABLES},
        "groups": {state: table["groups"] for state, table in states.items()},
        "words": [
            {
                "word": word,
                "group": group,
                "tokens": first["tokens"][place],
                "alignment": {state: t["alignments"][place] for state, t in states.items()},
            }
            for place, (word, group) in enumerate(zip(classes.words, classes.groups, strict=True))
        ],
        "metrics": {
            name: {
                "definition": metric["definition"],
                "values": {state: t["metrics"][name]["value"] for state, t in states.items()},
                "notes": {state: t["metrics"][name]["note"] for state, t in states.items()},
            }
            for name, metric in first["metrics"].items()
        },
    }


def _bare(words: Iterable[str]) -> set[str]:
    return {word.strip().casefold() for word in words}


def collapse_sentence(classes: CollapseClasses, table: Mapping[str, Any]) -> str:
    """What was measured, with the two figures of the paper."""
    metrics = table["metrics"]
    said = (
        f"{table['tokens of a class']:,} tokens belong to {table['classes seen']} of "
        f"{len(classes)} classes"
    )
    if metrics["unc3_std"]["value"] is None:
        return f"{said}: too few for a spread of their alignment."
    return (
        f"{said}; their means align with the output embedding at a mean cosine (NC3) of "
        f"{metrics['nc3_mean']['value']:.3f} with a spread ((U)NC3, std) of "
        f"{metrics['unc3_std']['value']:.3f}."
    )
