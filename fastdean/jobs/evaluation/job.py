"""What the job `eval` is asked to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from fastdean.jobs import options
from fastdean.jobs.options import Help


def _names(typed: Sequence[str] | None) -> tuple[str, ...]:
    parts = (part.strip() for text in typed or () for part in text.split(","))
    return tuple(part for part in parts if part)


@dataclass(frozen=True, kw_only=True)
class EvalJob:
    """What is measured of a model, and of the same model with a mask.

    Attributes:
        model, revision, trust_remote_code, dtype, device: see `loading.load_model`.
        mask: see `NeuronMask.from_pretrained`; None: the model alone is measured.
        tasks, task_folder: see `ability.task_manager`.
        shots, limit, chat_template, batch_size: see `ability.task_scores`.
        bias: measures, "name" or "name=SRC": see `jobs.bias.asked.MEASURES`.
        start_token: of their likelihoods, see `evaluation.bias.start.start_token`.
        bias_template: of their prompts, see `evaluation.over_refusal`; None: by the tokenizer.
        seed: of tests, bootstraps and the examples before each question.
    Raises:
        ValueError: an option out of range, or nothing to measure.
    """

    model: options.Model
    mask: Annotated[
        str | None, Help("Mask folder or hub id: measure without it and with it, on one load.")
    ] = None
    tasks: Annotated[
        tuple[str, ...],
        Help(
            "Tasks or groups of lm-eval, with commas between them: hellaswag,boolq.",
            typed=list[str] | None,
            read=_names,
        ),
    ] = ()
    bias: options.Bias = ()
    shots: Annotated[
        int | None, Help("Examples before each question [default: as the task says].")
    ] = None
    limit: Annotated[int | None, Help("The first so many items of each task.")] = None
    chat_template: Annotated[bool, Help("Put questions through the chat template.")] = False
    task_folder: Annotated[str | None, Help("Folder of task files (YAML) of your own.")] = None
    batch_size: Annotated[int, Help("Sequences in one forward pass of a task.")] = 8
    start_token: options.StartToken = "auto"
    bias_template: options.BiasTemplate = None
    revision: options.Revision = None
    trust_remote_code: options.TrustRemoteCode = False
    dtype: options.Dtype = "auto"
    device: options.Device = None
    seed: options.Seed = 0

    def __post_init__(self) -> None:
        # Not above: the command line reads the fields before it loads torch.
        from fastdean.jobs.bias import asked as bias_asked

        if not self.tasks and not self.bias:
            raise ValueError(
                "tasks must be names of tasks where no bias measure is asked for, got none; pass "
                "tasks='hellaswag,boolq', or bias='over_refusal'"
            )
        doubled = [name for name in self.tasks if self.tasks.count(name) > 1]
        if doubled:
            raise ValueError(f"tasks must name each task once, got {doubled[0]!r} again")
        options.require_at_least(self, seed=0, shots=0, limit=1, batch_size=1)
        bias_asked.check(self.bias, self.start_token, self.bias_template)
