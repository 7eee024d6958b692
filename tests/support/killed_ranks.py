"""Jobs of several ranks one of which is killed; run as `killed_ranks.py FOLDER SEED ROUNDS`.

In a round a job begins, one of its ranks is killed at some moment, the others end, and it is called
again, and killed again perhaps, until it ends. Moments are numbers of events: a collective that
begins or has begun, the middle of a layer, a write of states (in the middle of it), a file that is
put in its place (before or after), a batch that is through. What a round found is printed, one line
in JSON:

    kind, ranks    what was scored, by how many ranks
    kills          of each: the rank, the event, what the others' exit codes were and what they said
    hung           whether somebody had to be ended from outside
    same           whether all ranks got the bits of a job that was left alone
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from killed import Model, child, die, next_token_losses
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import fastdean
from fastdean.coupling.resuming.resumable import Resumable
from fastdean.models.ranks import lost_ranks

# Seconds that a rank waits for another one, and that a job may take besides.
RANK_TIMEOUT, REST = 6.0, 60.0
MOST_KILLS = 2
COLLECTIVES = ("all_reduce", "all_gather", "all_to_all_single")


def sharded(model: Model, ranks: int) -> Model:
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


def split(model: Model, ranks: int) -> Model:
    """Over two ranks; of four, two pairs hold it."""
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("dp", "tp"))["tp"]
    for layer in model.layers:
        parallelize_module(layer, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def whole(model: Model, ranks: int) -> Model:
    return model


# How the model lies on the ranks, the order, and whether the job is to go on.
KINDS: dict[str, tuple[Callable[[Model, int], Model], str, bool]] = {
    "examples": (whole, "layers", True),
    "batches": (whole, "batches", False),
    "sharded": (sharded, "layers", True),
    "split": (split, "layers", True),
}


def job(kind: str, ranks: int, folder: Path) -> dict[str, torch.Tensor]:
    make, order, resumes = KINDS[kind]
    torch.manual_seed(0)
    model = Model()
    loader = [{"input_ids": torch.randint(0, 32, (2, 3 + n % 5))} for n in range(20)]
    scores = fastdean.score(
        make(model, ranks),
        loader,
        target_modules=r".*layers.*",
        loss_fn=next_token_losses,
        keep_top=0.1,
        order=order,
        deterministic=True,
        resume=folder / "job" if resumes else None,
        rank_timeout=RANK_TIMEOUT,
        progress=False,
    )
    return {
        f"{name} {part}": getattr(entry, part)
        for name, entry in scores.entries.items()
        for part in ("index", "sums", "weight")
    }


class Events:
    """Counts what this process does, and ends it at one of these."""

    def __init__(self, last: int | None) -> None:
        self.count, self._last = 0, last

    def happens(self, undone: Callable[[], object] = lambda: None) -> None:
        self.count += 1
        if self.count == self._last:
            undone()
            die()

    def watch(self) -> None:
        for name in COLLECTIVES:
            setattr(distributed, name, self._around(getattr(distributed, name)))
        os.replace = self._around(os.replace)
        torch.Tensor.relu = self._around(torch.Tensor.relu)
        write, batch_done = os.pwrite, Resumable.batch_done

        def writing(handle: int, content: bytes, at: int) -> int:
            self.happens(lambda: write(handle, content[: len(content) // 2], at))
            return write(handle, content, at)

        def done(job: Resumable, step: int, batches: int) -> None:
            batch_done(job, step, batches)
            self.happens()

        os.pwrite, Resumable.batch_done = writing, done

    def _around(self, function: Callable) -> Callable:
        def called(*arguments: object, **options: object) -> object:
            self.happens()
            result = function(*arguments, **options)
            self.happens()
            return result

        return called


def rank_of_a_job(
    kind: str, rank: int, ranks: int, folder: Path, address: str, last: int | None
) -> None:
    with open(folder / f"said-{rank}", "w") as said:
        os.dup2(said.fileno(), 2)
    lost_ranks._SOON, lost_ranks._LOOK = 1.0, 0.1
    distributed.init_process_group(
        "gloo",
        init_method=address,
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=4 * REST),
    )
    events = Events(last)
    events.watch()
    torch.save(job(kind, ranks, folder), folder / f"result-{rank}.pt")
    (folder / f"events-{rank}").write_text(str(events.count))


def started(
    kind: str, ranks: int, folder: Path, hosted: bool, victim: int = -1, last: int = 0
) -> list[int | None]:
    """Start all ranks; their exit codes, None of those that did not end by themselves.

    Args:
        hosted: whether the group's store lies in its rank 0, which takes it along.
    """
    (folder / "rendezvous").unlink(missing_ok=True)
    address = f"tcp://127.0.0.1:{free_port()}" if hosted else f"file://{folder}/rendezvous"
    left = {}
    for rank in range(ranks):
        arguments = (kind, rank, ranks, folder, address, last if rank == victim else None)
        left[child(lambda given=arguments: rank_of_a_job(*given))] = rank
    codes: list[int | None] = [None] * ranks
    deadline = time.monotonic() + RANK_TIMEOUT + REST
    while left and time.monotonic() < deadline:
        for number in list(left):
            ended, status = os.waitpid(number, os.WNOHANG)
            if ended:
                codes[left.pop(number)] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for number in left:
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
    return codes


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def results(folder: Path, ranks: int) -> list[dict[str, torch.Tensor]]:
    return [torch.load(folder / f"result-{rank}.pt") for rank in range(ranks)]


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in found
    )


def a_round(kind: str, ranks: int, folder: Path, draw: random.Random, events: list[int]) -> dict:
    """One job from its beginning to its end."""
    kills, hung, hosted = [], False, draw.random() < 0.5
    to_kill = draw.randint(1, MOST_KILLS)
    while True:
        victim = draw.randrange(ranks)
        last = draw.randint(1, events[victim])
        if len(kills) == to_kill:
            victim = -1
        codes = started(kind, ranks, folder, hosted, victim, last)
        hung |= None in codes
        if victim < 0 or codes[victim] != -signal.SIGKILL:
            # One that goes on may have less to do than the event.
            break
        others = [rank for rank in range(ranks) if rank != victim]
        kills.append(
            {
                **{"rank": victim, "event": last, "of": events[victim], "hosted": hosted},
                "codes": [codes[rank] for rank in others],
                "said": [(folder / f"said-{rank}").read_text() for rank in others],
            }
        )
    ended = {"kind": kind, "ranks": ranks, "kills": kills, "hung": hung, "codes": codes}
    if codes != [0] * ranks:
        said = [(folder / f"said-{rank}").read_text() for rank in range(ranks)]
        return {**ended, "same": False, "said": said}
    expected = torch.load(folder.parent / f"{kind}-{ranks}.pt")
    alike = all(same(found, expected) for found in results(folder, ranks))
    return {**ended, "same": alike, "left": (folder / "job").exists()}


def main(folder: Path, seed: int, rounds: int) -> None:
    # No pool of threads, which a child would not have.
    torch.set_num_threads(1)
    draw = random.Random(seed)
    events: dict[tuple[str, int], list[int]] = {}
    for number in range(rounds):
        kind, ranks = list(KINDS)[number % len(KINDS)], (2, 4)[number // len(KINDS) % 2]
        place = folder / f"round-{number}"
        place.mkdir()
        if (kind, ranks) not in events:
            codes = started(kind, ranks, place, False)
            if codes != [0] * ranks:
                said = [(place / f"said-{rank}").read_text() for rank in range(ranks)]
                raise AssertionError(f"{kind} on {ranks} ranks, left alone: {codes} {said}")
            events[kind, ranks] = [int((place / f"events-{r}").read_text()) for r in range(ranks)]
            torch.save(results(place, ranks)[0], folder / f"{kind}-{ranks}.pt")
        print(json.dumps(a_round(kind, ranks, place, draw, events[kind, ranks])), flush=True)
        shutil.rmtree(place)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
