"""The results of a run: every figure of its report, as one dictionary that JSON can hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from fastdean.coupling.results.scores import Scores
from fastdean.coupling.sets import overlap
from fastdean.files.provenance import public_source
from fastdean.jobs.coupling.findings import findings
from fastdean.jobs.coupling.job import Job
from fastdean.jobs.coupling.split_rows import SplitRows
from fastdean.jobs.folder import RESULTS_FILE
from fastdean.jobs.published import published
from fastdean.jobs.session import Session
from fastdean.masks import NeuronMask
from fastdean.masks.summary import SIGN_COLUMNS
from fastdean.models.label_shift import label_shift


def collect(
    session: Session[Job],
    scores: Mapping[str, Scores],
    mask: NeuronMask,
    tables: Mapping[str, Any],
    warnings: list[str],
) -> dict[str, Any]:
    """The content of results.json.

    Args:
        scores: by data set.
        mask: of the job's rule.
        tables: of `measuring.measure`.
    """
    job = session.job
    sets = job.data_sets
    first, second = (scores[name] for name in sets.coupled)
    coverage = first.manifest["coverage"]
    told, table = published(job), mask.table or []
    own = {
        "model": {**first.manifest["model"], "name": told["model"]},
        "data": {
            name: {"source": public_source(source), **scores[name].manifest["data"]}
            for name, source in sets.sources.items()
        },
        "options": told | {"ratio": job.effective_ratio},
        "coverage": {key: value for key, value in coverage.items() if key != "unscorable"},
        "coupling": {"rows": table, "total": _total(table)},
        **tables,
        "warnings": warnings,
        "cost": session.costs.steps,
        "files": {
            "mask": "mask",
            "control masks": "controls",
            "scores": "scores",
            "figures": RESULTS_FILE,
        },
        "manifest": {"job": told, "mask": mask.manifest},
    }
    loads = {name: each.expert_load for name, each in scores.items() if each.expert_load}
    if loads:
        own["expert_load"] = loads
    if job.scope == "matrix":
        own["overlap"] = overlap(
            first, second, general=[scores[name] for name in sets.spared], ratios=job.curve
        )
    own["findings"] = findings(own)
    return session.results(f"FastDEAN: coupled {' and '.join(sets.coupled)} weights", own)


def _total(table: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    keys: tuple[str, ...] = ("numel", "k", "first", "second", "coupled", "removed", "kept")
    if table and all(SIGN_COLUMNS[0] in row for row in table):
        keys = (*keys, *SIGN_COLUMNS)
    return {key: sum(row[key] for row in table) for key in keys}


def warnings_about(
    job: Job,
    model: nn.Module,
    rows: Mapping[str, SplitRows],
    mask: NeuronMask,
    scores: Scores,
    unmeasured: str | None = None,
) -> list[str]:
    """Sentences on what a reader of the figures must know.

    Args:
        scores: of any of the data sets.
        unmeasured: why nothing was measured although it was asked for.
    """
    return [
        *_about_scores(job, model, mask, scores),
        *(_about_rows(job, rows) if unmeasured is None else [unmeasured]),
        *([f"The weights are multiplied by {job.scale:g}, not set to zero."] if job.scale else []),
    ]


def _about_scores(job: Job, model: nn.Module, mask: NeuronMask, scores: Scores) -> Iterator[str]:
    table = mask.table or []
    empty = sum(1 for row in table if row["k"] == 0)
    if empty and job.scope == "matrix":
        yield (
            f"The ratio selects nothing from {empty} of {len(table)} matrices: they are too "
            "small for it, or their scores are zero."
        )
    if job.scope == "model":
        yield "The overlap over ratios is left out: it is counted matrix by matrix."
    coverage = scores.manifest["coverage"]
    share = sum(coverage["unscorable"].values()) / coverage["model_parameters"]
    if share > 0.05:
        yield (
            f"{share:.0%} of the parameters lie in layers that hooks cannot score, such as fused "
            "experts."
        )
    if label_shift(model) == 0:
        yield (
            "The model is a masked language model, scored on responses that it sees: their "
            "importance is that of copying them."
        )


def _about_rows(job: Job, rows: Mapping[str, SplitRows]) -> Iterator[str]:
    if not job.eval_examples:
        what = "Neither margins nor perplexity were" if job.bias else "Nothing was"
        yield f"{what} measured: eval_examples is 0."
        return
    for name in job.data_sets.sources:
        # The default is asked for by nobody.
        asked = None if job.examples == Job.examples else job.examples
        if asked is not None and len(rows[name].scored) < asked:
            yield (
                f"The set {name} has {len(rows[name].scored)} rows, fewer than the {asked} asked "
                "for: all were scored."
            )
        if not rows[name].measured:
            yield (
                f"No {name} rows have an unsafe response beside the safe one: not measured on "
                f"{name}."
            )
        elif len(rows[name].measured) < job.eval_examples:
            fewer = f", fewer than the {job.eval_examples} asked for"
            yield (
                f"The set {name} was measured on {len(rows[name].measured)} rows"
                f"{'' if job.eval_examples == Job.eval_examples else fewer}: there are no more."
            )
        if rows[name].measured and not rows[name].held_out:
            yield (f"The {name} rows that were measured on are scored ones: no others were left.")
