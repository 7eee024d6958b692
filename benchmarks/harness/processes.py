"""Commands that run to their end in a process of their own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import store


def finished(command: Sequence[str]) -> str:
    """What the command printed; it sees the package of this checkout."""
    paths = [str(store.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    if done.returncode != 0:
        said = (done.stderr.strip() or "nothing").splitlines()[-1]
        raise RuntimeError(
            f"{Path(command[0]).name} must end well to be timed, got exit code {done.returncode} "
            f"and {said!r}; nothing was recorded"
        )
    return done.stdout
