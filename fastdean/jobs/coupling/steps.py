"""The main job: score data sets, couple two of them, mask, measure before and after, report.

What is asked for is in `job`; what is written, and how it is resumed, in `jobs.folder`; the
figures in `measuring`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from logging import Filter, LogRecord
from pathlib import Path
from typing import Any

from torch import nn

from fastdean.coupling.results.scores import Scores
from fastdean.coupling.scoring import score_sets
from fastdean.coupling.selection.agreement import takes_signs
from fastdean.coupling.sets import ABOUT_DATA, couple, nothing_selected_error
from fastdean.coupling.targets.finding import find_targets
from fastdean.coupling.targets.target import Target
from fastdean.data.examples import Example
from fastdean.data.rendering import (
    describe_rendering,
    differing_rendering_cautions,
    rendering_cautions,
)
from fastdean.files.provenance import public_source
from fastdean.jobs.bias import asked as bias_asked
from fastdean.jobs.coupling.asked import Asked, answerable
from fastdean.jobs.coupling.figures import MeasuringSet
from fastdean.jobs.coupling.general_grid import GeneralGrid
from fastdean.jobs.coupling.job import Job
from fastdean.jobs.coupling.measuring import measure
from fastdean.jobs.coupling.model import RunModel
from fastdean.jobs.coupling.results import collect, warnings_about
from fastdean.jobs.coupling.scoring import note_origin
from fastdean.jobs.coupling.split_rows import SplitRows, split_rows
from fastdean.jobs.inputs import benchmark_digests
from fastdean.jobs.preview import shown
from fastdean.jobs.rows import NumberedRow, encode_rows, same_content_cautions
from fastdean.jobs.session import Session
from fastdean.masks import NeuronMask
from fastdean.models.loading import described_model
from fastdean.models.ranks.distributed import Ranks
from fastdean.wording.log import logger
from fastdean.wording.printable import error_line

CONTROLS = ("random", "released")
_NO_RANDOM = (
    "The control 'random' is left out: its weights are not among those that the scores hold, and "
    "the model is not loaded whole."
)
_NO_GRID = (
    "The grid of general ratios is left out: its masks are measured on the model in memory, and "
    "the model is not loaded whole."
)


@dataclass
class _Prepared:
    """Everything that can be refused before the first long step."""

    model: RunModel
    rows: dict[str, SplitRows]
    scored: dict[str, list[Example]]
    measured: MeasuringSet
    prompts: dict[str, list[NumberedRow]]
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
    with ranks.failing_together(job.rank_timeout):
        session = Session.open(job, out, command, overwrite, progress)
        finished = session.finished_before()
        if finished is not None:
            return finished
        session.costs.total = _number_of_steps(session)
        prepared = _prepare(session)
    with session.writing():
        with ranks.failing_together(job.rank_timeout):
            scores = _score(prepared, session)
        if not ranks.first:
            return {}
        model = prepared.model.whole(session)
        with session.costs.step("couple"):
            masks, warnings = _couple(scores, model, session)
            grid = _grid(scores, model, session, masks, warnings)
        tables: dict[str, Any] = {} if model is None else {"margins": {}}
        notes: list[str] = []
        if model is not None and job.measures:
            tables, notes = measure(
                model,
                masks,
                job.rule,
                prepared.measured,
                seed=job.seed,
                timed=session.costs.step,
                tokens_per_batch=job.tokens_per_batch,
                progress=progress,
                grid=grid,
                asked=Asked(session, prepared.model.tokenizer, prepared.prompts),
            )
        mask, first = masks[job.rule], scores[job.data_sets.coupled[0]]
        warnings += [
            *session.folder.other_versions,
            *prepared.cautions,
            *warnings_about(
                job,
                prepared.model.module,
                prepared.rows,
                mask,
                first,
                prepared.model.unmeasured,
            ),
            *notes,
        ]
        results = collect(session, scores, mask, {**tables, "shown": prepared.shown}, warnings)
        session.finish(results)
    return results


def _prepare(session: Session[Job]) -> _Prepared:
    job, sets = session.job, session.job.data_sets
    with session.costs.step("read data"):
        rows = {name: split_rows(name, job) for name in sets.sources}
        bias_asked.require_readable(job.bias)
    digests = {f"{name} rows": split.digest for name, split in rows.items()}
    session.compare({**digests, **benchmark_digests(job.bias)})
    require_selection_as_described(job)
    opened = RunModel.open(session)
    model, tokenizer = opened.module, opened.tokenizer
    opened.compare(session)
    bias_asked.require_start(job.bias, job.start_token, model, tokenizer)
    if job.order == "layers":
        session.costs.total = _number_of_steps(session, opened)
    targets = find_targets(model, job.target_modules, job.granularity)
    if opened.stream is None:
        _require_in_memory(targets, job)
    sizes = _sizes(targets, job)
    _require_selection(sizes, targets, job)
    options: dict[str, Any] = {"template": job.template, "max_length": job.max_length}

    def told(name: str) -> tuple[str, Any, nn.Module]:
        return sets.sources[name], tokenizer, model

    def encoded(name: str, numbered: Sequence[NumberedRow]) -> list[Example]:
        return encode_rows(numbered, *told(name), name=sets.argument(name), **options)

    def pairs(topic: str) -> list[tuple[Example, Example]]:
        safe = rows[topic].measured
        unsafe = [(n, {"prompt": r["prompt"], "response": r["unsafe"]}) for n, r in safe]
        return list(zip(encoded(topic, safe), encoded(topic, unsafe), strict=True))

    rows = {
        name: split.usable(*told(name), name=sets.argument(name), **options)
        for name, split in rows.items()
    }
    scored = {name: encoded(name, split.scored) for name, split in rows.items()}
    renderings = {
        name: describe_rendering(examples, tokenizer, job.template)
        for name, examples in scored.items()
    }
    cautions = [
        *same_content_cautions({name: split.content for name, split in rows.items()}),
        *(
            sentence
            for name, split in rows.items()
            if split.skipped is not None
            for sentence in split.skipped.told(name)
        ),
        *differing_rendering_cautions(renderings),
        *(
            caution
            for name in scored
            for caution in rendering_cautions(
                scored[name], [n for n, _ in rows[name].scored], tokenizer, name, job.template
            )
        ),
    ]
    session.warn(cautions)
    return _Prepared(
        model=opened,
        rows=rows,
        scored=scored,
        measured=MeasuringSet(
            {name: pairs(name) for name in sets.compared},
            {name: encoded(name, rows[name].measured) for name in sets.spared},
            sets.coupled,
        ),
        prompts={name: answerable(rows[name].measured, job.answers) for name in sets.compared},
        keep_top=_keep_top(sizes, job),
        renderings=renderings,
        shown={
            name: shown(
                public_source(source),
                rows[name].scored[0][0],
                scored[name][0],
                tokenizer,
            )
            for name, source in sets.sources.items()
        },
        cautions=cautions,
    )


def _require_in_memory(targets: Sequence[Target], job: Job) -> None:
    """Scoring can fetch offloaded weights one at a time; a mask is applied to all of them."""
    offloaded = [target.parameter for target in targets if target.weight.is_meta]
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
    if job.expert_scope == "tensor":
        return [target.weight.numel() for target in targets]
    return [
        target.weight.numel() // matrices
        for target in targets
        for matrices in [target.weight.shape[0] if target.stacked else 1]
        for _ in range(matrices)
    ]


def _require_selection(sizes: Sequence[int], targets: Sequence[Target], job: Job) -> None:
    largest = max(sizes) if job.scope == "matrix" else sum(sizes)
    if job.min_k or int(job.effective_ratio * largest):
        return
    whole = (target.weight.numel() for target in targets)
    of_experts = job.granularity == "weight" and largest not in whole
    raise nothing_selected_error(job.effective_ratio, largest, job.scope, of_experts=of_experts)


def require_selection_as_described(job: Job) -> None:
    """Refuse a ratio that selects nothing before any weight is read, where the configuration tells.

    What a configuration does not describe, or describes otherwise than it is loaded, is left to
    the check of the loaded model.
    """
    try:
        model = described_model(
            job.model,
            dtype=job.dtype,
            revision=job.revision,
            trust_remote_code=job.trust_remote_code,
        )
        targets = find_targets(model, job.target_modules, job.granularity)
    except Exception as error:  # Whoever loads the model says what is wrong with it.
        logger.debug("the model is not described before it is loaded: %s", error_line(error))
        return
    # Quantised weights have other shapes than those they stand for.
    if targets and getattr(model.config, "quantization_config", None) is None:
        _require_selection(_sizes(targets, job), targets, job)


def _keep_top(sizes: Sequence[int], job: Job) -> float | None:
    """The ratio that scores must keep; None keeps all, which a top set of the whole model needs."""
    if job.scope == "model":
        return None
    # Half an entry more, because the count is cut to an integer.
    floor = (job.min_k + 0.5) / min(sizes) if job.min_k else 0.0
    return min(1.0, max(*job.curve, *(job.general_grid or ()), floor))


def _number_of_steps(session: Session[Job], model: RunModel | None = None) -> int | None:
    """Of the whole job; None where the order of scoring, or what is loaded, shows only later."""
    if session.job.order == "auto" or (session.job.order == "layers" and model is None):
        return None
    swept = session.folder.swept()
    names = list(session.job.data_sets.sources)
    earlier = sum(_is_scored(name, session) for name in names if name not in swept)
    left = len(names) - earlier
    scoring = left if session.job.order == "batches" else min(left, 1)
    # Reading, loading, checking.
    return 3 + earlier + scoring + _steps_after_scoring(session.job, model)


def _steps_after_scoring(job: Job, model: RunModel | None) -> int:
    """Coupling, the model and its masks; of a streamed model coupling alone, or its loading too."""
    grid = {*(job.general_grid or ())} - {job.effective_ratio}
    models = 1 + len({job.rule, *CONTROLS})
    measuring = models * (1 + len(job.bias) + bool(job.answers)) + len(grid)
    measuring *= job.measures
    if model is None or model.stream is None:
        return 1 + measuring
    return 1 + model.steps_to_come * (1 + measuring)


def _is_scored(name: str, session: Session[Job]) -> bool:
    """Whether an earlier call of this job saved these scores, as the rank's own disk has it."""
    return session.folder.resumes and session.folder.scores(name).is_dir()


def _score(prepared: _Prepared, session: Session[Job]) -> dict[str, Scores]:
    """Score the data sets, but for those whose scores an earlier call of this job saved.

    Batch by batch each is a step; layer by layer all of them are one, in one sweep.

    Returns:
        By name; nothing on other ranks than the first.
    """
    job, folder, ranks = session.job, session.folder, session.ranks
    tokens = {name: sum(map(len, examples)) for name, examples in prepared.scored.items()}
    found: dict[str, Scores] = {}
    places: dict[str, int] = {}
    swept = folder.swept()
    for name in prepared.scored:
        # A sweep goes on with all of its sets, also those whose scores it has saved.
        # From 1, as the first rank has it.
        place = ranks.highest(swept.index(name) + 1 if ranks.first and name in swept else 0)
        if place or not ranks.agree(_is_scored(name, session)):
            places[name] = place or len(swept) + 1
            continue
        logger.info("%s is scored already, read from %s", name, folder.scores(name))
        session.costs.add(f"score {name}, by an earlier call", tokens[name], None, None)
        with ranks.failing_together():
            if ranks.first:
                found[name] = Scores.from_pretrained(folder.scores(name))

    def finished(name: str, scores: Scores) -> None:
        skipped = prepared.rows[name].skipped
        source = job.data_sets.sources[name]
        note_origin(scores, job, source, prepared.renderings[name], skipped)
        scores.manifest["data"]["set"] = name
        # A disk that is full on the first rank must not leave the others waiting for the next sum.
        with ranks.failing_together():
            if ranks.first:
                folder.claim()
                prepared.model.note_weights(session)
                scores.save_pretrained(folder.scores(name), overwrite=name in swept)
                found[name] = scores

    @contextmanager
    def step(names: Sequence[str], since: float | None = None) -> Iterator[None]:
        every = sum(tokens[name] for name in names)
        with session.costs.step(f"score {', '.join(names)}", every, since=since):
            # A sweep writes as it goes, and into this job's folder alone.
            with ranks.failing_together():
                if ranks.first and (job.order == "layers" or len(names) > 1):
                    folder.claim()
            yield

    def score(names: Sequence[str], **options: Any) -> None:
        score_sets(
            prepared.model.module if prepared.model.stream is None else prepared.model.stream,
            {name: prepared.scored[name] for name in names},
            granularity=job.granularity,
            target_modules=job.target_modules,
            expert_scope=job.expert_scope,
            tokens_per_batch=job.tokens_per_batch,
            keep_top=prepared.keep_top,
            memory_budget=job.memory_budget,
            order=job.order,
            states=job.states,
            signs=job.signs != "any",
            resume=_resume(job, folder.sweep(names), len(names), prepared.model),
            deterministic=job.deterministic,
            progress=session.progress,
            finished=finished,
            **options,
        )

    # In the sweep's order: a job that names its sets in another one is the same.
    left = sorted(places, key=places.__getitem__)
    if job.order == "auto" and left:
        began = time.perf_counter()

        def chosen(names: Sequence[str]) -> AbstractContextManager:
            """A step, now that the order is chosen; the first has chosen it."""
            to_come = 1 if len(names) == len(left) else len(left) - left.index(names[0])
            done = len(session.costs.steps)
            session.costs.total = done + to_come + _steps_after_scoring(job, prepared.model)
            return step(names, began if names[0] == left[0] else None)

        score(left, step=chosen)
    else:
        alone = [[name] for name in left]
        for names in alone if job.order == "batches" else filter(None, [left]):
            with step(names):
                score(names)
    return {name: found[name] for name in prepared.scored if name in found}


def _resume(job: Job, folder: Path, data_sets: int, model: RunModel) -> Path | None:
    """Where a sweep keeps how far it came; none where states are to be elsewhere."""
    by_layers = job.order == "layers" or (job.order == "auto" and data_sets > 1)
    by_layers = by_layers or model.stream is not None
    return folder if by_layers and job.states == "auto" else None


def _couple(
    scores: Mapping[str, Scores], model: nn.Module | None, session: Session[Job]
) -> tuple[dict[str, NeuronMask], list[str]]:
    """The job's mask and its controls, saved, and sentences on those that could not be made."""
    job, folder = session.job, session.folder
    warnings: list[str] = []
    news = _News()
    logger.addFilter(news)
    try:
        masks = {job.rule: _mask(scores, model, job, job.rule)}
        for rule in CONTROLS:
            if rule in masks:
                continue
            if rule == "random" and model is None:
                warnings.append(_NO_RANDOM)
                continue
            try:
                masks[rule] = _mask(scores, model, job, rule)
            except ValueError as error:
                warnings.append(f"The control {rule!r} is left out: {error}.")
    finally:
        logger.removeFilter(news)
    for rule, mask in masks.items():
        where = folder.mask if rule == job.rule else folder.control(rule)
        mask.save_pretrained(where, overwrite=True)
    return masks, warnings


class _News(Filter):
    """Lets a warning through once, for the first of all masks, and none about the data sets.

    Those were told before the scoring.
    """

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def filter(self, record: LogRecord) -> bool:
        text = record.getMessage()
        known = text in self._told or getattr(record, "about", None) == ABOUT_DATA["about"]
        self._told.add(text)
        return not known


def _grid(
    scores: Mapping[str, Scores],
    model: nn.Module | None,
    session: Session[Job],
    masks: Mapping[str, NeuronMask],
    warnings: list[str],
) -> GeneralGrid | None:
    """The masks of the job's rule at other general ratios, as far as the rule can make them."""
    job = session.job
    if job.general_grid is None:
        return None
    if model is None:
        warnings.append(_NO_GRID)
        return None
    made = {job.effective_ratio: masks[job.rule]}
    # What couple warns of was said for the job's own mask.
    logger.addFilter(_says_nothing)
    try:
        for ratio in job.general_grid:
            if ratio in made:
                continue
            try:
                made[ratio] = _mask(scores, model, job, job.rule, ratio)
            except ValueError as error:
                warnings.append(f"General ratio {ratio:g} is left out: {error}.")
    finally:
        logger.removeFilter(_says_nothing)
    return GeneralGrid(made, job.effective_ratio, job.rule, session.folder.figures)


def _says_nothing(record: LogRecord) -> bool:
    return False


def _mask(
    scores: Mapping[str, Scores],
    model: nn.Module | None,
    job: Job,
    rule: str,
    general_ratio: float | None = None,
) -> NeuronMask:
    sets, ratio = job.data_sets, job.effective_ratio
    return couple(
        *(scores[name] for name in sets.coupled),
        general=[scores[name] for name in sets.spared],
        ratio=ratio if general_ratio is None else (ratio, ratio, general_ratio),
        rule=rule,
        min_k=job.min_k,
        scope=job.scope,
        seed=job.seed,
        # A control that is not for coupled entries is made of all.
        signs=job.signs if takes_signs(rule) else "any",
        model=model,
    ).with_scale(job.scale)
