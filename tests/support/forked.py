"""Processes of their own that need not import for seconds: forks of one that has done so.

A test that is about starting Python, or about what an import costs, starts Python instead.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

# What takes long to import, of whatever is run here.
_IMPORTED = [
    *("torch", "torch.distributed", "transformers.models.llama.modeling_llama", "pytest"),
    *("transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto"),
    *("fastdean.cli.commands", "fastdean.jobs.coupling.steps", "fastdean.masks.checkpoint"),
]
_LIMIT_S = 120


class Done(NamedTuple):
    """What a process left; `returncode` is minus the signal that ended it."""

    returncode: int
    stdout: str
    stderr: str


class Running:
    """A process that was started by `start`."""

    def __init__(self, process: multiprocessing.Process, folder: tempfile.TemporaryDirectory):
        self._process, self._folder = process, folder

    def finish(self) -> Done:
        self._process.join(_LIMIT_S)
        ended = self._process.exitcode is not None
        self.kill()
        said = [Path(self._folder.name, name).read_text("utf-8") for name in ("out", "err")]
        self._folder.cleanup()
        assert ended, said
        return Done(self._process.exitcode, *said)

    def runs(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def context() -> multiprocessing.context.BaseContext:
    """How such processes are started; no thread and no CUDA context is forked with them."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(_IMPORTED)
    # Read once, where the bars are imported: a process of its own shows what a user sees.
    quiet = os.environ.pop("TQDM_DISABLE", None)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        if quiet is not None:
            os.environ["TQDM_DISABLE"] = quiet
    return found


def start(
    function: Callable[..., object],
    *arguments: object,
    environment: Mapping[str, str] | None = None,
) -> Running:
    """`function(*arguments)`, one that can be pickled; `environment` is added to that of here."""
    folder = tempfile.TemporaryDirectory()
    variables = {**os.environ, **(environment or {})}
    variables.pop("TQDM_DISABLE", None)
    made = context().Process(target=_run, args=(folder.name, variables, function, arguments))
    made.start()
    return Running(made, folder)


def run(function: Callable[..., object], *arguments: object) -> Done:
    return start(function, *arguments).finish()


def run_script(script: str, *arguments: str) -> Done:
    """As `python -c script arguments`."""
    return run(_execute, script, arguments)


def run_command(*arguments: str) -> None:
    """To be started: `python -m fastdean arguments`."""
    from fastdean import cli

    sys.argv = ["fastdean", *arguments]
    cli.main()


def _execute(script: str, arguments: tuple[str, ...]) -> None:
    sys.argv = ["-c", *arguments]
    exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})


def _run(folder: str, variables: dict[str, str], function: Callable, arguments: tuple) -> None:
    os.environ.clear()
    os.environ.update(variables)
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT), number)
    function(*arguments)
