"""Whether all ranks have come to a step that some may leave out, found out over the group's store.

Who enters a collective that not all enter meets the others' next one there: the process group ends
the process, or waits until its time is up, and names nobody.
"""

from __future__ import annotations

import time

from fastdean.models.ranks.distributed import Ranks
from fastdean.models.ranks.lost_ranks import group_timeout
from fastdean.wording.log import logger
from fastdean.wording.mendable import StateError

_PREFIX = "fastdean: ranks that have come"
# Seconds between two looks, and until those who wait are told for whom.
_LOOK, _LONG = 0.02, 60.0
# Of the time after which the others, which wait elsewhere, end with an error that says less.
_SHARE = 0.9
# How often all of them have come: as often on each, also where some have failed in between.
_meetings = 0


def require_all_come(step: str, ranks: Ranks, remedy: str) -> None:
    """StateError where a rank does not come within nine tenths of the process group's time.

    Args:
        step: what all ranks must have, as the beginning of an error.
    """
    global _meetings
    if ranks.size == 1:
        return
    from torch.distributed import PrefixStore
    from torch.distributed.distributed_c10d import _get_default_store

    store = PrefixStore(f"{_PREFIX} {_meetings}", _get_default_store())
    store.set(str(ranks.rank), "")
    began, limit, told = time.monotonic(), _SHARE * group_timeout(), False
    missing = list(range(ranks.size))
    while missing := [rank for rank in missing if not store.check([str(rank)])]:
        waited, names = time.monotonic() - began, ", ".join(map(str, missing))
        if waited > limit:
            raise StateError(
                f"{step} must be there on every rank, got none on rank {names} of {ranks.size} "
                f"within {waited:.0f} s; {remedy}"
            )
        if waited > _LONG and not told:
            told = True
            logger.warning("%s waits for rank %s of %d; %s", step, names, ranks.size, remedy)
        time.sleep(_LOOK)
    _meetings += 1
