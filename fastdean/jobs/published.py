"""A job as it may be published: the run folder keeps where things lie, results and cards do not."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastdean.files.provenance import public_source

# Of the jobs, the fields that may name a place on this machine.
_SOURCES = ("model", "fairness", "privacy", "general", "text", "data", "words")


def published(job: Any) -> dict[str, Any]:
    """The fields of a job, with the names of its sources in place of their paths."""
    found = asdict(job)
    for name in _SOURCES:
        if found.get(name) is not None:
            found[name] = public_source(found[name])
    if "bias" in found:
        found["bias"] = [public_source(entry) for entry in found["bias"]]
    return found
