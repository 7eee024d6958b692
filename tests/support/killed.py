"""A job of scoring in a process that is killed; run as `killed.py FOLDER POINT...`.

At each POINT a job begins, is killed there, and is called again until it ends; "same" is printed if
its bits are those of a job that was left alone. A point is "write:5" (in the middle of the fifth
write of states), "replace-before:4" or "replace-after:4" (around the fourth time that a file is put
in its place), or "random" (again and again, after a random while).
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from fastdean.coupling.scoring import score_sets


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Model(nn.Module):
    """Three layers, and no library that takes seconds to import."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(16, 32)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def next_token_losses(logits, batch):
    targets = batch["input_ids"][:, 1:]
    return nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), targets, reduction="none"
    ).mean(1)


def job(**options):
    torch.manual_seed(0)
    model = Model()
    sets = {
        name: [{"input_ids": torch.randint(0, 32, (2, width))} for width in widths]
        for name, widths in (("fair", (3, 9)), ("general", (6, 4)))
    }
    found = score_sets(
        model,
        sets,
        target_modules=r".*layers.*",
        loss_fn=next_token_losses,
        order="layers",
        progress=False,
        **options,
    )
    return {
        f"{name} {parameter}": entry.sums
        for name, scores in found.items()
        for parameter, entry in scores.entries.items()
    }


def child(action) -> int:
    """Run something in a process of its own; its number."""
    number = os.fork()
    if number == 0:
        try:
            action()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return number


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: str) -> None:
    """Have this process killed at a point."""
    where, _, nth = point.partition(":")
    left = int(nth)
    write, replace = os.pwrite, os.replace

    def writing(handle, content, at):
        nonlocal left
        left -= 1
        if left == 0:
            write(handle, content[: len(content) // 2], at)
            die()
        return write(handle, content, at)

    def replacing(*args, **options):
        nonlocal left
        left -= 1
        if left == 0 and where == "replace-before":
            die()
        replace(*args, **options)
        if left == 0:
            die()

    if where == "write":
        os.pwrite = writing
    else:
        os.replace = replacing


def run(folder: Path, point: str | None) -> None:
    if point not in (None, "random"):
        arm(point)
    torch.save(job(resume=folder / "job"), folder / "result.pt")


def main(folder: Path, points: list[str]) -> None:
    # No pool of threads, which a child would not have.
    torch.set_num_threads(1)
    expected = job()
    durations = []
    for _ in range(3):
        started = time.monotonic()
        job(resume=folder / "job")
        durations.append(time.monotonic() - started)
    for point in points:
        kills = 0
        while True:
            # Once it was killed at its point, it may end.
            armed = point if not kills or point == "random" else None
            number = child(lambda armed=armed: run(folder, armed))
            if point == "random" and kills < 6:
                time.sleep(random.uniform(0, min(durations)))
                os.kill(number, signal.SIGKILL)
            status = os.waitpid(number, 0)[1]
            if os.WIFSIGNALED(status):
                kills += 1
                continue
            assert status == 0, "it failed, rather than being killed"
            if kills:
                break
            assert point == "random", f"{point} was not reached"
        found = torch.load(folder / "result.pt")
        same = found.keys() == expected.keys() and all(
            torch.equal(found[name], expected[name]) for name in expected
        )
        print("same" if same else f"other after {kills} kills", flush=True)
        (folder / "result.pt").unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
