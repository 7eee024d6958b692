"""`fastdean.run`: the main job as one call, with the arguments of the command."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from fastdean.default_device import cpu_by_default
from fastdean.jobs.coupling.job import Job
from fastdean.jobs.coupling.steps import run as run_job
from fastdean.jobs.options import with_fields


@cpu_by_default
def run(
    model: str, *, out: str | Path, overwrite: bool = False, progress: bool = True, **job: Any
) -> dict[str, Any]:
    """Score data sets, couple, mask, measure before and after, and report: the whole job.

    Equals the command `fastdean run`: the same folder, resumed or refused alike, and the results
    that `--json` prints.

    Args:
        out: the run folder: new, empty, or of the same unfinished job, which is then resumed.
        overwrite: replace a folder that holds another or a finished run, and nothing else.
        progress: say which step is being done, and show progress bars.
        model: a Hugging Face folder, hub id or .gguf file.
        job: `fairness`, `privacy` and `general`, each a SRC; or `sets={"A": SRC, ...}` of any names
            with `couple=("A", "B")` and `general=("C",)`; and every option of the command by its
            name in Python. `fastdean.jobs.Job` describes them. `memory_budget` is in bytes, as in
            `fastdean.score`.
    Returns:
        The content of results.json; on other ranks than the first an empty dictionary.
    Raises:
        TypeError: an argument that is missing or unknown.
        ValueError, OSError: as the steps; what was finished is kept and used again.
    """
    _SIGNATURE.bind(model, out=out, **job)
    return run_job(Job(model=model, **job), out, overwrite=overwrite, progress=progress)


# What `help` shows.
_SIGNATURE = with_fields(inspect.signature(run), Job, positional=("model",))
run.__signature__ = _SIGNATURE  # type: ignore[attr-defined]
