"""A job as it may be published: the run folder keeps where things lie, results and cards do not."""

from __future__ import annotations

from typing import Any

from fastdean.files.provenance import public_source
from fastdean.jobs.options import asked

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
