"""What the calls of all jobs share: a folder is opened, input compared, results written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import nn

from fastdean.evaluation.answers.server import without_port
from fastdean.files.provenance import now, public_command, versions
from fastdean.files.storage import write_json_atomic
from fastdean.jobs.answers.job import AnswerJob
from fastdean.jobs.collapse.job import CollapseJob, DebiasJob
from fastdean.jobs.costs import Costs
from fastdean.jobs.coupling.job import Job
from fastdean.jobs.evaluation.job import EvalJob
from fastdean.jobs.folder import (
    CARD_FILE,
    REPORT_FILE,
    RESULTS_FILE,
    RunFolder,
    require_outside,
)
from fastdean.jobs.options import asked
from fastdean.models.identity import model_identity
from fastdean.models.loading import load_model
from fastdean.models.ranks.distributed import Ranks
from fastdean.models.ranks.earlier_starts import begun_before, note_begun
from fastdean.report import read_results, write_card, write_report
from fastdean.wording.log import logger

AnyJob = TypeVar("AnyJob", Job, CollapseJob, DebiasJob, AnswerJob, EvalJob)


@dataclass(frozen=True)
class Session(Generic[AnyJob]):
    """One call of a job.

    Attributes:
        job: what is asked for, a dataclass.
        folder: where it is written, and what an earlier call has finished.
        costs: of its steps.
        ranks: the processes that share it; the first of them writes.
        progress: whether bars are shown.
        command: the command line, for the record.
    """

    job: AnyJob
    folder: RunFolder
    costs: Costs
    ranks: Ranks
    progress: bool
    command: str

    @classmethod
    def open(
        cls,
        job: AnyJob,
        out: str | Path,
        command: str,
        overwrite: bool,
        progress: bool,
        *,
        steps: int | None = None,
        shows: str = REPORT_FILE,
    ) -> Session[AnyJob]:
        """Begin a call; ValueError unless the job may write to `out`.

        Args:
            steps: how many there are at most; None: not known yet.
            shows: the file of a finished run that a person looks at.
        """
        ranks = Ranks.current()
        options = plain(asked(job))
        # Where intermediate states lie changes no result; a full disk is answered by another one.
        options.pop("states", None)
        # Nor does how long ranks wait for each other, which a job that has failed may be told anew.
        options.pop("rank_timeout", None)
        # A server that is started again may get another port; its model's name identifies it.
        if options.get("server") is not None:
            options["server"] = without_port(options["server"])
        folder = RunFolder(Path(out).expanduser(), options, overwrite, shows=shows)
        costs = Costs(total=steps, shown=progress and ranks.first)
        session = cls(job, folder, costs, ranks, progress, command)
        # Other ranks may run on machines that do not see the folder.
        if ranks.first:
            require_outside(folder.path, job.model)
            if not session._finished_by_an_earlier_start():
                folder.check()
                note_begun(folder.work)
        return session

    def finished_before(self) -> dict[str, Any] | None:
        """The results of a job that torchrun starts again though an earlier start has finished it.

        Since a rank has died after that. None where there is something left to do; every rank calls
        it. Another rank than the first gets an empty dictionary in place of the results.
        """
        if not self.ranks.agree(self.ranks.first and self._finished_by_an_earlier_start()):
            return None
        if not self.ranks.first:
            return {}
        out = self.folder.path
        logger.warning("%r holds the run already, which this job finished before", str(out))
        return read_results(out / RESULTS_FILE)

    def _finished_by_an_earlier_start(self) -> bool:
        """Without --overwrite: what that is to replace looks the same until it is replaced."""
        folder = self.folder
        return not folder.overwrite and folder.is_finished() and begun_before(folder.work)

    def compare(self, digests: Mapping[str, str | None]) -> None:
        """Note what the job reads; ValueError if the folder holds figures of other input."""
        self.folder.inputs |= digests
        if self.ranks.first:
            self.folder.check()

    def load_model(self, step: str = "load model") -> tuple[nn.Module, Any]:
        """The job's model and its tokenizer."""
        with self.costs.step(step):
            model, tokenizer = load_model_of(self.job, self.progress and self.ranks.first)
            self.costs.watch(model)
        return model, tokenizer

    def compare_model(
        self, model: nn.Module, tokenizer: Any, **digests: str
    ) -> dict[str, str] | None:
        """As `compare`, of the model and what else is known by now.

        Returns:
            The model's identity, on the first rank.
        """
        if not self.ranks.first:
            return None
        with self.costs.step("check model"):
            identity = model_identity(model, tokenizer)
        self.compare({**identity, **digests})
        return identity

    def warn(self, sentences: Sequence[str]) -> None:
        if self.ranks.first:
            for sentence in sentences:
                logger.warning("%s", sentence)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Free the folder again if the block fails before anything is finished in it."""
        try:
            yield
        except BaseException:
            if self.ranks.first:
                self.folder.release_if_empty()
            raise

    def results(self, title: str, own: Mapping[str, Any]) -> dict[str, Any]:
        """The content of results.json: what every job says of itself, and its `own` entries."""
        return plain(
            {
                "title": title,
                "created": now(),
                "command": public_command(self.command),
                "versions": versions(),
                **own,
            }
        )

    def finish(self, results: dict[str, Any]) -> None:
        """Write results.json and what is drawn of it; the run is finished."""
        publish(results, self.folder)
        self.folder.finish()


def publish(results: dict[str, Any], folder: RunFolder) -> None:
    """Write results.json, and the page and the card of the same figures."""
    write_json_atomic(folder.path / RESULTS_FILE, results)
    write_report(results, folder.path / REPORT_FILE)
    write_card(results, folder.path / CARD_FILE)


def load_model_of(job: Any, progress: bool) -> tuple[nn.Module, Any]:
    """The model that a job names, and its tokenizer."""
    return load_model(
        job.model,
        dtype=job.dtype,
        device=job.device,
        revision=job.revision,
        trust_remote_code=job.trust_remote_code,
        progress=progress,
    )


def plain(value: Any) -> Any:
    """JSON has no NaN and no tuples; what is not a number is null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not isfinite(value):
        return None
    return value
