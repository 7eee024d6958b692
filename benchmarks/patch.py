"""`patch`: a copy of a checkpoint of random values with a mask in it, against a plain copy.

Three ways take turns: `cp`; `cp` and then fsync of every file and folder, which leaves the copy as
safe on the disk as `patch_checkpoint` does; `patch_checkpoint`, each time in a new process. Every
turn finds the source in the page cache and nothing of the turn before left to write.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from benchmarks import patch_once
from benchmarks.harness import command, gate, tables
from benchmarks.harness.clock import Spread
from benchmarks.harness.processes import apart, finished
from benchmarks.harness.session import Sample, Session, most, seconds_of, take_turns
from benchmarks.harness.store import Record, say
from fastdean import NeuronMask
from fastdean.files import atomic
from fastdean.masks import MaskEntry
from fastdean.masks.checkpoint import verify_checkpoint

_OURS = "fastdean"
# The source, a copy, and as much again for whoever else writes to the disk meanwhile.
_COPIES = 3
_BLOCK_BYTES = 8 << 20
_MASKED_EACH = 25
_SIZES = (2048, 8192)  # hidden and intermediate, as in models of a billion parameters
_TOY_SIZES, _TOY_LAYERS = (16, 32), 2
_SEED = 11

# Makes a copy as the folder it is given, which does not exist.
Copying = Callable[[Path], Sample]


def add_options(parser: argparse.ArgumentParser) -> None:
    # Files are copied by the host, also where there is a GPU.
    parser.set_defaults(device="cpu")
    add = parser.add_argument
    said = "size of the checkpoint"
    add("--gigabytes", type=command.above_zero, default=2.0, metavar="X", help=said)
    add("--shards", type=command.positive, default=4, metavar="N", help="files it is made of")
    said = "where it is written and copied, and all of that removed: it chooses the disk"
    command.scratch_folder(parser, said)
    command.repeats(parser, 5)
    command.toy(parser)


def tests(options: argparse.Namespace, on_gpu: bool) -> Sequence[str]:
    return gate.test_files("checkpoint")


class Checkpoint(NamedTuple):
    """The MLPs of a language model in bf16, in `shards` files, and nothing else of it; `matrices`:
    name -> shape, in the order of the layers."""

    matrices: dict[str, tuple[int, int]]
    shards: int

    @property
    def nbytes(self) -> int:
        return sum(2 * rows * columns for rows, columns in self.matrices.values())

    @property
    def name(self) -> str:
        rows, columns = next(iter(self.matrices.values()))
        return (
            f"{self.nbytes / 1e9:.3g} GB in {self.shards} shards, {len(self.matrices)} matrices of "
            f"{rows} x {columns}, {_MASKED_EACH} values masked in each"
        )

    def write(self, folder: Path) -> NeuronMask:
        """Write it as a new folder, through to the disk, and return a mask on it.

        The same values and the same mask every time. One shard at a time is held.
        """
        folder.mkdir()
        generator, places = torch.Generator().manual_seed(_SEED), random.Random(_SEED)
        weight_map: dict[str, str] = {}
        entries: dict[str, MaskEntry] = {}
        names, shards = list(self.matrices), self.shards
        for shard in range(shards):
            file_name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            tensors = {}
            for name in names[len(names) * shard // shards : len(names) * (shard + 1) // shards]:
                weight = torch.empty(self.matrices[name], dtype=torch.bfloat16)
                weight.normal_(generator=generator)
                index = torch.tensor(sorted(places.sample(range(weight.numel()), _MASKED_EACH)))
                entries[name] = MaskEntry(index, weight.flatten()[index], tuple(weight.shape))
                tensors[name], weight_map[name] = weight, file_name
            save_file(tensors, folder / file_name, metadata={"format": "pt"})
        index = {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        _flush(folder)  # what the disk has still to write would be counted in the first turn
        return NeuronMask(entries)


def checkpoint_for(options: argparse.Namespace) -> Checkpoint:
    """The fewest layers that make `--gigabytes` (1e9 bytes); `--toy`: two tiny ones."""
    hidden, intermediate = _TOY_SIZES if options.toy else _SIZES
    fewest = -int(-options.gigabytes * 1e9 // (3 * hidden * intermediate * 2))
    wide, narrow = (intermediate, hidden), (hidden, intermediate)
    matrices = {
        f"model.layers.{layer}.mlp.{projection}.weight": shape
        for layer in range(_TOY_LAYERS if options.toy else fewest)
        for projection, shape in (("gate_proj", wide), ("up_proj", wide), ("down_proj", narrow))
    }
    return Checkpoint(matrices, min(options.shards, len(matrices)))


def require(options: argparse.Namespace) -> None:
    if options.device != "cpu":
        raise ValueError(
            f"device must be cpu, got {options.device}; files are copied by the host, leave it out"
        )
    needed = _COPIES * checkpoint_for(options).nbytes
    free = shutil.disk_usage(options.folder).free
    if free < needed:
        raise ValueError(
            f"folder must have room for {_COPIES} copies of the checkpoint, {needed / 1e9:.3g} GB, "
            f"got {free / 1e9:.3g} GB free in {str(options.folder)!r}; make room, name another "
            "with --folder, or pass fewer --gigabytes"
        )


def run(session: Session) -> int:
    """Append one record per way to copy; all that is written to `--folder` is removed again."""
    options = session.options
    checkpoint = checkpoint_for(options)
    setup = {
        "dtype": "bf16",
        "checkpoint_bytes": checkpoint.nbytes,
        "shards": checkpoint.shards,
        "matrices": len(checkpoint.matrices),
        "masked": _MASKED_EACH * len(checkpoint.matrices),
    }
    done = session.earlier("patch", {_OURS}, setup, same_command=True)
    for each in session.due([] if done else [checkpoint], "checkpoints"):
        with session.scratch("patch") as scratch:
            say(f"writing {each.name}")
            mask = each.write(scratch / "source")
            mask.save_pretrained(scratch / "mask")
            ways = _contenders(scratch / "source", scratch / "mask", mask, copy_command(scratch))
            turns = {name: partial(_turn, copying, scratch) for name, (_, copying) in ways.items()}
            # The first round is not counted: many disks are slow where they were never written.
            taken = list(take_turns(turns, options.repeats, warm_up=1))
            setup["file_system"] = _file_system(scratch)
        rows, memory = [], ("process_peak_bytes", "peak_bytes")
        for name, samples, _ in taken:
            how = {"how": ways[name][0], "repeats": len(samples)}
            peaks = {key: most([getattr(s, key) for s in samples]) for key in memory}
            parts = {"setup": setup | how, "seconds": seconds_of(samples), "metrics": peaks}
            rows.append(session.append("patch", each.name, name, **parts))
        print(tables.rendered(TABLE, rows))
    return 0


def _turn(copying: Copying, scratch: Path) -> Sample:
    for path in (scratch / "source").iterdir():  # whoever reads it next finds it in the page cache
        with open(path, "rb", buffering=0) as file:
            while file.read(_BLOCK_BYTES):
                pass
    sample = copying(scratch / "copy")
    shutil.rmtree(scratch / "copy")
    # Until the removal has reached the disk, the disk is busy with it.
    atomic.flush(scratch)
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
    source: Path, mask_folder: Path, mask: NeuronMask, cp: Sequence[str]
) -> dict[str, tuple[str, Copying]]:
    """Name -> (what is run, for the table; the copying)."""

    def copied(copy: Path, *, flush: bool) -> Sample:
        start = time.perf_counter()
        finished([*cp, str(source), str(copy)])
        if flush:
            _flush(copy)
            atomic.flush(copy.parent)
        return Sample(time.perf_counter() - start)

    def patched(copy: Path) -> Sample:
        found = apart(patch_once.patched, str(source), str(mask_folder), str(copy))
        verify_checkpoint(copy, mask)
        return Sample(**found)

    shown = f"`{' '.join(cp)}`"
    return {
        "cp": (shown, partial(copied, flush=False)),
        "cp and fsync": (f"{shown}, then fsync", partial(copied, flush=True)),
        _OURS: ("`fastdean.patch_checkpoint`", patched),
    }


def _flush(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        atomic.flush(path)


def _file_system(folder: Path) -> str | None:
    """Its type, as `df` names it."""
    with suppress(OSError, RuntimeError):
        return finished(["df", "--output=fstype", str(folder)]).split()[-1]
    return None


def _columns(rows: Sequence[Record]) -> tables.Columns:
    def compared(plain: Record, row: Record) -> str:
        times = Spread.of_ratios(row["rounds_s"], plain["rounds_s"])
        return "1.00x" if row is plain else tables.ratio(times)

    plain = [row for row in rows if row.contender != _OURS]
    return {
        "": "{how}",
        "seconds (p20 to p80)": tables.SPREAD,
        **{f"vs {row['how']}": partial(compared, row) for row in plain},
        "peak memory": tables.megabytes_of("process_peak_bytes"),
        "of it during the call": tables.megabytes_of("peak_bytes"),
    }


def _notes(rows: Sequence[Record]) -> list[str]:
    row = rows[0]
    on = "" if row["file_system"] is None else f", on {row['file_system']}"
    return [f"{row.case}{on}, {row['repeats']} rounds. {tables.provenance_line(row)}"]


_KEYS = ("device", "case", "file_system")
TABLE = tables.Table("python -m benchmarks patch", _columns, _notes, _KEYS)
