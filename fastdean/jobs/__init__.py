"""Whole jobs, step after step; `Job` and `run` are those of the main one."""

from fastdean.jobs.coupling import Job, run

__all__ = ["Job", "run"]
