"""Commands, and functions, that run to their end in a process of their own."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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


def apart(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """`function(*arguments)` of a module, in a new process; arguments and result travel as JSON."""
    place = (function.__module__, function.__name__, json.dumps(arguments))
    return json.loads(finished([sys.executable, "-m", __name__, *place]).splitlines()[-1])


if __name__ == "__main__":
    module, name, given = sys.argv[1:]
    print(json.dumps(getattr(importlib.import_module(module), name)(*json.loads(given))))
