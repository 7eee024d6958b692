"""New folders: whole or not at all, whoever else writes there and whenever the process dies."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import stat
import textwrap

import forked
import pytest
import torch

from fastdean.files import folders, storage


def _write(path, number=0, **options):
    return storage.write_folder(path, {"n": number}, {"t": torch.ones(3)}, kind="mask", **options)


def _number(path):
    return storage.read_folder(path, kind="mask")[0]["n"]


def _names(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture(params=[True, False], ids=["exchange", "two_steps"])
def exchange(request, monkeypatch):
    """Both ways of replacing a folder: in one step, and where the file system has none."""
    if not request.param:
        monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    return request.param


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_that_write_one_new_folder_the_first_wins(tmp_path, overwrite, exchange):
    path = tmp_path / "m"
    with pytest.raises(ValueError, match="path must be") as caught, folders.new_folder(path) as one:
        (one / "own.txt").write_text("one")
        with folders.new_folder(path, overwrite=overwrite) as other:
            (other / "own.txt").write_text("other")
    assert "which has files in it" in str(caught.value)
    assert (path / "own.txt").read_text() == "other"
    assert _names(tmp_path) == ["m"]


def test_what_came_to_stand_there_meanwhile_is_not_deleted(tmp_path, exchange):
    path = _write(tmp_path / "m")
    mine = path / "notes.txt"
    with (
        pytest.raises(ValueError, match="holds nothing else, for overwrite=True"),
        folders.new_folder(
            path, overwrite=True, may_replace=lambda f: storage.holds_only(f, "mask")
        ) as folder,
    ):
        (folder / "x").write_text("new")
        mine.write_text("mine")
    assert mine.read_text() == "mine" and _number(path) == 0
    assert _names(tmp_path) == ["m"]


def test_a_file_that_is_named_like_ours_is_not_ours(tmp_path):
    path = _write(tmp_path / "m")
    (path / "mask-my-notes-of-today.safetensors").write_text("mine")
    with pytest.raises(ValueError, match="holds nothing else"):
        _write(path, overwrite=True)
    assert (path / "mask-my-notes-of-today.safetensors").read_text() == "mine"


def _killed(code, path):
    """Run `code` in a process of its own that kills itself; `path` is its argument."""
    setup = """
        import os, signal, sys
        import torch
        from fastdean.files import folders, storage
        path = sys.argv[1]
        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)
        def write(**options):
            storage.write_folder(path, {"n": 1}, {"t": torch.ones(3)}, kind="mask", **options)
    """
    script = textwrap.dedent(setup) + textwrap.dedent(code)
    done = forked.run_script(script, str(path))
    assert done.returncode == -signal.SIGKILL, done.stderr


KILLED_BETWEEN_THE_STEPS = """
    folders._exchange = lambda one, other: False
    rename, count = os.rename, []
    def renamed(one, other):
        if count and count[-1] == "away":
            die()
        rename(one, other)
        count.append("away" if str(other).endswith(".before") else "")
    os.rename = renamed
    write(overwrite=True)
"""
KILLED_AFTER_THE_STEPS = """
    folders._exchange = lambda one, other: False
    rename = os.rename
    def renamed(one, other):
        rename(one, other)
        if str(other) == path and str(one).endswith(".tmp"):
            die()
    os.rename = renamed
    write(overwrite=True)
"""
KILLED_WHILE_WRITING = """
    storage._verify_shard = die
    write(overwrite=True)
"""


@pytest.mark.parametrize("reader", [_number, lambda path: _number(_write(path, 0, overwrite=True))])
def test_a_kill_between_the_two_steps_loses_nothing(tmp_path, reader):
    path = _write(tmp_path / "m")
    _killed(KILLED_BETWEEN_THE_STEPS, path)
    assert not path.exists()
    assert reader(path) == 0
    assert _names(tmp_path) == ["m"] or reader is _number


def test_a_kill_after_the_two_steps_leaves_nothing_in_the_way(tmp_path, exchange):
    path = _write(tmp_path / "m")
    _killed(KILLED_AFTER_THE_STEPS, path)
    assert _number(path) == 1
    _write(path, 2, overwrite=True)
    assert _number(path) == 2 and _names(tmp_path) == ["m"]


def test_an_old_folder_that_somebody_put_a_file_into_is_not_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    path = _write(tmp_path / "m")
    mine = _write(tmp_path / ".m.before") / "notes.txt"
    mine.write_text("mine")
    with pytest.raises(ValueError, match=r"must have no earlier folder .*m\.before.*move it away"):
        _write(path, 1, overwrite=True)
    assert mine.read_text() == "mine" and _number(path) == 0


def test_a_file_that_comes_at_the_last_moment_is_kept(tmp_path, monkeypatch, exchange):
    path = _write(tmp_path / "m")
    mine = path / "notes.txt"

    def late(step, argument):
        def taken(*places):
            if places[argument] == path and not mine.exists():
                mine.write_text("mine")
            done = step(*places)
            # Another call for the same path, which takes litter away.
            folders.sweep(path)
            return done

        return taken

    if exchange:
        monkeypatch.setattr(folders, "_exchange", late(folders._exchange, 1))
    else:
        monkeypatch.setattr(os, "rename", late(os.rename, 0))
    with pytest.raises(ValueError, match="holds nothing else, for overwrite=True"):
        _write(path, 1, overwrite=True)
    assert mine.read_text() == "mine" and _number(path) == 0


def test_a_file_system_without_locks_and_exchange(tmp_path, monkeypatch):
    def flock(handle, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    path = _write(tmp_path / "m")
    _write(path, 1, overwrite=True)
    assert _number(path) == 1 and _names(tmp_path) == ["m"]
    path.rename(tmp_path / ".m.before")
    assert _number(path) == 1


def test_a_file_system_that_cannot_flush_folders(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    assert _number(_write(tmp_path / "m", 7)) == 7


def test_the_parents_of_what_is_put_in_place_are_flushed(tmp_path, monkeypatch):
    flushed, real = [], os.fsync

    def fsync(handle):
        flushed.append(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    _write(tmp_path / "a" / "b" / "m")
    assert {str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")} <= set(flushed)
    flushed.clear()
    storage.write_json_atomic(tmp_path / "x.json", {})
    assert flushed[-1] == str(tmp_path)


def test_the_current_folder_is_filled_and_never_replaced(tmp_path, monkeypatch):
    path = tmp_path / "here"
    path.mkdir()
    monkeypatch.chdir(path)
    assert _write(".", 3) == path
    # The folder that the shell stands in, and not one that it does not see.
    assert sorted(os.listdir(".")) == ["fastdean_config.json", "mask.safetensors"]
    assert _number(".") == _number("") == 3
    with pytest.raises(ValueError, match="can be replaced as a whole, got .* the current folder"):
        _write(".", 4, overwrite=True)
    assert _number(path) == 3


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "a\nb", "-x", "...", "~nobody-here"])
def test_any_name_that_the_file_system_takes(tmp_path, name, exchange):
    path = _write(tmp_path / name)
    _write(path, 1, overwrite=True)
    assert _number(path) == 1 and _names(tmp_path) == [name]
    storage.write_json_atomic(path / name, {})
    assert json.loads((path / name).read_text()) == {}


def test_what_a_killed_process_left_is_swept_by_the_next(tmp_path):
    path = tmp_path / "m"
    _killed(KILLED_WHILE_WRITING, path)
    (left,) = _names(tmp_path)
    assert left.startswith(".m.") and left.endswith(".tmp")
    (tmp_path / ".m.mine.tmp").mkdir()
    _write(path)
    assert _names(tmp_path) == [".m.mine.tmp", "m"]


def test_what_a_living_process_fills_is_not_swept(tmp_path):
    path = tmp_path / "m"
    with folders.new_folder(path) as folder:
        (folder / "a").write_text("a")
        with folders.new_folder(tmp_path / "m2"):
            pass
        folders.sweep(path)
        assert (folder / "a").read_text() == "a"


def test_a_mount_point_is_filled_from_inside(tmp_path, monkeypatch):
    path = tmp_path / "volume"
    path.mkdir()
    real = os.rename

    def rename(one, other):
        if os.path.realpath(other) == str(path):
            raise OSError(errno.EBUSY, "Device or resource busy")
        real(one, other)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os.path, "ismount", lambda place: os.fspath(place) == str(path))
    assert _number(_write(path, 7)) == 7
    assert _names(path) == ["fastdean_config.json", "mask.safetensors"]
    with pytest.raises(ValueError, match="can be replaced as a whole, got .* a mount point"):
        _write(path, overwrite=True)
    assert _number(path) == 7


def test_a_bound_folder_of_the_same_disk_is_a_mount_point_too(tmp_path, monkeypatch):
    path = tmp_path / "my volume"
    path.mkdir()
    mounts = tmp_path / "mountinfo"
    escaped = str(path).replace(" ", r"\040")
    mounts.write_text(f"36 35 254:0 /data {escaped} rw,relatime shared:1 - ext4 /dev/vda rw\n")
    monkeypatch.setattr(folders, "_MOUNTS", mounts)
    real = os.rename

    def rename(one, other):
        if str(path) in (str(one), str(other)):
            raise OSError(errno.EBUSY, "Device or resource busy")
        real(one, other)

    monkeypatch.setattr(os, "rename", rename)
    assert _number(_write(path, 7)) == 7


def test_what_comes_into_a_folder_while_it_is_filled_from_inside_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "volume"
    path.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda place: os.fspath(place) == str(path))
    with (
        pytest.raises(ValueError, match="which has files in it"),
        folders.new_folder(path) as folder,
    ):
        (folder / "a.txt").write_text("ours")
        (folder / "b.txt").write_text("ours")
        real = os.rename

        def rename(one, other):
            (path / "b.txt").write_text("mine")
            real(one, other)

        monkeypatch.setattr(os, "rename", rename)
    assert _names(path) == ["b.txt"] and (path / "b.txt").read_text() == "mine"


def test_a_parent_that_cannot_be_written_to(tmp_path, monkeypatch):
    path = tmp_path / "shared" / "mine"
    path.mkdir(parents=True)
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda place, mode: place != path.parent and real(place, mode)
    )
    assert _number(_write(path, 7)) == 7
    assert _names(path.parent) == ["mine"]


def test_a_failure_while_filling_from_inside_leaves_it_empty(tmp_path, monkeypatch):
    path = tmp_path / "volume"
    path.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda place: os.fspath(place) == str(path))
    real = os.rename

    def rename(one, other):
        if (
            os.fspath(other).endswith("fastdean_config.json")
            and "tmp" not in os.fspath(os.path.dirname(other)).rsplit("/", 1)[-1]
        ):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(one, other)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="No space left"):
        _write(path)
    assert _names(path) == []


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)], ids=oct)
def test_files_have_the_mode_that_the_umask_gives(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        path = _write(tmp_path / "m", max_shard_bytes=1)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {mode}


def test_a_private_folder_and_a_private_file_stay_private(tmp_path, exchange):
    path = tmp_path / "m"
    path.mkdir(mode=0o700)
    _write(path)
    assert path.stat().st_mode & 0o777 == 0o700
    _write(path, overwrite=True)
    assert path.stat().st_mode & 0o777 == 0o700
    file = tmp_path / "results.json"
    file.touch(mode=0o600)
    storage.write_json_atomic(file, {})
    assert file.stat().st_mode & 0o777 == 0o600


def test_nobody_else_reads_in_a_folder_while_it_is_filled(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o2775)
    for path in (shared, tmp_path / "m"):
        with folders.new_folder(path) as folder:
            (folder / "inner").mkdir()
            assert folder.stat().st_mode & 0o077 == 0
        assert (path / "inner").is_dir() and path.stat().st_mode & 0o777 != 0o700
    assert shared.stat().st_mode & 0o7777 == 0o2775
    # What lies in a folder of a group belongs to the group.
    assert (shared / "inner").stat().st_mode & 0o2000


def test_a_folder_keeps_its_owner_and_its_group(tmp_path, monkeypatch, exchange):
    path = tmp_path / "m"
    path.mkdir()
    given = []
    monkeypatch.setattr(os, "chown", lambda place, *owner: given.append(owner))
    _write(path)
    _write(path, overwrite=True)
    assert given == [(path.stat().st_uid, path.stat().st_gid)] * 2


def test_a_private_file_is_private_before_its_text_is_in_it(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    file.touch(mode=0o600)
    modes, real = [], os.fsync

    def fsync(handle):
        modes.append(stat.S_IMODE(os.fstat(handle).st_mode))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    storage.write_json_atomic(file, {})
    assert modes[0] == 0o600


def test_every_flipped_bit_is_found(tmp_path):
    path = _write(tmp_path / "m", max_shard_bytes=1)
    generator = torch.Generator().manual_seed(0)
    expected = storage.read_folder(path, kind="mask")
    files = sorted(path.iterdir())
    for file in files:
        whole = file.read_bytes()
        for _ in range(60):
            at = int(torch.randint(8 * len(whole), (1,), generator=generator))
            raw = bytearray(whole)
            raw[at // 8] ^= 1 << at % 8
            file.write_bytes(raw)
            try:
                config, tensors = storage.read_folder(path, kind="mask")
            except ValueError as error:
                assert "\n" not in str(error)
            else:
                # White space of the JSON, which says nothing.
                assert config == expected[0] and torch.equal(tensors["t"], expected[1]["t"])
        file.write_bytes(whole)


@pytest.mark.parametrize("last", [1, 0], ids=["once", "there_and_back"])
def test_a_reader_gets_the_old_or_the_new_of_a_folder_that_is_replaced(tmp_path, monkeypatch, last):
    def write(number):
        tensors = {"t": torch.full((3,), float(number))}
        storage.write_folder(path, {"n": number}, tensors, kind="mask", overwrite=True)

    path = tmp_path / "m"
    write(0)
    real, reads = storage._read_shard, []

    def read_shard(*arguments):
        reads.append(arguments)
        if len(reads) > 1:
            return real(*arguments)
        with monkeypatch.context() as undone:
            undone.setattr(storage, "_read_shard", real)
            write(1)
            found = real(*arguments)
            write(last)
        return found

    monkeypatch.setattr(storage, "_read_shard", read_shard)
    config, tensors = storage.read_folder(path, kind="mask")
    assert config["n"] == last and tensors["t"].tolist() == [last] * 3


def test_a_third_that_comes_between_the_two_steps_is_replaced_too(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    path, other = _write(tmp_path / "m"), _write(tmp_path / "other", 2)
    real = os.rename

    def rename(one, to):
        real(one, to)
        if one == path and other.exists():
            real(other, path)

    monkeypatch.setattr(os, "rename", rename)
    _write(path, 1, overwrite=True)
    assert _number(path) == 1 and _names(tmp_path) == ["m"]


def test_a_reader_waits_while_another_process_is_between_the_two_steps(tmp_path, monkeypatch):
    path = _write(tmp_path / "m")
    before = path.rename(tmp_path / ".m.before")
    handle = os.open(before, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    monkeypatch.setattr(folders.time, "sleep", lambda seconds: before.rename(path))
    assert _number(path) == 0
    os.close(handle)


def test_folders_of_the_version_before_are_read_and_replaced(tmp_path):
    path = _write(tmp_path / "m")
    config = json.loads((path / "fastdean_config.json").read_text())
    del config["sha256"], config["config_sha256"]
    storage.write_json_atomic(path / "fastdean_config.json", {**config, "format_version": 1})
    assert _number(path) == 0
    _write(path, 1, overwrite=True)
    assert _number(path) == 1
