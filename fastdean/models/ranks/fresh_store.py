"""A store for the process group of one start of a job, which holds nothing of an earlier start.

torchrun keeps one store for all starts of a job. Ranks that are started again may find in it where
those before them listened, before their peers have said where they do (pytorch#135712); how often a
rank was started does not tell the starts apart, as agents do not count the same.
"""

from __future__ import annotations

import secrets
import time
from datetime import timedelta

from torch.distributed import PrefixStore, Store

from fastdean.wording.mendable import StateError

_PREFIX = "fastdean: starts"
# Seconds between two looks of rank 0.
_LOOK = 0.02


def fresh_store(store: Store, rank: int, size: int, seconds: float) -> Store:
    """The part of a store that all ranks of this start share, and those of no other start.

    Each rank asks with a word that nobody had before, and rank 0 answers that word with the name of
    the start: so no answer is an earlier start's. The ranks of that have ended.

    Args:
        seconds: how long ranks wait for each other.
    Raises:
        RuntimeError: a rank did not come so far.
    """
    shared, own = PrefixStore(_PREFIX, store), secrets.token_hex(16)
    if rank == 0:
        _answer(shared, size, own, seconds)
        return PrefixStore(f"{_PREFIX} {own}", store)
    shared.set(f"rank {rank} asks", own)
    answer = f"answer to {own}"
    try:
        shared.wait([answer], timedelta(seconds=seconds))
    except RuntimeError as error:
        raise _silent([0], size, seconds) from error
    name = shared.get(answer).decode()
    shared.set(f"rank {rank} has {name}", "")
    return PrefixStore(f"{_PREFIX} {name}", store)


def _answer(shared: Store, size: int, name: str, seconds: float) -> None:
    """Tell every other rank the name of the start, until each of them has it."""
    until = time.monotonic() + seconds
    without = list(range(1, size))
    while True:
        # What a rank of an earlier start asked may still be there; its answer is read by nobody.
        for rank in without:
            if shared.check([f"rank {rank} asks"]):
                asked = shared.get(f"rank {rank} asks").decode()
                shared.set(f"answer to {asked}", name)
        without = [rank for rank in without if not shared.check([f"rank {rank} has {name}"])]
        if not without:
            return
        if time.monotonic() > until:
            raise _silent(without, size, seconds)
        time.sleep(_LOOK)


def _silent(ranks: list[int], size: int, seconds: float) -> StateError:
    names = ", ".join(map(str, ranks))
    return StateError(
        f"every rank must start, got no answer from rank {names} of {size} within {seconds:.0f} s; "
        "see what it said last, and start the job again"
    )
