"""The main job: score three data sets, couple, mask, measure before and after, report."""

from __future__ import annotations

from fastdean.jobs.coupling.job import Job
from fastdean.jobs.coupling.steps import run

__all__ = ["Job", "run"]
