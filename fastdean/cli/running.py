"""How a command runs: its errors to one line and an exit code, its ranks, its record."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from functools import wraps
from typing import Any

import typer

from fastdean.cli.flags import flags_of, retold
from fastdean.cli.options import Options
from fastdean.cli.terminal import shows_everything
from fastdean.wording.bars import bars
from fastdean.wording.mendable import MendableError, is_out_of_memory
from fastdean.wording.printable import printable


class Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers send it before they kill, or SIGHUP, when the terminal is closed.

    Undone and tidied up like an interrupt.
    """

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__()
        self.exit_code = 128 + number


def terminate_on_signals() -> None:
    """Have SIGTERM and SIGHUP raise `Terminated`, SIGHUP unless nohup has it ignored."""
    signal.signal(signal.SIGTERM, _terminate)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, _terminate)


def _terminate(number: int, _: object) -> None:
    """The signal handler; a second signal does not disturb the tidying up."""
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    raise Terminated(number)


def command(
    resumable: bool | Callable[[Mapping[str, Any]], bool] = False,
    names: Mapping[str, str] = {},
    reads: Callable[..., None] | None = None,
    keeps_stdout: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """A command: its errors in one line, its result as JSON where `--json` is given.

    While it runs, nothing else can get at stdout. Its options are read as `options.Options` says.

    Args:
        resumable: whether the same command goes on where it was stopped; or says so, of what was
            typed, when it was.
        names: what functions below call a parameter of the command, see `flags.naming`.
        reads: the command whose folders this one reads; errors about them are told in its flags.
        keeps_stdout: what runs in it is another program's main, whose output is the result.
    """

    def kept(typed: Mapping[str, Any]) -> str:
        if not (resumable(typed) if callable(resumable) else resumable):
            return ""
        return f"; what is finished is kept, run the same command to go on: {command_line()}"

    def decorate(function: Callable[..., Any]) -> Callable[..., None]:
        options = Options(function)
        flags = {} if reads is None else flags_of(inspect.signature(reads))
        flags |= flags_of(options.signature)

        @wraps(function)
        def wrapped(*, as_json: bool = False, **typed: Any) -> None:
            try:
                elsewhere = nullcontext() if keeps_stdout else redirect_stdout(sys.stderr)
                with elsewhere, bars(shown=not typed.get("quiet")):
                    result = function(**options.read(typed))
                if as_json and result is not None:
                    typer.echo(printable(_json(result)))
            except Terminated as terminated:
                # Nobody hears it where the terminal is gone.
                with suppress(OSError):
                    tell(f"fastdean: terminated{kept(typed)}")
                raise typer.Exit(terminated.exit_code) from None
            except KeyboardInterrupt:
                tell(f"fastdean: interrupted{kept(typed)}")
                raise typer.Exit(130) from None
            except typer.Exit:
                raise
            except Exception as error:
                raise typer.Exit(_told(error, retold(error, flags, names))) from None

        wrapped.__signature__ = options.signature  # type: ignore[attr-defined]
        return wrapped

    return decorate


def _json(result: Any) -> str:
    """Escaped where stdout would show another character than the one that is meant."""
    plain = not shows_everything(getattr(sys.stdout, "encoding", None))
    return json.dumps(result, indent=2, ensure_ascii=plain, default=str)


def _told(error: Exception, text: str) -> int:
    """Write an error to stderr, as `text` where a user can mend it; returns the exit code."""
    if is_out_of_memory(error) and not isinstance(error, MendableError):
        text = (
            f"memory must hold what the command takes, got an error for more: {text}; free some or "
            "raise the limit, `fastdean estimate` says how much a job takes"
        )
    code = 2 if _is_mendable(error) else 1
    if code == 1 or os.environ.get("FASTDEAN_VERBOSITY", "").lower() == "debug":
        typer.echo(printable("".join(traceback.format_exception(error))), err=True, nl=False)
    who = "fastdean" if is_first_rank() else f"fastdean (rank {os.environ['RANK']})"
    typer.echo(f"{who}: {printable(text)}", err=True)
    return code


def _is_mendable(error: Exception) -> bool:
    """Whether input or machine are at fault, rather than FastDEAN."""
    import torch

    machine = (OSError, torch.distributed.DistError)
    return isinstance(error, (ValueError, MendableError, *machine)) or is_out_of_memory(error)


@contextmanager
def process_group() -> Iterator[None]:
    """The process group of a torchrun job, taken down on exit; nothing in a single process."""
    if _world_size() == 1:
        yield
        return
    import torch
    from torch.distributed.constants import default_pg_timeout

    from fastdean.models.ranks.fresh_store import fresh_store

    backend = "gloo"
    if torch.cuda.is_available():
        # Both: a model may be asked for on the CPU of a machine that has GPUs.
        backend = "cpu:gloo,cuda:nccl"
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        # Ranks on the CPU may be more than the GPUs.
        if rank < torch.cuda.device_count():
            torch.cuda.set_device(rank)
    timeout = default_pg_timeout
    store, rank, size = next(torch.distributed.rendezvous("env://", timeout=timeout))
    store = fresh_store(store, rank, size, timeout.total_seconds())
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def is_first_rank() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def tell(text: str) -> None:
    """Write lines of our own to stderr; names in them come through `one_line`."""
    if is_first_rank():
        typer.echo(printable(text), err=True)


def command_line() -> str:
    """The command to type for this job, with torchrun where it has several ranks."""
    return shlex.join([*_launcher(), "fastdean", *sys.argv[1:]])


def _launcher() -> list[str]:
    ranks = _world_size()
    if ranks == 1:
        return []
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    nodes = [] if per_node == ranks else ["--nnodes", str(ranks // per_node)]
    return ["torchrun", *nodes, "--nproc-per-node", str(per_node), "--module"]


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
