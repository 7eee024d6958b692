"""The command line: arguments to calls.

stdout carries results only: the JSON of `--json`, and what `fastdean info` prints; everything else
goes to stderr. Exit codes: 0 done; 1 a fault of FastDEAN (with a traceback); 2 the request cannot
be carried out as given (one line says why); 129 its terminal was closed (SIGHUP); 130 interrupted;
143 terminated (SIGTERM).
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

from fastdean.cli import answer_commands, collapse_commands, eval_commands
from fastdean.cli.commands import app
from fastdean.cli.running import terminate_on_signals
from fastdean.cli.terminal import write_what_can_be_shown

__all__ = ["app", "main"]

# Without a name: its commands stand beside the others.
app.add_typer(collapse_commands.app)
app.add_typer(answer_commands.app)
app.add_typer(eval_commands.app)


def main() -> None:
    """Entry point of `fastdean` and `python -m fastdean`."""
    write_what_can_be_shown()
    _quieten_libraries()
    _log_to_stderr()
    terminate_on_signals()
    app()


def _quieten_libraries() -> None:
    """Their advice is for programmers; ours to a user must not drown in it."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("fastdean: %(message)s"))
    logging.getLogger("fastdean").addHandler(handler)
