"""The model of a run: in memory, or with its weights in their files while the sets are scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fastdean.jobs.coupling.job import Job
from fastdean.jobs.folder import NOT_READ_YET
from fastdean.jobs.session import Session
from fastdean.models.available_memory import available_memory
from fastdean.models.identity import PassingWeights, model_identity
from fastdean.models.layers.streaming import StreamedModel
from fastdean.models.loading import load_or_stream
from fastdean.wording.log import logger


@dataclass
class RunModel:
    """What a run scores, and what it couples and measures with afterwards.

    Attributes:
        module: its layers and configuration; without weights where it is streamed.
        tokenizer: of its folder.
        stream: None of a model that is in memory from the beginning.
        unmeasured: why nothing is measured although it was asked for; None otherwise.
    """

    module: nn.Module
    tokenizer: Any
    stream: StreamedModel | None = None
    unmeasured: str | None = None
    _passing: PassingWeights | None = None
    _needed_whole: bool = False

    @classmethod
    def open(cls, session: Session[Job]) -> RunModel:
        """Load the job's model, or open its files where it goes layer by layer.

        Raises:
            ValueError: as `load_or_stream`; or the weights do not fit into memory, and the mask
                cannot be made without them.
        """
        job = session.job
        # Scores of the whole model's top set are dense: they share their weights with the model.
        if job.order == "batches" or job.scope == "model":
            return cls(*session.load_model())
        with session.costs.step("load model"):
            found, tokenizer = load_or_stream(
                job.model,
                order=job.order,
                dtype=job.dtype,
                device=job.device,
                revision=job.revision,
                trust_remote_code=job.trust_remote_code,
                progress=session.progress and session.ranks.first,
            )
            if not isinstance(found, StreamedModel):
                session.costs.watch(found)
                return cls(found, tokenizer)
        to_couple = job.granularity == "unit" or job.rule == "random"
        fits, sizes = found.fits_in_memory(), _sizes(found)
        if to_couple and not fits:
            option, value = ("rule", job.rule) if job.rule == "random" else ("granularity", "unit")
            raise ValueError(
                f"{option} must be another than {value!r} for a model that is not loaded whole, "
                f"got {sizes}: its mask holds weights that no scores hold; use a smaller dtype or "
                "more memory"
            )
        asked = job.eval_examples > 0 or bool(job.bias)
        measured = fits and asked
        said = "order='layers': the weights stay in their files while the sets are scored"
        unmeasured = None
        if measured or to_couple:
            said += "; the whole model is loaded after that"
        elif asked:
            unmeasured = f"Nothing was measured: the model is not loaded whole, with {sizes}."
            said += f"; nothing is measured, since the model is not loaded whole, with {sizes}"
        else:
            said += "; nothing is loaded whole, since nothing is to be measured"
        if session.ranks.first:
            logger.info("%s", said)
        return cls(
            found.model,
            tokenizer,
            found,
            unmeasured,
            PassingWeights(found) if session.ranks.first else None,
            measured or to_couple,
        )

    def compare(self, session: Session[Job]) -> None:
        """Compare the model with that of an earlier call of the job, on the first rank.

        The weights of a streamed model are digested as they pass by, so that they need not be read
        once more; they are read here only where there is something to compare them with.
        """
        if self.stream is None:
            session.compare_model(self.module, self.tokenizer)
        elif self._passing is not None:
            with session.costs.step("check model"):
                weights = self._passing.read() if session.folder.resumes else NOT_READ_YET
                identity = model_identity(
                    self.module, self.tokenizer, weights=weights, device=self.stream.device
                )
            session.compare(identity)

    def note_weights(self, session: Session[Job]) -> None:
        """Write down the digest of weights that have passed by; the folder is claimed."""
        if self._passing is not None and (digest := self._passing.digest) is not None:
            session.folder.note({"model weights": digest})

    @property
    def steps_to_come(self) -> int:
        """How many steps `whole` takes."""
        return int(self._needed_whole)

    def whole(self, session: Session[Job]) -> nn.Module | None:
        """The model in memory, to couple and measure with; None where it is not loaded."""
        if self.stream is None:
            return self.module
        if not self._needed_whole:
            return None
        model, _ = session.load_model("load whole model")
        return model


def _sizes(stream: StreamedModel) -> str:
    free = available_memory(stream.device)
    room = "" if free is None else f" and {free / 1e9:.2f} GB of memory"
    return f"{stream.bytes_in_memory / 1e9:.2f} GB of weights{room}"
