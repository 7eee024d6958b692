"""`patch`: a copy of a checkpoint with a mask in it, against a plain copy.

Three ways take turns: `cp`; `cp` and then fsync of every file and folder, which leaves the copy as
safe on the disk as `patch_checkpoint` does; `patch_checkpoint`, each time in a new process. Every
turn finds the source in the page cache and nothing of the turn before left to write.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.harness import store, tables
from benchmarks.harness.clock import Spread
from benchmarks.harness.command import above_zero, positive
from benchmarks.harness.gate import test_files
from benchmarks.harness.progress import say
from benchmarks.harness.session import Sample, Session, most, seconds_of, take_turns
from benchmarks.harness.store import Record
from benchmarks.harness.tables import Cells, Table
from benchmarks.patch.subject import Checkpoint, write_checkpoint
from fastdean import NeuronMask
from fastdean.files import atomic
from fastdean.masks.checkpoint import verify_checkpoint

_OURS = "fastdean"
# The source, a copy, and as much again for whoever else writes to the disk meanwhile.
_COPIES = 3
_BLOCK_BYTES = 8 << 20

# Makes a copy as the folder it is given, which does not exist.
Copying = Callable[[Path], Sample]


def add_options(parser: argparse.ArgumentParser) -> None:
    # Files are copied by the host, also where there is a GPU.
    parser.set_defaults(device="cpu")
    add = parser.add_argument
    add("--gigabytes", type=above_zero, default=2.0, help="of the checkpoint; default: 2")
    add("--shards", type=positive, default=4, help="files it is made of; default: 4")
    add("--repeats", type=positive, default=5)
    said = "where it is written and copied, and all of that removed: it chooses the disk"
    add("--folder", type=Path, default=Path(tempfile.gettempdir()), help=said)
    add("--toy", action="store_true", help="tiny matrices, to try the command out")


def tests(options: argparse.Namespace, on_gpu: bool) -> Sequence[str]:
    return test_files("checkpoint")


def require_room(options: argparse.Namespace) -> None:
    """Asked before any test runs."""
    checkpoint, folder = _checkpoint(options), options.folder
    if options.device != "cpu":
        raise ValueError(
            f"device must be cpu, got {options.device}; files are copied by the host, leave it out"
        )
    if not folder.is_dir():
        raise ValueError(
            f"folder must be a folder, got {str(folder)!r}, which is none; make it, or leave "
            "--folder out for the system's temporary one"
        )
    needed, free = _COPIES * checkpoint.nbytes, shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"folder must have room for {_COPIES} copies of the checkpoint, {needed / 1e9:.3g} GB, "
            f"got {free / 1e9:.3g} GB free in {str(folder)!r}; make room, name another with "
            "--folder, or pass fewer --gigabytes"
        )
    if shutil.which("cp") is None:
        raise RuntimeError("cp must be on the PATH, got none; it is what is compared with")


def run(session: Session) -> int:
    """Append one record per way to copy; all that is written to `--folder` is removed again."""
    options = session.options
    checkpoint = _checkpoint(options)
    setup = {
        "dtype": "bf16",
        "checkpoint_bytes": checkpoint.nbytes,
        "shards": checkpoint.shards,
        "matrices": len(checkpoint.matrices),
        "masked": checkpoint.masked,
    }
    done = session.earlier("patch", {_OURS}, setup, same_command=True)
    for each in session.due([] if done else [checkpoint], "checkpoints"):
        with tempfile.TemporaryDirectory(prefix="fastdean-patch-", dir=options.folder) as folder:
            turns = _measured(Path(folder), each, options.repeats)
            setup["file_system"] = _file_system(folder)
        rows = []
        for name, how, samples in turns:
            memory = ("process_peak_bytes", "peak_bytes")
            parts = {
                "setup": setup | {"how": how, "repeats": len(samples)},
                "seconds": seconds_of(samples),
                "metrics": {key: most([getattr(s, key) for s in samples]) for key in memory},
            }
            rows.append(session.append("patch", each.name, name, **parts))
        print(tables.rendered(TABLE, rows))
    return 0


def _checkpoint(options: argparse.Namespace) -> Checkpoint:
    return Checkpoint.sized(options.gigabytes, options.shards, toy=options.toy)


def _measured(
    scratch: Path, checkpoint: Checkpoint, repeats: int
) -> list[tuple[str, str, list[Sample]]]:
    """(name, what is run, samples) of each contender, in a folder that somebody else removes."""
    say(f"writing {checkpoint.name}")
    source, mask_folder = scratch / "source", scratch / "mask"
    mask = write_checkpoint(source, checkpoint)
    mask.save_pretrained(mask_folder)
    ways = _contenders(source, mask_folder, mask, copy_command(scratch))
    turns = {name: partial(_turn, run, source, scratch / "copy") for name, (_, run) in ways.items()}
    # The round before the first is not counted: many disks are slow where they were never written.
    taken = take_turns(turns, repeats, warm_up=1)
    return [(name, ways[name][0], samples) for name, samples, _ in taken]


def _turn(copying: Copying, source: Path, copy: Path) -> Sample:
    for path in source.iterdir():  # the next one to read it finds it in the page cache
        with open(path, "rb", buffering=0) as file:
            while file.read(_BLOCK_BYTES):
                pass
    sample = copying(copy)
    shutil.rmtree(copy)
    # Until the removal has reached the disk, the disk is busy with it.
    atomic.flush(copy.parent)
    return sample


def copy_command(scratch: Path) -> tuple[str, ...]:
    """`cp` of a folder, such that it really copies: where the file system shares blocks between
    files (btrfs, XFS), it would copy nothing at all."""
    probe = scratch / "probe"
    probe.write_text("probe")
    tried = ["cp", "--reflink=always", str(probe), str(scratch / "cloned")]
    clones = subprocess.run(tried, capture_output=True).returncode == 0
    return ("cp", "-r", "--reflink=never") if clones else ("cp", "-r")


def _contenders(
    source: Path, mask_folder: Path, mask: NeuronMask, command: Sequence[str]
) -> dict[str, tuple[str, Copying]]:
    """Name -> (what is run, for the table; the copying)."""

    def copied(copy: Path, *, flush: bool) -> Sample:
        start = time.perf_counter()
        _finished([*command, str(source), str(copy)])
        if flush:
            for path in (*copy.rglob("*"), copy, copy.parent):
                atomic.flush(path)
        return Sample(time.perf_counter() - start)

    def patched(copy: Path) -> Sample:
        once = [sys.executable, "-m", "benchmarks.patch.once"]
        sample = Sample(**json.loads(_finished([*once, str(source), str(mask_folder), str(copy)])))
        verify_checkpoint(copy, mask)
        return sample

    shown = f"`{' '.join(command)}`"
    return {
        "cp": (shown, partial(copied, flush=False)),
        "cp and fsync": (f"{shown}, then fsync", partial(copied, flush=True)),
        _OURS: ("`fastdean.patch_checkpoint`", patched),
    }


def _finished(command: Sequence[str]) -> str:
    """What the command printed; it sees the package of this checkout."""
    paths = [str(store.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    if done.returncode != 0:
        said = (done.stderr.strip() or "nothing").splitlines()[-1]
        raise RuntimeError(
            f"{Path(command[0]).name} must end well to be timed, got exit code {done.returncode} "
            f"and {said!r}; nothing was recorded"
        )
    return done.stdout


def _file_system(folder: str) -> str | None:
    """Its type, as `df` names it."""
    try:
        return _finished(["df", "--output=fstype", folder]).split()[-1]
    except (OSError, RuntimeError):
        return None


def _lines(rows: Sequence[Record]) -> tuple[Cells, list[Cells]]:
    plain = [row for row in rows if row.contender != _OURS]
    header = ["", "seconds (p20 to p80)", *(f"vs {row['how']}" for row in plain)]
    lines = []
    for row in rows:
        times = [Spread.of_ratios(row["rounds_s"], each["rounds_s"]) for each in plain]
        ratios = [
            "1.00x" if row is each else tables.ratio(time)
            for each, time in zip(plain, times, strict=True)
        ]
        memory = [tables.megabytes(row[name]) for name in ("process_peak_bytes", "peak_bytes")]
        lines.append([row["how"], tables.spread(row), *ratios, *memory])
    return [*header, "peak memory", "of it during the call"], lines


def _notes(rows: Sequence[Record]) -> list[str]:
    row = rows[0]
    on = "" if row["file_system"] is None else f", on {row['file_system']}"
    return [f"{row.case}{on}, {row['repeats']} rounds. {tables.provenance_line(row)}"]


_KEYS = ("device", "case", "file_system")
TABLE = Table("python -m benchmarks patch", _KEYS, _KEYS, _lines, _notes)
