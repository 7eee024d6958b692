"""The main job: score three data sets, couple, mask, measure before and after, report."""

from fastdean.pipeline.job import Job
from fastdean.pipeline.steps import run

__all__ = ["Job", "run"]
