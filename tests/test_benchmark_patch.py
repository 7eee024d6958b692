"""The benchmark of `patch_checkpoint`: fair copies, right records, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import fields
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import gate
import patch_run
import patch_subject
import records
import run
import table
from patch_run import Turn

TINY = patch_subject.Checkpoint.sized(1, 4, toy=True)


@pytest.fixture(autouse=True)
def package_of_this_checkout(monkeypatch):
    """The tests may run on an installed package; the benchmarks refuse one."""
    here = records.ROOT / "fastdean" / "__init__.py"
    monkeypatch.setattr(records.fastdean, "__file__", str(here))
    # A file that is saved between two calls must not keep the second from resuming the first.
    monkeypatch.setattr(records, "sources_checksum", lambda: "these sources")


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


@pytest.fixture
def benchmark(tmp_path, disk):
    """run.py patch on a tiny checkpoint, without the tests that run before a measurement."""

    def measure(*arguments):
        places = ["--out", str(tmp_path / "results"), "--folder", str(disk)]
        return run.main(["patch", "--toy", "--no-gate", *places, *arguments])

    return measure


def quick(name, seconds, **held):
    """A contender that copies as Python does and takes the seconds it is told."""
    waiting = list(seconds)

    def copied(source, copy):
        shutil.copytree(source, copy)
        return Turn(waiting.pop(0), **held)

    return lambda source: patch_run.Contender(name, name, lambda copy: copied(source, copy))


@pytest.fixture
def quickly(monkeypatch):
    """Contenders of known seconds in place of the true ones."""

    def replace(*makers):
        monkeypatch.setattr(
            patch_run, "_contenders", lambda source, *rest: [make(source) for make in makers]
        )

    return replace


def test_three_ways_to_copy_are_recorded(benchmark, tmp_path, disk):
    assert benchmark("--repeats", "1") == 0
    [path] = (tmp_path / "results").glob("*/patch.jsonl")
    assert path.parent.name == records.slug(records.cpu_model())
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = {f.name for kind in (records.PatchRecord, records.Environment) for f in fields(kind)}
    assert all(set(row) == names for row in rows)
    assert [row["impl"] for row in rows] == ["cp", "cp and fsync", "fastdean"]
    for row in rows:
        assert (row["shards"], row["matrices"], row["masked"]) == (4, 6, 150)
        assert row["checkpoint_bytes"] == 6 * 16 * 32 * 2
        assert row["seconds"] == [row["median_s"]] and row["repeats"] == 1
        assert row["median_s"] > 0 and row["toy"] and row["gate"] == "skipped"
        assert str(tmp_path) not in json.dumps(row)
    assert [row["peak_bytes"] for row in rows[:2]] == [None, None]
    if Path("/proc/self/clear_refs").exists():
        # An interpreter with torch in it, of which a call on 6 kB adds next to nothing.
        assert rows[2]["process_peak_bytes"] > 50e6
        assert 0 <= rows[2]["peak_bytes"] < 50e6
    assert not list(disk.iterdir())


def test_the_first_round_is_not_counted_and_the_others_are_in_order(
    benchmark, quickly, tmp_path, disk
):
    quickly(
        quick("cp", [50.0, 2.0, 4.0, 8.0]),
        quick("fastdean", [90.0, 3.0, 4.0, 10.0], process_peak_bytes=7, peak_bytes=5),
    )
    assert benchmark("--repeats", "3") == 0
    plain, ours = records.read(tmp_path / "results", "patch")
    assert plain["seconds"] == [2.0, 4.0, 8.0] and plain["median_s"] == 4.0
    assert ours["seconds"] == [3.0, 4.0, 10.0]
    assert (ours["process_peak_bytes"], ours["peak_bytes"]) == (7, 5)


def test_a_copy_is_gone_before_the_next_one_starts(benchmark, monkeypatch, disk):
    found = []

    def contenders(source, *rest):
        def copied(copy):
            found.append(sorted(path.name for path in copy.parent.iterdir()))
            shutil.copytree(source, copy)
            return Turn(1.0)

        return [patch_run.Contender(name, name, copied) for name in ("cp", "fastdean")]

    monkeypatch.setattr(patch_run, "_contenders", contenders)
    assert benchmark("--repeats", "1") == 0
    assert len(found) == 4 and not any("copy" in names for names in found)


@pytest.mark.parametrize("error, code", [(RuntimeError("no disk"), 2), (KeyboardInterrupt, None)])
def test_nothing_is_left_behind_nor_recorded_after_an_error(
    benchmark, monkeypatch, tmp_path, disk, capsys, error, code
):
    def contenders(source, *rest):
        def half_done(copy):
            copy.mkdir()
            (copy / "half.safetensors").write_text("half")
            raise error

        return [patch_run.Contender("cp", "cp", half_done)]

    monkeypatch.setattr(patch_run, "_contenders", contenders)
    if code is None:
        with pytest.raises(KeyboardInterrupt):
            benchmark()
    else:
        assert benchmark() == code
        assert "error: no disk" in capsys.readouterr().err
    assert not list(disk.iterdir())
    assert not (tmp_path / "results").exists()


def test_a_process_that_fails_is_named_with_what_it_said(
    benchmark, monkeypatch, tmp_path, disk, capsys
):
    def damaged(folder, checkpoint):
        mask = patch_subject.write_checkpoint(folder, checkpoint)
        (folder / "model.safetensors.index.json").write_text("{}")
        return mask

    monkeypatch.setattr(patch_run, "write_checkpoint", damaged)
    assert benchmark() == 2
    error = capsys.readouterr().err
    assert "must end well to be timed, got exit code 1 and" in error
    assert "must hold the field weight_map" in error
    assert not list(disk.iterdir()) and not (tmp_path / "results").exists()


def test_too_little_room_is_refused_before_anything_is_written(
    benchmark, monkeypatch, disk, capsys
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(patch_run.shutil, "disk_usage", lambda path: usage(9e9, 0, 18_431))
    monkeypatch.setattr(patch_run, "write_checkpoint", lambda *a: pytest.fail("wrote without room"))
    assert benchmark() == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line == (
        "error: folder must have room for 3 copies of the checkpoint, 1.84e-05 GB, got 1.84e-05 GB "
        f"free in {str(disk)!r}; make room, name another with --folder, or pass fewer --gigabytes"
    )


@pytest.mark.parametrize(
    "arguments, text",
    [
        (("--folder", "nowhere"), "folder must be a folder, got 'nowhere', which is none; make it"),
        (("--shards", "7"), "shards must be at most 6, the matrices of the checkpoint, got 7; pa"),
    ],
)
def test_what_cannot_be_measured_costs_no_tests(tmp_path, monkeypatch, capsys, arguments, text):
    monkeypatch.setattr(gate, "passes", lambda *a, **options: pytest.fail("ran the tests"))
    assert run.main(["patch", "--toy", "--out", str(tmp_path / "results"), *arguments]) == 2
    assert f"error: {text}" in capsys.readouterr().err


def test_without_cp_there_is_nothing_to_compare_with(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(patch_run.shutil, "which", lambda name: None)
    assert benchmark() == 2
    assert "error: cp must be on the PATH, got none; it is what is" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf"])
def test_a_size_that_is_none_is_refused(capsys, text):
    with pytest.raises(SystemExit):
        run.main(["patch", f"--gigabytes={text}"])
    assert f"argument --gigabytes: must be above 0, got {text}" in capsys.readouterr().err


def test_toy_records_stay_out_of_the_results(capsys):
    with pytest.raises(SystemExit):
        run.main(["patch", "--toy"])
    assert "--toy needs --out" in capsys.readouterr().err


def test_the_tests_of_patching_run_first(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(gate, "passes", lambda tests, on_gpu: bool(seen.append((tests, on_gpu))))
    assert run.main(["patch", "--toy", "--out", str(tmp_path)]) == 1
    assert seen == [(("tests/test_checkpoint.py",), False)]
    assert (records.ROOT / "tests" / "test_checkpoint.py").is_file()
    assert "nothing was measured" in capsys.readouterr().err


def test_a_run_is_resumed_only_where_nothing_changed(benchmark, quickly, tmp_path, monkeypatch):
    def measured(*arguments):
        quickly(quick("cp", [1.0, 1.0]), quick("fastdean", [1.0, 1.0]))
        assert benchmark("--repeats", "1", "--resume", *arguments) == 0
        return len(list(records.read(tmp_path / "results", "patch")))

    assert [measured(), measured(), measured("--shards", "2")] == [2, 2, 4]
    monkeypatch.setattr(records, "sources_checksum", lambda: "other sources")
    assert measured() == 6


def test_a_run_without_time_measures_nothing(benchmark, tmp_path, capsys):
    assert benchmark("--seconds", "0") == 0
    assert "the time is used up: call again" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("clones", [True, False])
def test_a_file_system_that_clones_is_made_to_copy(tmp_path, monkeypatch, clones):
    class Done:
        returncode = 0 if clones else 1

    asked = []
    monkeypatch.setattr(patch_run.subprocess, "run", lambda c, **options: asked.append(c) or Done())
    expected = ("cp", "-r", "--reflink=never") if clones else ("cp", "-r")
    assert patch_run.copy_command(tmp_path) == expected
    assert asked[0][:2] == ["cp", "--reflink=always"]


def test_the_command_for_copies_runs_here(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a").write_text("a")
    command = patch_run.copy_command(tmp_path)
    subprocess.run([*command, tmp_path / "source", tmp_path / "copy"], check=True)
    assert (tmp_path / "copy" / "a").read_text() == "a"


def test_the_safe_copy_reaches_the_disk_and_the_plain_one_need_not(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a").write_text("a")
    synced = []
    right = os.fsync

    def fsync(handle):
        synced.append(os.fstat(handle).st_ino)
        right(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    plain, safe, _ = patch_run._contenders(source, tmp_path / "mask", None, ("cp", "-r"))
    plain.run(tmp_path / "plain")
    assert not synced
    safe.run(tmp_path / "safe")
    expected = [tmp_path / "safe" / "a", tmp_path / "safe", tmp_path]
    assert synced == [path.stat().st_ino for path in expected]


def test_the_checkpoint_is_one_that_is_loaded_shard_by_shard(tmp_path):
    from safetensors.torch import load_file

    mask = patch_subject.write_checkpoint(tmp_path / "source", TINY)
    index = json.loads((tmp_path / "source" / "model.safetensors.index.json").read_text())
    tensors = {}
    for number in range(1, 5):
        name = f"model-{number:05d}-of-00004.safetensors"
        shard = load_file(tmp_path / "source" / name)
        assert {index["weight_map"][tensor] for tensor in shard} == {name}
        tensors |= shard
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == TINY.matrices
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(tensor.float().std() > 0.5 for tensor in tensors.values())
    assert sum(tensor.nbytes for tensor in tensors.values()) == TINY.nbytes
    assert {len(entry) for entry in mask.entries.values()} == {25}
    assert len(mask) == TINY.masked and mask.names == list(TINY.matrices)


@pytest.mark.parametrize("gigabytes, layers", [(2.0, 20), (0.05, 1), (0.1007, 2)])
def test_a_checkpoint_is_as_large_as_it_is_asked_to_be(gigabytes, layers):
    checkpoint = patch_subject.Checkpoint.sized(gigabytes, 3, toy=False)
    layer_bytes = 3 * 2048 * 8192 * 2
    assert checkpoint.layers == layers and checkpoint.nbytes == layers * layer_bytes
    assert checkpoint.nbytes - layer_bytes < gigabytes * 1e9 <= checkpoint.nbytes


def result(impl, how, seconds, date="2026-01-02T00:00:00+00:00", **changes):
    row = {
        "op": "patch", "case": "2 GB in 4 shards", "impl": impl, "how": how,
        "file_system": "ext4", "repeats": 3, "seconds": seconds, "median_s": sorted(seconds)[1],
        "p20_s": min(seconds), "p80_s": max(seconds), "process_peak_bytes": None,
        "peak_bytes": None, "toy": False, "gate": "passed", "device": "Some CPU", "driver": None,
        "cuda": None, "threads": 2, "cpu_capability": "AVX2", "torch": "2.13.0",
        "transformers": "5.23.0", "fastdean": "0.1.0", "commit": "0123456789abcdef",
        "dirty": False, "date": date, "command": "python benchmarks/run.py patch",
    }  # fmt: skip
    return {**row, **changes}


def test_the_table_compares_round_by_round():
    ours = {"process_peak_bytes": 250_000_000, "peak_bytes": 3_000_000}
    rows = [
        result("fastdean", "`ours`", [99.0] * 3, "2026-01-01T00:00:00+00:00"),
        result("cp", "`cp -r`", [1.0, 2.0, 4.0]),
        result("cp and fsync", "`cp -r`, then fsync", [2.0, 4.0, 8.0]),
        # Of the medians 1.5 and 0.75: what is compared are rounds.
        result("fastdean", "`ours`", [3.0, 2.0, 8.0], **ours),
    ]
    lines = table.patch_table(rows).splitlines()
    assert lines[:5] == [
        "| | seconds (p20 to p80) | vs `cp -r` | vs `cp -r`, then fsync | peak memory "
        "| of it during the call |",
        "|---|---|---|---|---|---|",
        "| `cp -r` | 2.00 (1.00 to 4.00) | 1.00x | 0.50x (0.50 to 0.50) | not measured "
        "| not measured |",
        "| `cp -r`, then fsync | 4.00 (2.00 to 8.00) | 2.00x (2.00 to 2.00) | 1.00x "
        "| not measured | not measured |",
        "| `ours` | 3.00 (2.00 to 8.00) | 2.00x (1.40 to 2.60) | 1.00x (0.70 to 1.30) | 250 MB "
        "| 3 MB |",
    ]
    assert lines[6].startswith("2 GB in 4 shards, on ext4, 3 rounds. Some CPU, 2 threads, AVX2;")


def test_the_table_has_its_place_in_the_document():
    text = (records.ROOT / "docs" / "performance.md").read_text("utf-8")
    assert "| a table |" in table.replace_between_markers(text, "patch", "| a table |")
