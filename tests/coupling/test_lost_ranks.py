"""A rank that is killed or hangs is named by all others, in time; SIGTERM ends all in order."""

from __future__ import annotations

import os
import signal
import time

import forked
import pytest
import torch
from tiny_data import batches, make_examples
from tiny_models import llama
from torch import distributed
from two_ranks import WORLD, join_group

import fastdean
from fastdean.coupling import states
from fastdean.models import distributed as ranks
from fastdean.models import lost_ranks

# Seconds that a rank waits, and what all of this may take besides.
TIMEOUT, REST = 2.0, 20.0


def loader():
    return batches(make_examples(lengths=(3, 9, 17, 4, 12)), 2)


def in_the_second_layer(act, monkeypatch):
    """Call `act` as soon as the second layer has returned for a batch."""
    keep = states.States.keep

    def kept(self, layer, batch, returned):
        keep(self, layer, batch, returned)
        if layer == 1:
            act()

    monkeypatch.setattr(states.States, "keep", kept)


def scored(folder, **options):
    options = {"order": "layers", "resume": folder / "job", "progress": False, **options}
    return fastdean.score(llama(), loader(), **options)


def loses_the_last(rank, folder, number, world):
    """The last rank gets a signal in the middle of its work; the others write what they hear."""
    join_group(rank, folder, world)
    lost_ranks._SOON, lost_ranks._LOOK = 1.0, 0.1
    with pytest.MonkeyPatch.context() as patch:
        if rank == world - 1:
            in_the_second_layer(lambda: os.kill(os.getpid(), number), patch)
        began = time.monotonic()
        with pytest.raises(RuntimeError) as error:
            scored(folder, rank_timeout=TIMEOUT)
        heard = f"{type(error.value).__name__}: {error.value}"
    torch.save((heard, time.monotonic() - began), folder / f"rank{rank}.pt")
    distributed.destroy_process_group()


def all_but_the_last_hear(folder, number, world):
    started = [forked.start(loses_the_last, r, folder, number, world) for r in range(world)]
    try:
        for process in started[:-1]:
            done = process.finish()
            assert done.returncode == 0, done.stderr
    finally:
        for process in started:
            process.kill()
        started[-1].finish()
    for rank in range(world - 1):
        heard, seconds = torch.load(folder / f"rank{rank}.pt")
        assert heard.startswith(
            "StateError: every rank must stay to the end of the job, got no answer from rank "
            f"{world - 1} of {world} within "
        ), heard
        assert "it has ended or hangs: see what it said last, and start the job again" in heard
        assert seconds < TIMEOUT + REST


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_a_rank_that_is_killed_or_hangs_is_named(name, tmp_path):
    all_but_the_last_hear(tmp_path, getattr(signal, name), WORLD)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_all_of_several_ranks_name_the_lost_one(name, tmp_path):
    all_but_the_last_hear(tmp_path, getattr(signal, name), 4)


def is_terminated(rank, folder):
    """Both ranks are, by the first one, which is in a layer while the other may be anywhere."""
    join_group(rank, folder)
    pids = [torch.zeros(1, dtype=torch.int64) for _ in range(WORLD)]
    distributed.all_gather(pids, torch.tensor([os.getpid()]))

    def terminate():
        for pid in pids[::-1]:
            os.kill(int(pid), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            in_the_second_layer(terminate, patch)
        scored(folder)


def test_sigterm_ends_all_ranks_with_their_states_written(tmp_path):
    started = [forked.start(is_terminated, rank, tmp_path) for rank in range(WORLD)]
    for process in started:
        done = process.finish()
        assert done.returncode == 143, done.stderr
    job = tmp_path / "job"
    for rank in range(WORLD):
        assert (job / f"rank-{rank}" / "progress.json").exists()
    # Another number of ranks has other examples in each folder.
    with pytest.raises(
        ValueError, match=r"^resume must be a folder of this job, .* number of rank"
    ):
        scored(tmp_path)


def test_what_a_group_breaks_on_with_all_ranks_there_is_said_as_it_is(monkeypatch):
    monkeypatch.setattr(lost_ranks, "_lost", lambda rank, size, until: [])
    naming = lost_ranks.naming_lost_ranks(0, 2, None)
    with pytest.raises(RuntimeError, match="^other shapes$"), naming:
        raise RuntimeError("other shapes")


@pytest.mark.parametrize(
    "seconds, error, text",
    [
        (0, ValueError, "rank_timeout must be a number of seconds above 0, got 0"),
        (float("inf"), ValueError, "rank_timeout must be a number of seconds above 0, got inf"),
        ("5 min", TypeError, "rank_timeout must be a number of seconds above 0, got '5 min'"),
    ],
)
def test_a_time_limit_that_is_none_is_refused(seconds, error, text):
    with pytest.raises(error, match=f"^{text}"):
        fastdean.score(llama(), loader(), rank_timeout=seconds, progress=False)


def test_one_process_has_nobody_to_wait_for(monkeypatch):
    monkeypatch.setattr(ranks, "limit_collectives", None)
    fastdean.score(llama(), loader(), rank_timeout=5, progress=False)
