"""What the jobs `answer` and `judge` are asked to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

from fastdean.jobs import options
from fastdean.jobs.options import SOURCE_HELP, Help

# Bounds of memory and traffic, and the name of a variable: they change no answer.
_CHANGES_NOTHING = ("tokens_per_batch", "concurrency", "key_from", "server_timeout")
# What would be ignored if somebody else answers.
_OF_A_MODEL_IN_MEMORY: tuple[str, ...] = (
    "mask",
    "revision",
    "trust_remote_code",
    "dtype",
    "device",
)
_OF_A_MODEL_IN_MEMORY += ("tokens_per_batch",)
_OF_A_SERVER = ("variant", "key_from", "concurrency", "server_timeout")

Concurrency = Annotated[int, Help("Requests to a server at a time.")]
ServerTimeout = Annotated[
    float | None,
    Help("Seconds that one answer of a server may take, before it is asked once more [default: "
         "300]."),
]  # fmt: skip
KeyFrom = Annotated[
    str | None,
    Help(
        "Environment variable with the server's key; it is sent to the server and written nowhere.",
        metavar="VARIABLE",
    ),
]


def patience(job: AnswerJob | JudgeJob) -> dict[str, float]:
    """How long its server may take, as `Server` takes it."""
    return {} if job.server_timeout is None else {"timeout_seconds": job.server_timeout}


def _require_timeout(job: Any) -> None:
    from fastdean.evaluation.answers.server import require_timeout

    if job.server_timeout is not None:
        require_timeout("server_timeout", job.server_timeout)


def _names(typed: list[str] | None) -> tuple[str, ...]:
    return tuple(typed or ())


@dataclass(frozen=True, kw_only=True)
class AnswerJob:
    """Who answers which prompts; two jobs that are equal give equal answers.

    Attributes:
        model, revision, trust_remote_code: see `loading.load_model`; with `server`, the model's
            name there.
        prompts: see `sources.numbered_rows`.
        mask: folders or hub ids, each "NAME=FOLDER" or of the name that its folder has; the model
            answers by itself and then under each.
        server: address of an OpenAI-compatible server.
        variant: what its answers are called; of a model in memory they are "original".
        examples: rows to take, shuffled by the seed; None: all.
        template: "raw" or "chat"; None: raw, and chats in their template.
    Raises:
        ValueError, TypeError: an option out of range.
    """

    model: options.Model
    prompts: Annotated[str, Help(f"SRC of prompts; answers in it are not read: {SOURCE_HELP}.")]
    mask: Annotated[
        tuple[str, ...],
        Help(
            "Mask folder or hub id, as FOLDER or NAME=FOLDER: the model answers without it and "
            "with it; may be repeated.",
            typed=list[str] | None,
            read=_names,
        ),
    ] = ()
    server: Annotated[
        str | None,
        Help(
            "Address of a running OpenAI-compatible server (vLLM, SGLang, TGI) that answers, as "
            "in http://localhost:8000/v1; --model is the model's name there."
        ),
    ] = None
    variant: Annotated[str, Help("What the answers of a server are called.")] = "original"
    examples: Annotated[
        int | None, Help("Rows of the source to take, shuffled by --seed [default: all].")
    ] = None
    template: Annotated[
        str | None,
        Help(
            "raw, the prompt by itself, or chat, as a turn in the model's template [default: raw]; "
            "messages always take the template."
        ),
    ] = None
    max_new_tokens: Annotated[int, Help("Tokens of an answer, at most.")] = 64
    skip_bad_rows: options.SkipBadRows = False
    concurrency: Concurrency = 8
    key_from: KeyFrom = None
    server_timeout: ServerTimeout = None
    tokens_per_batch: Annotated[
        int | None,
        Help("Tokens of prompts and answers in one batch [default: by device]."),
    ] = None
    revision: options.Revision = None
    trust_remote_code: options.TrustRemoteCode = False
    dtype: options.Dtype = "auto"
    device: options.Device = None
    seed: options.Seed = 0

    def __post_init__(self) -> None:
        # Not above: the command line reads the fields before it loads torch.
        from fastdean.evaluation.answers.generation import check_options
        from fastdean.evaluation.answers.records import require_variant
        from fastdean.evaluation.answers.server import checked_url
        from fastdean.models.loading import dtype_name

        options.require_numbers(self)
        options.require_at_least(self, seed=0, examples=1, concurrency=1)
        _require_timeout(self)
        check_options(self.max_new_tokens, self.template, self.tokens_per_batch)
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        object.__setattr__(self, "mask", tuple(self.mask))
        require_variant("variant", self.variant)
        if self.server is not None:
            object.__setattr__(self, "server", checked_url(self.server))
            for name in self._given(_OF_A_MODEL_IN_MEMORY):
                raise ValueError(
                    f"{name} must be left out with server, whose model is as it is served, got "
                    f"{getattr(self, name)!r}; serve another model, and pass variant to name it"
                )
        else:
            for name in self._given(_OF_A_SERVER):
                raise ValueError(
                    f"{name} must come with server, got {getattr(self, name)!r} alone; pass "
                    "server, or leave it out"
                )

    def _given(self, names: Sequence[str]) -> list[str]:
        """Those of the options that are not as they are by default."""
        usual = {field.name: field.default for field in fields(self)}
        return [name for name in names if getattr(self, name) != usual[name]]

    def asked(self) -> dict[str, Any]:
        """What an answer depends on."""
        found = options.plain_options(self)
        return {name: value for name, value in found.items() if name not in _CHANGES_NOTHING}


@dataclass(frozen=True, kw_only=True)
class JudgeJob:
    """Which judges judge which answers; two jobs that are equal give equal verdicts.

    Attributes:
        answers: a file of answers, or the folder of `answer`, see `records.read_answers`.
        judge: each NAME_OR_FILE or NAME_OR_FILE=MODEL, see `judging.asked_judge`.
        trust_remote_code, dtype, device: of judges that are loaded, see `loading.load_model`.
    Raises:
        ValueError, TypeError: an option out of range, or no such judge.
    """

    answers: str
    judge: tuple[str, ...]
    concurrency: Concurrency = 8
    key_from: KeyFrom = None
    server_timeout: ServerTimeout = None
    tokens_per_batch: Annotated[
        int | None, Help("Tokens of one batch of a judge that is loaded [default: by device].")
    ] = None
    trust_remote_code: options.TrustRemoteCode = False
    dtype: options.Dtype = "auto"
    device: options.Device = None

    def __post_init__(self) -> None:
        # Not above: the command line reads the fields before it loads torch.
        from fastdean.data.batching import require_tokens_per_batch
        from fastdean.models.loading import dtype_name

        options.require_numbers(self)
        options.require_at_least(self, concurrency=1)
        _require_timeout(self)
        if self.tokens_per_batch is not None:
            require_tokens_per_batch(self.tokens_per_batch)
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        object.__setattr__(self, "judge", tuple(self.judge))
        if not self.judge:
            raise ValueError("judge must be given, got none; pass phrases, a name or a file")

    def asked(self) -> dict[str, Any]:
        """What a verdict depends on."""
        found = options.plain_options(self)
        return {name: value for name, value in found.items() if name not in _CHANGES_NOTHING}
