"""`run.py patch`: a copy of a checkpoint with a mask in it, against a plain copy.

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
from dataclasses import dataclass
from pathlib import Path

import records
from patch_subject import Checkpoint, write_checkpoint
from progress import Budget, say
from records import Environment, PatchRecord
from timing import Spread

from fastdean import NeuronMask, atomic
from fastdean.checkpoint import verify_checkpoint

_OURS = "fastdean"
# The source, a copy, and as much again for whoever else writes to the disk meanwhile.
_COPIES = 3
_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class Turn:
    """One copy; bytes as in `PatchRecord`."""

    seconds: float
    process_peak_bytes: int | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Contender:
    """Attributes:
    how: what is run, for the table.
    run: makes the copy as the folder it is given, which does not exist.
    """

    name: str
    how: str
    run: Callable[[Path], Turn]


def require_room(options: argparse.Namespace) -> None:
    """Asked before any test runs.

    Raises:
        ValueError: `--folder` is no folder or has no room; more shards than matrices.
        RuntimeError: there is no `cp`.
    """
    checkpoint = _checkpoint(options)
    folder = options.folder
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


def run_patch(
    options: argparse.Namespace, environment: Environment, budget: Budget, gate: str
) -> int:
    """Append one record per way to copy; all that is written to `--folder` is removed again.

    Raises:
        RuntimeError: a copy failed or lacks the mask; nothing is recorded.
    """
    checkpoint = _checkpoint(options)
    if options.resume and _was_measured(options, environment, checkpoint, gate):
        say("nothing left to measure")
        return 0
    if budget.spent:
        say("the time is used up: call again")
        return 0
    with tempfile.TemporaryDirectory(prefix="fastdean-patch-", dir=options.folder) as scratch:
        turns = _measured(Path(scratch), checkpoint, options.repeats)
        file_system = _file_system(Path(scratch))
    rows = [
        _record(options, checkpoint, contender, samples, file_system, gate)
        for contender, samples in turns
    ]
    for row in rows:
        path = records.append(options.out, "patch", environment, row)
        say(f"  {row.impl}: appended to {path.parent.name}/{path.name}")
    print(_render(rows))
    return 0


def _checkpoint(options: argparse.Namespace) -> Checkpoint:
    return Checkpoint.sized(options.gigabytes, options.shards, toy=options.toy)


def _was_measured(
    options: argparse.Namespace, environment: Environment, checkpoint: Checkpoint, gate: str
) -> bool:
    return any(
        (row["case"], row["impl"], row["toy"]) == (checkpoint.name, _OURS, options.toy)
        and row["command"] == environment.command
        and records.stands_for(row, environment, gate)
        for row in records.read(options.out, "patch")
    )


def _measured(
    scratch: Path, checkpoint: Checkpoint, repeats: int
) -> list[tuple[Contender, list[Turn]]]:
    """Each contender with its turns, in a folder that somebody else removes."""
    say(f"writing {checkpoint.name}")
    source, mask_folder = scratch / "source", scratch / "mask"
    mask = write_checkpoint(source, checkpoint)
    mask.save_pretrained(mask_folder)
    contenders = _contenders(source, mask_folder, mask, copy_command(scratch))
    turns: dict[str, list[Turn]] = {contender.name: [] for contender in contenders}
    # The round before the first is not counted: many disks are slow where they were never written.
    for number in range(repeats + 1):
        for contender in contenders:
            turn = _turn(contender, source, scratch / "copy")
            if number:
                turns[contender.name].append(turn)
            say(f"  {number}/{repeats}  {contender.name:<12} {turn.seconds:8.2f} s")
    return [(contender, turns[contender.name]) for contender in contenders]


def _turn(contender: Contender, source: Path, copy: Path) -> Turn:
    _read(source)
    turn = contender.run(copy)
    shutil.rmtree(copy)
    # Until the removal has reached the disk, the disk is busy with it.
    atomic.flush(copy.parent)
    return turn


def _read(folder: Path) -> None:
    """Read every file, so that the next one to do so finds it in the page cache."""
    for path in folder.iterdir():
        with open(path, "rb", buffering=0) as file:
            while file.read(_BLOCK_BYTES):
                pass


def copy_command(scratch: Path) -> tuple[str, ...]:
    """`cp` of a folder, such that it really copies.

    Where the file system shares blocks between files (btrfs, XFS), `cp` would copy nothing at all.
    """
    probe = scratch / "probe"
    probe.write_text("probe")
    tried = ["cp", "--reflink=always", str(probe), str(scratch / "cloned")]
    clones = subprocess.run(tried, capture_output=True).returncode == 0
    return ("cp", "-r", "--reflink=never") if clones else ("cp", "-r")


def _contenders(
    source: Path, mask_folder: Path, mask: NeuronMask, command: Sequence[str]
) -> list[Contender]:
    def copied(copy: Path) -> Turn:
        start = time.perf_counter()
        _finished([*command, str(source), str(copy)])
        return Turn(time.perf_counter() - start)

    def copied_and_flushed(copy: Path) -> Turn:
        start = time.perf_counter()
        _finished([*command, str(source), str(copy)])
        for path in (*copy.rglob("*"), copy, copy.parent):
            atomic.flush(path)
        return Turn(time.perf_counter() - start)

    def patched(copy: Path) -> Turn:
        once = Path(__file__).with_name("patch_once.py")
        arguments = [sys.executable, str(once), str(source), str(mask_folder), str(copy)]
        turn = Turn(**json.loads(_finished(arguments)))
        verify_checkpoint(copy, mask)
        return turn

    shown = f"`{' '.join(command)}`"
    return [
        Contender("cp", shown, copied),
        Contender("cp and fsync", f"{shown}, then fsync", copied_and_flushed),
        Contender(_OURS, "`fastdean.patch_checkpoint`", patched),
    ]


def _finished(command: Sequence[str]) -> str:
    """What the command printed; it sees the package of this checkout."""
    paths = [str(records.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    if done.returncode != 0:
        said = (done.stderr.strip() or "nothing").splitlines()[-1]
        raise RuntimeError(
            f"{Path(command[0]).name} must end well to be timed, got exit code {done.returncode} "
            f"and {said!r}; nothing was recorded"
        )
    return done.stdout


def _file_system(folder: Path) -> str | None:
    """Its type, as `df` names it."""
    try:
        done = subprocess.run(
            ["df", "--output=fstype", str(folder)], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.split()[-1]


def _record(
    options: argparse.Namespace,
    checkpoint: Checkpoint,
    contender: Contender,
    turns: Sequence[Turn],
    file_system: str | None,
    gate: str,
) -> PatchRecord:
    seconds = tuple(turn.seconds for turn in turns)
    spread = Spread.of(seconds)
    return PatchRecord(
        op="patch",
        case=checkpoint.name,
        impl=contender.name,
        how=contender.how,
        dtype="bf16",
        checkpoint_bytes=checkpoint.nbytes,
        shards=checkpoint.shards,
        matrices=len(checkpoint.matrices),
        masked=checkpoint.masked,
        file_system=file_system,
        repeats=len(turns),
        seconds=seconds,
        median_s=spread.median,
        p20_s=spread.p20,
        p80_s=spread.p80,
        process_peak_bytes=_most([turn.process_peak_bytes for turn in turns]),
        peak_bytes=_most([turn.peak_bytes for turn in turns]),
        toy=options.toy,
        gate=gate,
    )


def _most(values: Sequence[int | None]) -> int | None:
    return None if None in values else max(values)


def _render(rows: Sequence[PatchRecord]) -> str:
    lines = [
        f"{'':<13} {'median':>9} {'p20':>9} {'p80':>9} "
        + " ".join(f"{'x ' + row.impl:>14}" for row in rows if row.impl != _OURS)
        + f" {'process peak':>13} {'above before':>13}"
    ]
    for row in rows:
        times = [
            Spread.of_ratios(row.seconds, other.seconds) for other in rows if other.impl != _OURS
        ]
        lines.append(
            f"{row.impl:<13} {row.median_s:7.2f} s {row.p20_s:7.2f} s {row.p80_s:7.2f} s "
            + " ".join(f"{each.median:14.2f}" for each in times)
            + f" {_megabytes(row.process_peak_bytes):>13} {_megabytes(row.peak_bytes):>13}"
        )
    return "\n".join(lines)


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.0f} MB"
