"""What earlier starts of a torchrun job began: torchrun starts all ranks again when one has died.

One that dies after the work was done makes the job start again. What that start finds finished is
then its own work, and nothing to refuse.
"""

from __future__ import annotations

import secrets

import torch
from torch.distributed import PrefixStore, Store

_PREFIX = "fastdean: begun"
# Tells this process from those of other starts.
_START = secrets.token_hex(16)


def note_begun(work: str) -> None:
    """Note for later starts of this job that this one began `work`; nothing without a job."""
    store = _store_of_the_job()
    if store is not None:
        store.set(work, _START)


def begun_before(work: str) -> bool:
    """Whether an earlier start of this job began `work`. Where torchrun's store is new: False."""
    store = _store_of_the_job()
    return store is not None and store.check([work]) and store.get(work).decode() != _START


def _store_of_the_job() -> Store | None:
    """The store that all starts share, without the prefixes that keep them apart."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    from torch.distributed.distributed_c10d import _get_default_store

    store = _get_default_store()
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return PrefixStore(_PREFIX, store)
