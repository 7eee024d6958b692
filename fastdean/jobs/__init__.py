"""Whole jobs, step after step; `Job` and `run` are those of the main one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastdean.jobs.coupling.job import Job

if TYPE_CHECKING:
    from fastdean.jobs.coupling.steps import run

__all__ = ["Job", "run"]


def __getattr__(name: str) -> Any:
    # The command line reads what a job can be asked before it loads torch.
    if name != "run":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastdean.jobs.coupling.steps import run

    return run
