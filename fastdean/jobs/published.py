"""A job and its model as they may be published, without where they lie on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastdean.files.provenance import public_name, public_source
from fastdean.jobs.options import asked

if TYPE_CHECKING:
    from torch import nn

# Of the jobs, the fields that may name a place on this machine.
_SOURCES = (
    "model",
    "fairness",
    "privacy",
    "general",
    "text",
    "data",
    "words",
    "prompts",
    "answers",
    # Of `eval`; `answer` has a list of them.
    "mask",
    "task_folder",
)


def published(job: Any) -> dict[str, Any]:
    """The fields of a job, with the names of its sources in place of their paths."""
    found = asked(job)
    for name in _SOURCES:
        # With sets of other names "general" is a list of them.
        if isinstance(found.get(name), str):
            found[name] = public_source(found[name])
    if "sets" in found:
        found["sets"] = {name: public_source(source) for name, source in found["sets"].items()}
    for name in ("bias", "mask", "judge"):
        if isinstance(found.get(name), list | tuple):
            found[name] = [public_source(entry) for entry in found[name]]
    return found


def described_model(name: str, model: nn.Module) -> dict[str, Any]:
    """A job's model in its results."""
    return {
        "name": public_name(name),
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
