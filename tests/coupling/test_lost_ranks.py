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
from tiny_split import by_torch
from torch import distributed
from two_ranks import WORLD, join_group, leave_group, run_ranks

import fastdean
from fastdean.coupling.layers import states
from fastdean.models.ranks import distributed as ranks
from fastdean.models.ranks import lost_ranks

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


def run_until_the_others_end(worker, world, *arguments):
    """Start every rank; all but the last must end well, and the last one goes with them."""
    started = [forked.start(worker, rank, *arguments) for rank in range(world)]
    try:
        for process in started[:-1]:
            done = process.finish()
            assert done.returncode == 0, done.stderr
    finally:
        for process in started:
            process.kill()
        started[-1].finish()


def all_but_the_last_hear(folder, number, world):
    run_until_the_others_end(loses_the_last, world, folder, number, world)
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
    # Another number of ranks takes over what is finished, and here nothing is.
    gone_on, anew = scored(tmp_path), scored(tmp_path / "anew")
    for name, entry in anew.entries.items():
        torch.testing.assert_close(gone_on.entries[name].sums, entry.sums, rtol=0, atol=0)


def breaks_with_all_there(rank, folder):
    """A job whose collective breaks, and after it one in which rank 1 keeps rank 0 waiting."""
    join_group(rank, folder)
    lost_ranks._LOOK = 0.01
    group = ranks.Ranks.of_group()
    with pytest.raises(RuntimeError) as error, group.failing_together(), group.together():
        raise RuntimeError("other shapes")
    looked, ask = folder / "looked", lost_ranks._within

    def asking(seconds, question):
        found = ask(seconds, question)
        looked.touch()
        return found

    with pytest.MonkeyPatch.context() as patch, group.failing_together():
        group.agree(True)
        if rank == 0:
            patch.setattr(lost_ranks, "_within", asking)
        while rank == 1 and not looked.exists():
            pass
    leave_group(rank, folder, str(error.value))


def test_what_breaks_with_all_ranks_there_is_said_as_it_is_and_ends_one_job_alone(tmp_path):
    assert run_ranks(breaks_with_all_there, tmp_path) == ["other shapes"] * WORLD


# What ends the last rank, and what the others hear of it.
ENDS = {
    "fails": (OSError("no such tensor"), "1 of {world} that failed: rank {last} (OSError: no su"),
    "has no memory": (
        torch.OutOfMemoryError("tried to allocate 2 GiB"),
        "1 of {world} that failed: rank {last} (OutOfMemoryError: tried to allocate 2 GiB)",
    ),
    "is confused": (
        RuntimeError("sizes must match"),
        "1 of {world} that failed: rank {last} (RuntimeError: sizes must match)",
    ),
    "is interrupted": (KeyboardInterrupt(), "that failed: rank {last} (KeyboardInterrupt: )"),
    "is killed": (None, "to the end of the job, got no answer from rank {last} of {world}"),
}


def ends_in_a_layer(rank, folder, how, world, width, options):
    """The last rank ends between two collectives of a layer that tensor parallel splits."""
    from torch.distributed.device_mesh import init_device_mesh

    join_group(rank, folder, world)
    lost_ranks._SOON, lost_ranks._LOOK = 1.0, 0.1
    mesh = init_device_mesh("cpu", (world // width, width), mesh_dim_names=("dp", "tp"))["tp"]
    model, calls = by_torch(llama(), mesh, ["mlp"]), []
    error, _ = ENDS[how]

    def end(*given):
        calls.append(1)
        # Behind the trial and the first batch.
        if len(calls) == 4:
            if error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise error

    if rank == world - 1:
        model.model.layers[1].mlp.act_fn.register_forward_hook(end)
    began = time.monotonic()
    heard = "nothing"
    try:
        fastdean.score(
            model, loader(), keep_top=0.1, progress=False, tokens_per_batch=12, **options
        )
    except BaseException as caught:
        heard = f"{type(caught).__name__}: {caught}"
    torch.save((heard, time.monotonic() - began), folder / f"rank{rank}.pt")
    # It stays, with its connections, as a session does in which somebody looks what happened.
    until = time.monotonic() + TIMEOUT + REST
    while rank == world - 1 and time.monotonic() < until:
        if all((folder / f"rank{other}.pt").exists() for other in range(world)):
            break


def all_hear_of_the_end(folder, how, world=WORLD, width=WORLD, **options):
    options = {"rank_timeout": TIMEOUT, **options}
    run_until_the_others_end(ends_in_a_layer, world, folder, how, world, width, options)
    error, text = ENDS[how]
    for rank in range(world - 1):
        heard, seconds = torch.load(folder / f"rank{rank}.pt")
        assert heard.startswith("StateError: "), heard
        assert text.format(world=world, last=world - 1) in heard
        assert seconds < TIMEOUT + REST
    if error is not None:
        heard, _ = torch.load(folder / f"rank{world - 1}.pt")
        assert heard == f"{type(error).__name__}: {error}"


def test_a_rank_that_fails_inside_of_a_layer_is_named(tmp_path):
    all_hear_of_the_end(tmp_path, "has no memory", rank_timeout=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["batches", "layers"])
@pytest.mark.parametrize("world, width", [(2, 2), (4, 4), (4, 2)])
@pytest.mark.parametrize("how", ENDS)
def test_however_a_rank_ends_inside_of_a_layer_it_is_named(how, world, width, order, tmp_path):
    all_hear_of_the_end(tmp_path, how, world, width, order=order)


def gathers_alone(rank, folder):
    """FSDP gathers a layer's weights, for which one rank has no memory."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    join_group(rank, folder)
    lost_ranks._SOON, lost_ranks._LOOK = 1.0, 0.1
    model = llama()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    # While the trial runs the model ends before it.
    unshard, second = FSDPModule.unshard, model.model.layers[1]

    def broken(unit, *arguments, **options):
        if unit is second:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return unshard(unit, *arguments, **options)

    heard = "nothing"
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(FSDPModule, "unshard", broken)
        try:
            fastdean.score(model, loader(), keep_top=0.1, progress=False, rank_timeout=1.0)
        except RuntimeError as caught:
            heard = f"{type(caught).__name__}: {caught}"
    torch.save(heard, folder / f"rank{rank}.pt")


def test_a_rank_that_cannot_gather_a_layer_is_named(tmp_path):
    first, second = run_ranks(gathers_alone, tmp_path)
    assert second == "OutOfMemoryError: tried to allocate 2 GiB"
    assert "got 1 of 2 that failed: rank 1 (OutOfMemoryError: tried to allocate 2 GiB)" in first


@pytest.mark.parametrize(
    "seconds, error, text",
    [
        (0, ValueError, "rank_timeout must be a number of seconds above 0, got 0"),
        (float("inf"), ValueError, "rank_timeout must be a number of seconds above 0, got inf"),
        (1e300, ValueError, "rank_timeout must be a number of seconds from 0.001 to 1,000,000,000"),
        (1e-9, ValueError, "rank_timeout must be a number of seconds from 0.001 to"),
        ("5 min", TypeError, "rank_timeout must be a number of seconds above 0, got '5 min'"),
    ],
)
def test_a_time_limit_that_is_none_is_refused(seconds, error, text):
    with pytest.raises(error, match=f"^{text}"):
        fastdean.score(llama(), loader(), rank_timeout=seconds, progress=False)


def test_one_process_has_nobody_to_wait_for(monkeypatch):
    monkeypatch.setattr(ranks, "limit_collectives", None)
    fastdean.score(llama(), loader(), rank_timeout=5, progress=False)
