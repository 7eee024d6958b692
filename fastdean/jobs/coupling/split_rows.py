"""The rows of the main job: which are scored, which measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastdean.data.skipped import Skipped
from fastdean.jobs.coupling.job import Job
from fastdean.jobs.rows import NumberedRow, content_digest, is_pair, take_rows, usable_rows


@dataclass(frozen=True)
class SplitRows:
    """One source, split into what is scored and what is measured on.

    Attributes:
        held_out: whether none of the measured rows is a scored one.
        skipped: what was left out; None where the first bad row is an error.
        content: digest of all rows of the source, whatever their order.
    """

    scored: list[NumberedRow]
    measured: list[NumberedRow]
    held_out: bool
    skipped: Skipped | None = None
    content: str = ""

    def usable(self, *arguments: Any, **options: Any) -> SplitRows:
        """Without the rows that cannot be encoded: see `usable_rows`."""
        scored, measured = (
            usable_rows(rows, self.skipped, *arguments, pairs=pairs, **options)
            for rows, pairs in ((self.scored, False), (self.measured, True))
        )
        return replace(self, scored=scored, measured=measured)

    @property
    def digest(self) -> str:
        """Of the rows and their order, to tell whether the source has changed."""
        content = json.dumps([self.scored, self.measured], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()


def split_rows(name: str, job: Job) -> SplitRows:
    """The scored rows, and others to measure on: of other prompts, with what the figures need."""
    skipped = Skipped() if job.skip_bad_rows else None
    sets = job.data_sets
    scored, others = take_rows(
        sets.sources[name],
        job.examples,
        job.seed,
        name=sets.argument(name),
        skipped=skipped,
        usual=Job.examples,
    )
    # Margins need both answers to a prompt; perplexity, of sets that are spared, takes any row.
    needs_pairs = name not in sets.spared
    seen = {str(row["prompt"]) for _, row in scored if "prompt" in row}
    fresh = [(n, row) for n, row in others if str(row.get("prompt")) not in seen]

    def usable(candidates: Sequence[NumberedRow]) -> list[NumberedRow]:
        found = [(n, row) for n, row in candidates if not needs_pairs or is_pair(row)]
        return found[: job.eval_examples]

    held_out = usable(fresh)
    content = content_digest([*scored, *others])
    return SplitRows(scored, held_out or usable(scored), bool(held_out), skipped, content)
