"""The main job: score three data sets, couple, mask, measure before and after, report.

What is asked for is in `job`; what is written, and how it is resumed, in `jobs.folder`; the
figures in `measuring`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from logging import LogRecord
from pathlib import Path
from typing import Any

from torch import nn

from fastdean.coupling.scores import Scores
from fastdean.coupling.scoring import score
from fastdean.coupling.sets import couple, nothing_selected_error
from fastdean.coupling.targets import Target, find_targets
from fastdean.data.examples import Example
from fastdean.data.rendering import (
    NOT_ALIKE,
    describe_rendering,
    differing_renderings,
    rendering_cautions,
)
from fastdean.files.provenance import public_source
from fastdean.jobs.coupling.job import DATA_SETS, Job
from fastdean.jobs.coupling.measuring import TOPICS, MeasuringSet, measure
from fastdean.jobs.coupling.results import collect, warnings_about
from fastdean.jobs.coupling.scoring import note_origin
from fastdean.jobs.preview import shown
from fastdean.jobs.rows import NumberedRow, SplitRows, encode_rows, same_content, split_rows
from fastdean.jobs.session import Session
from fastdean.masks import NeuronMask
from fastdean.models.distributed import Ranks
from fastdean.wording.log import logger

CONTROLS = ("random", "released")


@dataclass
class _Prepared:
    """Everything that can be refused before the first long step."""

    model: nn.Module
    rows: dict[str, SplitRows]
    scored: dict[str, list[Example]]
    measured: MeasuringSet
    keep_top: float | None
    renderings: dict[str, dict[str, Any]]
    shown: dict[str, dict[str, Any]]
    cautions: list[str]


def run(
    job: Job, out: str | Path, *, command: str = "", overwrite: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Do the main job and return its results (the content of results.json).

    Under `torch.distributed` the ranks share the scoring; the first one does the rest, writes, and
    returns the results, the others return an empty dictionary.

    Args:
        job: what to do.
        out: the run folder: new, empty, or of the same unfinished job, which is then resumed.
        command: the command line, for the record.
        overwrite: replace a folder that holds another or a finished run, and nothing else.
        progress: show progress bars.
    Raises:
        ValueError: bad input; whatever `score` and `couple` raise.
        OSError: the disk refused; what was finished before stays and is used again.
    """
    ranks = Ranks.current()
    # Reading, loading, checking, a scoring of each data set, coupling, the model and its masks.
    steps = 3 + len(DATA_SETS) + 2 + len({job.rule, *CONTROLS})
    with ranks.failing_together():
        session = Session.open(job, out, command, overwrite, progress, steps=steps)
        prepared = _prepare(session)
    with session.writing():
        each = ((name, _score(name, prepared, session)) for name in DATA_SETS)
        # The first rank has all of them.
        scores = {name: made for name, made in each if made is not None}
        if not ranks.first:
            return {}
        with session.costs.step("couple"):
            masks, warnings = _couple(scores, prepared.model, session)
        tables, notes = measure(
            prepared.model,
            masks,
            job.rule,
            prepared.measured,
            seed=job.seed,
            timed=session.costs.step,
            tokens_per_batch=job.tokens_per_batch,
            progress=progress,
        )
        mask = masks[job.rule]
        warnings += [
            *session.folder.other_versions,
            *prepared.cautions,
            *warnings_about(job, prepared.model, prepared.rows, mask, scores["fairness"]),
            *notes,
        ]
        results = collect(session, scores, mask, {**tables, "shown": prepared.shown}, warnings)
        session.finish(results)
    return results


def _prepare(session: Session[Job]) -> _Prepared:
    job = session.job
    with session.costs.step("read data"):
        rows = {name: split_rows(name, job) for name in DATA_SETS}
    session.compare({name: split.digest for name, split in rows.items()})
    model, tokenizer = session.load_model()
    session.compare_model(model, tokenizer)
    targets = find_targets(model, job.target_modules, job.granularity)
    _require_in_memory(targets, job)
    sizes = _sizes(targets, job)
    _require_selection(sizes, job)
    options: dict[str, Any] = {"template": job.template, "max_length": job.max_length}

    def encoded(name: str, numbered: Sequence[NumberedRow]) -> list[Example]:
        return encode_rows(numbered, getattr(job, name), tokenizer, model, name=name, **options)

    def pairs(topic: str) -> list[tuple[Example, Example]]:
        safe = rows[topic].measured
        unsafe = [(n, {"prompt": r["prompt"], "response": r["unsafe"]}) for n, r in safe]
        return list(zip(encoded(topic, safe), encoded(topic, unsafe), strict=True))

    rows = {
        name: split.usable(getattr(job, name), tokenizer, model, name=name, **options)
        for name, split in rows.items()
    }
    scored = {name: encoded(name, rows[name].scored) for name in DATA_SETS}
    renderings = {
        name: describe_rendering(scored[name], tokenizer, job.template) for name in DATA_SETS
    }
    cautions = [
        *same_content({name: split.content for name, split in rows.items()}),
        *(
            sentence
            for name, split in rows.items()
            if split.skipped is not None
            for sentence in split.skipped.told(name)
        ),
        *differing_renderings(renderings),
        *(
            caution
            for name in DATA_SETS
            for caution in rendering_cautions(
                scored[name], [n for n, _ in rows[name].scored], tokenizer, name, job.template
            )
        ),
    ]
    session.warn(cautions)
    return _Prepared(
        model=model,
        rows=rows,
        scored=scored,
        measured=MeasuringSet(
            {topic: pairs(topic) for topic in TOPICS}, encoded("general", rows["general"].measured)
        ),
        keep_top=_keep_top(sizes, job),
        renderings=renderings,
        shown={
            name: shown(
                public_source(getattr(job, name)),
                rows[name].scored[0][0],
                scored[name][0],
                tokenizer,
            )
            for name in DATA_SETS
        },
        cautions=cautions,
    )


def _require_in_memory(targets: Sequence[Target], job: Job) -> None:
    """Scoring can fetch offloaded weights one at a time; a mask is applied to all of them."""
    offloaded = [target.parameter for target in targets if target.module.weight.is_meta]
    if offloaded:
        raise ValueError(
            f"device must hold the weights that masks are applied to, got {job.device!r}, which "
            f"offloads {len(offloaded)} of {len(targets)} matrices, such as {offloaded[0]}; use a "
            "smaller dtype or more memory, or score and couple with the Python API"
        )


def _sizes(targets: Sequence[Target], job: Job) -> list[int]:
    """How many entries compete in each matrix."""
    if job.granularity == "unit":
        return [target.num_inputs for target in targets]
    return [target.num_inputs * target.num_outputs for target in targets]


def _require_selection(sizes: Sequence[int], job: Job) -> None:
    largest = max(sizes) if job.scope == "matrix" else sum(sizes)
    if job.min_k or int(job.effective_ratio * largest):
        return
    raise nothing_selected_error(job.effective_ratio, largest, job.scope)


def _keep_top(sizes: Sequence[int], job: Job) -> float | None:
    """The ratio that scores must keep; None keeps all, which a top set of the whole model needs."""
    if job.scope == "model":
        return None
    # Half an entry more, because the count is cut to an integer.
    floor = (job.min_k + 0.5) / min(sizes) if job.min_k else 0.0
    return min(1.0, max(*job.curve, floor))


def _score(name: str, prepared: _Prepared, session: Session[Job]) -> Scores | None:
    """Score one data set, or read the scores that an earlier call of this job saved."""
    job, folder, ranks = session.job, session.folder, session.ranks
    examples = prepared.scored[name]
    tokens = sum(len(example) for example in examples)
    if ranks.agree(folder.resumes and folder.scores(name).is_dir()):
        logger.info("%s is scored already, read from %s", name, folder.scores(name))
        session.costs.add(f"score {name}, by an earlier call", tokens, None, None)
        with ranks.failing_together():
            return Scores.from_pretrained(folder.scores(name)) if ranks.first else None
    with session.costs.step(f"score {name}", tokens):
        scores = score(
            prepared.model,
            examples,
            granularity=job.granularity,
            target_modules=job.target_modules,
            tokens_per_batch=job.tokens_per_batch,
            keep_top=prepared.keep_top,
            memory_budget=job.memory_budget,
            order=job.order,
            states=job.states,
            deterministic=job.deterministic,
            progress=session.progress,
            description=f"score {name}",
        )
    source, skipped = getattr(job, name), prepared.rows[name].skipped
    note_origin(scores, job, source, prepared.renderings[name], skipped)
    # A disk that is full on the first rank must not leave the others waiting for the next sum.
    with ranks.failing_together():
        if ranks.first:
            folder.claim()
            scores.save_pretrained(folder.scores(name))
    return scores


def _couple(
    scores: Mapping[str, Scores], model: nn.Module, session: Session[Job]
) -> tuple[dict[str, NeuronMask], list[str]]:
    """The job's mask and its controls, saved, and sentences on those that could not be made."""
    job, folder = session.job, session.folder
    warnings: list[str] = []
    # Said before the scoring, and not again for every mask.
    logger.addFilter(_says_no_rendering)
    try:
        masks = {job.rule: _mask(scores, model, job, job.rule)}
        for rule in CONTROLS:
            if rule in masks:
                continue
            try:
                masks[rule] = _mask(scores, model, job, rule)
            except ValueError as error:
                warnings.append(f"The control {rule!r} is left out: {error}.")
    finally:
        logger.removeFilter(_says_no_rendering)
    for rule, mask in masks.items():
        where = folder.mask if rule == job.rule else folder.control(rule)
        mask.save_pretrained(where, overwrite=True)
    return masks, warnings


def _says_no_rendering(record: LogRecord) -> bool:
    return not record.getMessage().startswith(NOT_ALIKE)


def _mask(scores: Mapping[str, Scores], model: nn.Module, job: Job, rule: str) -> NeuronMask:
    fairness, privacy, general = (scores[name] for name in DATA_SETS)
    return couple(
        fairness,
        privacy,
        general=general,
        ratio=job.effective_ratio,
        rule=rule,
        min_k=job.min_k,
        scope=job.scope,
        seed=job.seed,
        model=model,
    ).with_scale(job.scale)
