"""One class in a process of its own, which ends at a limit: none can stop the others."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

# The slowest class takes a minute where memory is slow to come by.
LIMIT_S = 240.0
_ENDING_S = 5.0
_IMPORTED = [
    *("torch", "torch._dynamo", "transformers.models.llama.modeling_llama"),
    *("transformers.integrations.moe", "transformers.integrations.finegrained_fp8"),
    *("transformers.models.auto.modeling_auto", "fastdean.coupling.scoring"),
    "benchmarks.architectures.parity",
]


def outcome_of(name: str, limit_s: float = LIMIT_S) -> dict[str, Any]:
    """As `parity.outcome_of`; a process that ends by itself or is ended is an outcome as well."""
    # Its processes are forks of one that has imported what takes long, and computed nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sending, name))
    process.start()
    sending.close()
    try:
        if receiving.poll(limit_s):
            found = receiving.recv()
            process.join(_ENDING_S)
            return found
        return {"failed": f"nothing came of it in {limit_s:.0f} s"}
    except EOFError:
        process.join()
        return {"failed": f"its process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _send(sending: Connection, name: str) -> None:
    from benchmarks.architectures import parity

    sending.send(parity.outcome_of(name))
