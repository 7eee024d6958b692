"""The job of `fastdean score`: one data set is scored, and the scores are saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdean.coupling.results.scores import Scores
from fastdean.coupling.resuming.resumable import holds_job
from fastdean.coupling.scoring import score
from fastdean.data.rendering import describe_rendering, rendering_cautions
from fastdean.data.skipped import Skipped
from fastdean.files.provenance import public_source
from fastdean.files.storage import holds_only, is_empty
from fastdean.jobs.costs import Costs
from fastdean.jobs.coupling.job import Job, ScoreJob
from fastdean.jobs.folder import require_free, require_outside
from fastdean.jobs.rows import encode_usable, take_rows
from fastdean.models.layers.streaming import StreamedModel
from fastdean.models.loading import load_or_stream
from fastdean.models.ranks.distributed import Ranks
from fastdean.models.ranks.earlier_starts import begun_before, note_begun
from fastdean.wording.log import logger


def run(job: ScoreJob, out: Path, *, overwrite: bool, progress: bool) -> Scores | None:
    """Score the data set and save the scores in `out`; None on other ranks than the first.

    Raises:
        ValueError, OSError: as `score` and `Scores.save_pretrained`.
    """
    ranks = Ranks.current()
    costs = Costs(total=3, shown=progress and ranks.first)
    with ranks.failing_together(job.rank_timeout):
        finished = False
        if ranks.first:
            require_outside(out, job.model)
            finished = not overwrite and begun_before(_work(out)) and holds_only(out, "scores")
            if not finished:
                if not holds_job(out):
                    require_free(
                        out, overwrite, lambda folder: holds_only(folder, "scores"), "scores"
                    )
                note_begun(_work(out))
        if ranks.highest(int(finished)):
            # A rank that died after the scores were there had all of them started again.
            if not ranks.first:
                return None
            logger.warning("%r holds the scores already, which this job finished before", str(out))
            return Scores.from_pretrained(out)
        skipped = Skipped() if job.skip_bad_rows else None
        with costs.step("read data"):
            rows, _ = take_rows(
                job.data,
                job.examples,
                job.seed,
                name="data",
                skipped=skipped,
                usual=ScoreJob.examples,
            )
        with costs.step("load model"):
            model, tokenizer = load_or_stream(
                job.model,
                order=job.order,
                dtype=job.dtype,
                device=job.device,
                revision=job.revision,
                trust_remote_code=job.trust_remote_code,
                progress=progress and ranks.first,
            )
        whole = model.model if isinstance(model, StreamedModel) else model
        options = {"template": job.template, "max_length": job.max_length, "name": "data"}
        rows, examples = encode_usable(rows, skipped, job.data, tokenizer, whole, **options)
    if ranks.first:
        told = [] if skipped is None else skipped.told("data")
        numbers = [number for number, _ in rows]
        told += rendering_cautions(examples, numbers, tokenizer, job.data, job.template)
        for sentence in told:
            logger.warning("%s", sentence)
    with costs.step("score"):
        scores = score(
            model,
            examples,
            granularity=job.granularity,
            target_modules=job.target_modules,
            expert_scope=job.expert_scope,
            keep_top=None if job.keep_top == 1 else job.keep_top,
            tokens_per_batch=job.tokens_per_batch,
            memory_budget=job.memory_budget,
            order=job.order,
            states=job.states,
            signs=job.signs,
            resume=_resume(job, out),
            deterministic=job.deterministic,
            rank_timeout=job.rank_timeout,
            progress=progress,
        )
    if not ranks.first:
        return None
    note_origin(
        scores, job, job.data, describe_rendering(examples, tokenizer, job.template), skipped
    )
    scores.save_pretrained(out, overwrite=overwrite)
    return scores


def _work(out: Path) -> str:
    """The scoring into `out`, as starts of a job tell each other of it."""
    return f"scores in {out.resolve()}"


def _resume(job: ScoreJob, out: Path) -> Path | None:
    """Where a sweep keeps how far it came: the place of the scores, until they are there."""
    if job.order == "batches" or job.states != "auto":
        return None
    return out if holds_job(out) or not out.exists() or is_empty(out) else None


def note_origin(
    scores: Scores,
    job: Job | ScoreJob,
    source: str,
    rendering: dict[str, Any],
    skipped: Skipped | None,
) -> None:
    """Note in the manifest what was scored: the rows, how they were rendered, and the model."""
    scores.manifest["data"] |= {
        "sources": [public_source(source)],
        **rendering,
        **({} if skipped is None else skipped.described()),
    }
    scores.manifest["model"] |= {
        "revision": job.revision,
        "trust_remote_code": job.trust_remote_code,
    }
