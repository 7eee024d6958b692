"""Where `score(order="layers")` keeps what layers return: the same bits everywhere."""

from __future__ import annotations

import errno
import os
import re
import tempfile

import pytest
import torch
from tiny_data import batches, make_examples
from tiny_models import gpt2, llama

import fastdean
from fastdean.coupling.layers import homes
from fastdean.coupling.resuming import state_files

# 48 tokens of 32 numbers in two layers are 12,288 bytes; a record is a batch of a layer.
SOME, NONE = 8_000, 0


def score(model=None, **options):
    options = {"progress": False, "order": "layers", "tokens_per_batch": 24, **options}
    return fastdean.score(model or llama(), list(batches(make_examples(), 2)), **options)


def assert_nothing_left(folder):
    # Other libraries use the temporary folder too.
    assert not list(folder.rglob("*states*"))


def assert_same_bits(found, expected):
    assert list(found) == list(expected)
    for name in expected:
        assert torch.equal(found.entries[name].sums, expected.entries[name].sums), name


@pytest.mark.parametrize(
    ("options", "places"),
    [
        ({}, ["device"]),
        ({"states": "device"}, ["device"]),
        ({"states": "host"}, ["host"]),
        ({"states": "FOLDER"}, ["files"]),
        ({"states_budget": SOME}, ["device", "files"]),
        ({"states_budget": NONE}, ["files"]),
    ],
    ids=str,
)
def test_every_place_gives_the_same_bits(options, places, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if options.get("states") == "FOLDER":
        options = options | {"states": tmp_path / "new" / "states"}
    model = gpt2()
    found = score(model, **options)
    assert_same_bits(found, score(model, states="device"))
    used = found.manifest["order"]["states"]
    assert used.keys() == set(places) and all(used.values())
    if "states_budget" in options:
        assert used.get("device", 0) <= options["states_budget"]
    assert_nothing_left(tmp_path)


def test_without_a_budget_the_memory_there_is_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    expected = score()
    monkeypatch.setattr(homes, "available_memory", lambda device: 1000)
    found = score()
    assert_same_bits(found, expected)
    assert found.manifest["order"]["states"].keys() == {"files"}
    monkeypatch.setattr(homes, "available_memory", lambda device: None)  # nobody knows
    assert score().manifest["order"]["states"].keys() == {"device"}


def test_memory_goes_to_the_host_before_files(monkeypatch, tmp_path):
    """As on a GPU: the device first, then the host, each within its budget."""
    monkeypatch.setattr(homes, "available_memory", lambda device: 1 << 30)
    memory = [homes.InMemory("device", 100), homes.InMemory("host", 100)]
    home = homes.Spilling(memory, state_files.InFiles(tmp_path), reserve=0)
    for b in range(5):
        home.keep(("state", 0, b), {0: torch.full((10,), float(b))})
    assert home.used() == {"device": 80, "host": 80, "files": 40}
    home.drop(("state", 0, 0))
    home.keep(("state", 0, 5), {0: torch.full((10,), 5.0)})
    assert home.used()["files"] == 40
    assert [int(home.bring(("state", 0, b))[0][0]) for b in range(1, 6)] == [1, 2, 3, 4, 5]


def test_a_named_place_keeps_its_budget():
    message = r"states_budget must hold what .* states='host', about .* bytes, got 8,000; raise"
    with pytest.raises(RuntimeError, match=message):
        score(states="host", states_budget=SOME)


@pytest.mark.parametrize("budget", [1, SOME])
def test_a_budget_that_is_too_small_is_told_the_whole_need(budget):
    with pytest.raises(RuntimeError, match="about") as caught:
        score(states="host", states_budget=budget)
    need = int(re.search(r"about ([\d,]+) bytes", str(caught.value))[1].replace(",", ""))
    assert score(states="host", states_budget=need)


@pytest.mark.parametrize("states", ["FOLDER", "device"])
def test_a_place_for_states_that_are_not_kept_is_said_to_be_of_no_use(tmp_path, caplog, states):
    where = tmp_path / "states" if states == "FOLDER" else states
    score(order="batches", states=where)
    (said,) = [text for text in caplog.messages if "not used" in text]
    assert said == f"states={str(where)!r} is not used: batch by batch no states are kept"
    assert not list(tmp_path.iterdir())
    caplog.clear()
    score(order="batches")
    assert not [text for text in caplog.messages if "not used" in text]


@pytest.mark.parametrize("name", ["states", "resume"])
def test_a_folder_that_cannot_be_made_is_named_by_its_argument(name):
    text = f"{name} must be a folder that can be made and written to, got '/proc/x': .*; choose"
    with pytest.raises((RuntimeError, ValueError), match=text):
        score(**{name: "/proc/x"})


def test_bits_and_strides_come_back(tmp_path):
    whole = torch.randn(3, 4, 5)
    tensors = {
        0: whole,
        1: whole.transpose(0, 1),
        2: whole[:, 1:3],
        3: whole[0, :1].expand(6, 5),
        4: torch.tensor(2.5, dtype=torch.bfloat16),
        5: torch.zeros(0, 7),
        6: whole > 0,
        7: torch.arange(6).view(2, 3).T,
        8: torch.tensor([float("nan"), -0.0]),
    }
    files = state_files.InFiles(tmp_path)
    for home in (homes.InMemory("device"), homes.InMemory("host"), files):
        home.keep(("state", 0, 0), tensors)
        found = home.bring(("state", 0, 0))
        for number, tensor in tensors.items():
            assert found[number].stride() == tensor.clone().stride()
            assert found[number].dtype == tensor.dtype and found[number].shape == tensor.shape
            assert torch.equal(found[number].nan_to_num(7), tensor.nan_to_num(7))
    files.close()


def test_a_small_piece_of_a_large_tensor_keeps_no_more_than_itself():
    large = torch.zeros(1000, 1000)
    home = homes.InMemory("device")
    home.keep(("state", 0, 0), {0: large[:2]})
    assert home.bring(("state", 0, 0))[0].untyped_storage().nbytes() == 8000


class Disk:
    """What the system says of a disk with so many bytes free."""

    def __init__(self, free):
        self.f_bavail, self.f_blocks, self.f_bfree, self.f_frsize = free, 1 << 40, free, 1


@pytest.mark.parametrize("options", [{"states": "FOLDER"}, {"states_budget": NONE}], ids=str)
def test_a_disk_that_is_too_small_is_refused_at_the_start(options, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if "states" in options:
        options = {"states": tmp_path / "states"}
    written = []

    def write(handle, content, at, do=os.pwrite):
        written.append(do(handle, content, at))
        return written[-1]

    monkeypatch.setattr(os, "pwrite", write)
    # 48 tokens of 32 numbers, and 28 that are rehearsed, in two layers, and as gradients of two.
    need = (48 + 28) * 32 * 4 * 4
    monkeypatch.setattr(os, "statvfs", lambda place: Disk(need - 1 - sum(written)))
    message = f"states must have room on a disk for about {need:,} bytes .* got {need - 1:,} in "
    with pytest.raises(RuntimeError, match=message) as raised:
        score(**options)
    assert len(written) == 1 and "\n" not in str(raised.value)
    assert_nothing_left(tmp_path)
    written.clear()
    monkeypatch.setattr(os, "statvfs", lambda place: Disk(need - sum(written)))
    assert score(**options).manifest["order"]["states"]["files"] <= need
    assert_nothing_left(tmp_path)


def test_a_disk_that_fills_up_is_told_in_one_line(tmp_path, monkeypatch):
    def full(handle, content, at, write=os.pwrite):
        if at > 2000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, content, at)

    monkeypatch.setattr(os, "pwrite", full)
    message = (
        r"^states must have room on the disk of .*, got none left; free some, or name a folder"
    )
    with pytest.raises(OSError, match=message) as raised:
        score(states=tmp_path / "states")
    assert raised.value.errno == errno.ENOSPC
    assert_nothing_left(tmp_path)


def test_a_kill_leaves_nothing_in_a_folder_for_states(tmp_path, monkeypatch):
    seen, write = [], os.pwrite
    monkeypatch.setattr(
        os, "pwrite", lambda *args: (seen.append(os.listdir(tmp_path)), write(*args))[1]
    )
    score(states=tmp_path)
    assert seen and not any(seen)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"states_budget": -1}, ValueError, "states_budget must be at least 0 bytes, got -1"),
        ({"states_budget": 1.5}, TypeError, "states_budget must be a number of bytes, got float"),
        ({"states_budget": True}, TypeError, "states_budget must be a number of bytes, got bool"),
        (
            {"order": "batches", "states_budget": 10},
            ValueError,
            "states_budget must be left out with order='batches', which keeps none, got '10'",
        ),
    ],
)
def test_budgets_that_are_none(options, error, message):
    with pytest.raises(error, match=message):
        score(**options)
