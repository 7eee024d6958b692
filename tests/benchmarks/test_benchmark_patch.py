"""The benchmark of `patch_checkpoint`: fair copies, right records, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest

from benchmarks import patch
from benchmarks.__main__ import main
from benchmarks.harness import gate, memory, store, tables
from benchmarks.harness.session import Sample

pytestmark = pytest.mark.usefixtures("quick_benchmarks")


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


@pytest.fixture
def benchmark(tmp_path, disk):
    """`patch` on a tiny checkpoint, without the tests that run before a measurement."""

    def measure(*arguments):
        places = ["--out", str(tmp_path / "results"), "--folder", str(disk)]
        return main(["patch", "--toy", "--no-gate", *places, *arguments])

    return measure


@pytest.fixture
def quickly(monkeypatch):
    """Contenders that take the seconds they are told, in place of the true ones."""

    def replace(before=lambda copy: None, **seconds):
        def copying(source, waiting):
            def copied(copy):
                before(copy)
                shutil.copytree(source, copy)
                return Sample(waiting.pop(0), peak_bytes=5)

            return copied

        def contenders(source, *rest):
            return {name: (name, copying(source, list(each))) for name, each in seconds.items()}

        monkeypatch.setattr(patch, "_contenders", contenders)

    return replace


def read(tmp_path):
    return list(store.read(tmp_path / "results", "patch"))


def test_three_ways_to_copy_are_recorded(benchmark, tmp_path, disk):
    assert benchmark("--repeats", "1") == 0
    rows = read(tmp_path)
    assert [row.contender for row in rows] == ["cp", "cp and fsync", "fastdean"]
    for row in rows:
        assert (row["shards"], row["matrices"], row["masked"]) == (4, 6, 150)
        assert row["checkpoint_bytes"] == 6 * 16 * 32 * 2
        assert row["rounds_s"] == [row["median_s"]] and row["median_s"] > 0 and row.toy
        assert str(tmp_path) not in json.dumps(vars(row))
    assert [row["peak_bytes"] for row in rows[:2]] == [None, None]
    if memory._CLEAR.exists():
        # An interpreter with torch in it, of which a call on 6 kB adds next to nothing.
        assert rows[2]["process_peak_bytes"] > 50e6 and 0 <= rows[2]["peak_bytes"] < 50e6
    assert not list(disk.iterdir())


def test_copies_take_turns_and_the_table_compares_round_by_round(
    benchmark, quickly, tmp_path, capsys
):
    seen = []
    quickly(
        lambda copy: seen.append(sorted(path.name for path in copy.parent.iterdir())),
        cp=[50.0, 2.0, 4.0, 8.0],
        fastdean=[90.0, 3.0, 4.0, 10.0],
    )
    assert benchmark("--repeats", "3") == 0
    plain, ours = read(tmp_path)
    # The first round is not counted: many disks are slow where they were never written.
    assert plain["rounds_s"] == [2.0, 4.0, 8.0] and ours["rounds_s"] == [3.0, 4.0, 10.0]
    assert (ours["peak_bytes"], ours["process_peak_bytes"]) == (5, None)
    # A copy is gone before the next one starts.
    assert len(seen) == 8 and not any("copy" in names for names in seen)
    assert "| cp | 4.00 (2.80 to 6.40) | 1.00x | not measured | 0 MB |" in capsys.readouterr().out
    text = tables.rendered(patch.TABLE, [plain, ours])
    assert "| fastdean | 4.00 (3.40 to 7.60) | 1.25x (1.10 to 1.40) |" in text


def test_nothing_is_left_behind_nor_recorded_after_an_error(
    benchmark, quickly, tmp_path, disk, capsys
):
    def half_done(copy):
        copy.mkdir()
        raise RuntimeError("no disk")

    quickly(half_done, cp=[1.0])
    assert benchmark() == 2 and "error: no disk" in capsys.readouterr().err
    assert not list(disk.iterdir()) and not (tmp_path / "results").exists()


def test_what_cannot_be_measured_costs_no_tests(tmp_path, monkeypatch, capsys):
    usage = SimpleNamespace(free=18_431)
    monkeypatch.setattr(patch.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(gate, "passes", lambda *a, **options: pytest.fail("ran the tests"))
    for arguments in ((), ("--folder", str(tmp_path / "no" / "where"))):
        assert main(["patch", "--toy", "--out", str(tmp_path / "results"), *arguments]) == 2
        text = "error: folder must have room for 3 copies of the checkpoint, 1.84e-05 GB, got"
        assert text in capsys.readouterr().err
