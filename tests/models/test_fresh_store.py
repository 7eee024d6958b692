"""Ranks that are started again on one store find nothing of those before them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import forked
import pytest
import torch
from torch import distributed
from torch.distributed import HashStore, PrefixStore, TCPStore

from fastdean.cli.running import process_group
from fastdean.models.ranks.fresh_store import fresh_store

WORLD = 3
SECONDS = 60


def started(store, order=range(WORLD)):
    """The stores of the ranks of a start, by rank; they come in this order."""
    with ThreadPoolExecutor() as pool:
        coming = {rank: pool.submit(fresh_store, store, rank, WORLD, SECONDS) for rank in order}
        return [coming[rank].result() for rank in range(WORLD)]


def test_the_ranks_of_a_start_share_a_store_and_see_nothing_of_another():
    shared = HashStore()
    first = started(shared)
    first[0].set("address", "of the first start")
    assert [store.get("address") for store in first] == [b"of the first start"] * WORLD
    second = started(shared, order=reversed(range(WORLD)))
    assert not any(store.check(["address"]) for store in second)
    second[0].set("address", "of the second start")
    assert [store.get("address") for store in second] == [b"of the second start"] * WORLD
    assert first[1].get("address") == b"of the first start"


def test_what_a_killed_rank_has_asked_is_no_rank():
    """Of a start in which the others never came, and of one whose rank 0 was killed."""
    shared = HashStore()
    with pytest.raises(RuntimeError, match="no answer from rank 0 of 3 within 0 s"):
        fresh_store(shared, 1, WORLD, 0.01)
    with pytest.raises(RuntimeError, match="no answer from rank 1, 2 of 3 within 0 s"):
        fresh_store(shared, 0, WORLD, 0.01)
    stores = started(shared)
    stores[2].set("here", "")
    assert all(store.check(["here"]) for store in stores)


def adds_up():
    torch.set_num_threads(1)
    with process_group():
        total = torch.ones(1)
        distributed.all_reduce(total)
        assert total == 2


def test_a_rank_that_comes_first_does_not_call_the_rank_0_of_an_earlier_start():
    """As under torchrun, whose store outlives the ranks."""
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agent.port), "WORLD_SIZE": "2"},
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }

    def start(rank):
        return forked.start(adds_up, environment=variables | {"RANK": str(rank)})

    asked = PrefixStore("fastdean: starts", agent)
    for _ in range(2):
        first = start(1)
        while first.runs() and not asked.check(["rank 1 asks"]):
            pass
        second = start(0)
        for process in (first, second):
            done = process.finish()
            assert done.returncode == 0, done.stderr
        asked.delete_key("rank 1 asks")
