"""A few processes of a gloo group on one machine, and what each of them found."""

from __future__ import annotations

import datetime
import time

import forked
import torch
from torch import distributed

WORLD = 2
LIMIT_S = 120


def join_group(rank, folder, world=WORLD):
    """The first line of a worker: one thread each, and a group that is found through a file."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=LIMIT_S / 2),
    )


def leave_group(rank, folder, found):
    """The last line of a worker: `found` goes to who called `run_ranks`."""
    torch.save(found, folder / f"rank{rank}.pt")
    distributed.destroy_process_group()


def run_ranks(worker, folder, world=WORLD):
    """`worker(rank, folder)` in a process for each rank; what they left, by rank."""
    forked.context()
    started = torch.multiprocessing.start_processes(
        worker, args=(folder,), nprocs=world, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + LIMIT_S
    try:
        while not started.join(timeout=5):
            assert time.monotonic() < deadline, "the ranks wait for each other"
    finally:
        for process in started.processes:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(world)]
