"""Folders of configuration and tensors: whole or not at all, and clear about what is wrong."""

from __future__ import annotations

import errno
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from fastdean.files import atomic, storage


def _tensors():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 4, generator=generator)
    return {
        "a.index": torch.arange(5),
        "b": base.t(),
        "c": base[1:3],
        "d": torch.randn(7, generator=generator).bfloat16(),
        "empty": torch.empty(0, dtype=torch.float64),
        "scalar": torch.tensor(-0.0),
    }


def _assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def _write(path, **options):
    return storage.write_folder(path, {"n": 3}, _tensors(), kind="mask", **options)


@pytest.mark.parametrize("max_shard_bytes", [5e9, 100, 1], ids=["one_file", "shards", "each_own"])
def test_round_trip(tmp_path, max_shard_bytes):
    config = {"n": 3, "names": ["a", "é"], "nested": {"x": None, "y": 0.1}}
    tensors = _tensors()
    path = storage.write_folder(
        tmp_path / "new" / "folder", config, tensors, kind="mask", max_shard_bytes=max_shard_bytes
    )
    found_config, found = storage.read_folder(path, kind="mask")
    assert found_config == config
    _assert_same(found, tensors)
    assert str(found["scalar"].item()) == "-0.0"


def test_shards_are_indexed_as_hugging_face_does(tmp_path):
    path = _write(tmp_path / "m", max_shard_bytes=100)
    index = json.loads((path / "mask.safetensors.index.json").read_text())
    files = sorted(file.name for file in path.glob("*.safetensors"))
    assert len(files) > 1
    assert files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"mask-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in _tensors().values())
    for name, file_name in index["weight_map"].items():
        assert name in safetensors.torch.load_file(path / file_name)


def test_folder_without_tensors(tmp_path):
    path = storage.write_folder(tmp_path / "m", {}, {}, kind="mask")
    assert storage.read_folder(path, kind="mask") == ({}, {})


def test_config_says_what_it_is(tmp_path):
    config = json.loads((_write(tmp_path / "m") / "fastdean_config.json").read_text())
    assert config["kind"] == "mask"
    assert config["format_version"] == 2
    assert config["fastdean_version"]


def test_existing_folder_is_not_touched(tmp_path):
    path = _write(tmp_path / "m")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(ValueError, match="new or empty folder, got .*overwrite=True .--overwrite."):
        storage.write_folder(path, {}, {}, kind="mask")
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_empty_folder_is_used_and_a_file_is_not(tmp_path):
    (tmp_path / "empty").mkdir()
    _write(tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="must be a new or empty folder, got the file"):
        _write(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_overwrite_replaces_the_whole_folder(tmp_path):
    path = _write(tmp_path / "m", max_shard_bytes=1)
    storage.write_folder(path, {"n": 4}, {}, kind="mask", overwrite=True)
    assert sorted(file.name for file in path.iterdir()) == [
        "fastdean_config.json",
        "mask.safetensors",
    ]
    assert storage.read_folder(path, kind="mask") == ({"n": 4}, {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("stranger", ["notes.txt", "model.safetensors"])
def test_overwrite_never_deletes_files_of_other_origin(tmp_path, stranger):
    path = _write(tmp_path / "m")
    (path / stranger).write_text("mine")
    with pytest.raises(ValueError, match="holds nothing else, for overwrite=True .--overwrite."):
        _write(path, overwrite=True)
    assert (path / stranger).read_text() == "mine"


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()],
    ids=["disk_full", "interrupt"],
)
@pytest.mark.parametrize("earlier", [False, True], ids=["new", "overwrite"])
def test_failed_write_leaves_the_old_state(tmp_path, monkeypatch, error, earlier):
    if earlier:
        _write(tmp_path / "m")
    calls = []

    def save_file(tensors, file, metadata):
        calls.append(file)
        Path(file).write_bytes(b"half")
        if len(calls) == 2:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", save_file)
        patch.setattr(storage, "_verify_shard", lambda file, expected: None)
        with pytest.raises(type(error)):
            _write(tmp_path / "m", max_shard_bytes=1, overwrite=True)
    assert len(calls) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == (["m"] if earlier else [])
    if earlier:
        _assert_same(storage.read_folder(tmp_path / "m", kind="mask")[1], _tensors())


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()], ids=["disk", "interrupt"])
def test_failure_removes_the_parents_that_were_made_for_it(tmp_path, error):
    (tmp_path / "mine").mkdir()
    with (
        pytest.raises(type(error)),
        storage.new_folder(tmp_path / "mine" / "runs" / "deep" / "m") as folder,
    ):
        (folder / "half").write_text("half")
        raise error
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


def test_failure_keeps_a_parent_that_others_have_used(tmp_path):
    with (
        pytest.raises(OSError, match="disk"),
        storage.new_folder(tmp_path / "runs" / "deep" / "m"),
    ):
        (tmp_path / "runs" / "theirs").write_text("theirs")
        raise OSError("disk")
    assert [entry.name for entry in (tmp_path / "runs").iterdir()] == ["theirs"]


def test_a_parent_that_cannot_be_made_leaves_none(tmp_path, monkeypatch):
    real = Path.mkdir

    def mkdir(self, *options, **named):
        if self.name == "deep" and self.parent.exists():
            raise PermissionError(errno.EACCES, "Permission denied")
        real(self, *options, **named)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(PermissionError), storage.new_folder(tmp_path / "runs" / "deep" / "m"):
        pytest.fail("entered")
    assert list(tmp_path.iterdir()) == []


def test_what_the_disk_garbled_is_found_before_renaming(tmp_path, monkeypatch):
    real = safetensors.torch.save_file

    def save_file(tensors, file, metadata):
        real(tensors, file, metadata)
        raw = bytearray(Path(file).read_bytes())
        raw[-1] ^= 1
        Path(file).write_bytes(raw)

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    with pytest.raises(RuntimeError, match="mask.safetensors could not be verified after writing"):
        _write(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_nan_in_the_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.write_folder(tmp_path / "m", {"x": float("nan")}, {}, kind="mask")
    assert list(tmp_path.iterdir()) == []


def test_reserved_key_is_refused(tmp_path):
    with pytest.raises(ValueError, match="config must not hold the reserved keys .* got 'kind'"):
        storage.write_folder(tmp_path / "m", {"kind": "x"}, {}, kind="mask")


def test_reading_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="which is not a folder"):
        storage.read_folder(tmp_path / "none", kind="mask")
    with pytest.raises(ValueError, match="which has no fastdean_config.json"):
        storage.read_folder(tmp_path, kind="mask")


def test_reading_another_kind(tmp_path):
    path = storage.write_folder(tmp_path / "s", {}, {}, kind="scores")
    with pytest.raises(ValueError, match="of kind 'mask', got .* which is of kind 'scores'"):
        storage.read_folder(path, kind="mask")


def test_reading_a_newer_format(tmp_path):
    path = _write(tmp_path / "m")
    config = json.loads((path / "fastdean_config.json").read_text())
    storage.write_json_atomic(path / "fastdean_config.json", {**config, "format_version": 3})
    with pytest.raises(
        ValueError, match="format_version as a whole number from 1 to 2, got 3; update fastdean"
    ):
        storage.read_folder(path, kind="mask")


@pytest.mark.parametrize("keep_bytes", [0, 5, 60, -1])
def test_truncated_file_is_named_on_one_line(tmp_path, keep_bytes):
    path = _write(tmp_path / "m")
    file = path / "mask.safetensors"
    file.write_bytes(file.read_bytes()[:keep_bytes])
    with pytest.raises(ValueError, match="mask.safetensors' must be a whole safetensors") as caught:
        storage.read_folder(path, kind="mask")
    assert "\n" not in str(caught.value)


def test_missing_shard_is_named(tmp_path):
    path = _write(tmp_path / "m", max_shard_bytes=100)
    next(path.glob("mask-00002*")).unlink()
    with pytest.raises(ValueError, match="mask-00002-of-.*no such file"):
        storage.read_folder(path, kind="mask")


def test_shard_of_another_folder_is_found(tmp_path):
    path = _write(tmp_path / "m", max_shard_bytes=100)
    safetensors.torch.save_file({"zzz": torch.zeros(1)}, next(path.glob("mask-00002*")))
    with pytest.raises(ValueError, match="must hold the tensors that its index names"):
        storage.read_folder(path, kind="mask")


def test_index_cannot_point_out_of_the_folder(tmp_path):
    path = _write(tmp_path / "m", max_shard_bytes=100)
    storage.write_json_atomic(
        path / "mask.safetensors.index.json", {"weight_map": {"a": "mask-/../../x-of-.safetensors"}}
    )
    with pytest.raises(ValueError, match="must name files of its own folder"):
        storage.read_folder(path, kind="mask")


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000], ids=range(4))
def test_broken_config_is_named(tmp_path, text):
    path = _write(tmp_path / "m")
    (path / "fastdean_config.json").write_text(text)
    with pytest.raises(ValueError, match="fastdean_config.json' must"):
        storage.read_folder(path, kind="mask")


def test_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "a.txt"
    storage.write_text_atomic(target, "one\n")
    storage.write_text_atomic(target, "zwei ä\n")
    assert target.read_bytes() == "zwei ä\n".encode()

    def fsync(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        storage.write_text_atomic(target, "three")
    assert target.read_bytes() == "zwei ä\n".encode()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


@pytest.fixture
def slow_disk(monkeypatch):
    """A disk that takes a file in only when it is allowed to; what it took in, in order."""
    allowed, flushed = threading.Event(), []

    def flush(path):
        assert allowed.wait(timeout=60)
        if path.name == "broken":
            raise OSError(errno.EIO, "Input/output error")
        flushed.append(path.name)

    monkeypatch.setattr(atomic, "flush", flush)
    yield allowed, flushed
    allowed.set()


def test_a_flush_behind_does_not_wait_and_its_block_does(slow_disk):
    allowed, flushed = slow_disk
    with storage.flush_behind() as flush:
        for name in ("a", "b", "c"):
            flush(Path(name))
        assert not flushed
        allowed.set()
    assert flushed == ["a", "b", "c"]


def test_an_error_of_a_flush_behind_is_the_error_of_the_block(slow_disk):
    allowed, _ = slow_disk
    with pytest.raises(OSError, match="Input/output error"), storage.flush_behind() as flush:
        flush(Path("a"))
        flush(Path("broken"))
        allowed.set()


def test_what_has_not_begun_to_be_flushed_is_dropped_with_an_interrupt(slow_disk, monkeypatch):
    allowed, flushed = slow_disk

    class Pool(ThreadPoolExecutor):
        def shutdown(self, **options):
            super().shutdown(**{**options, "wait": False})
            allowed.set()
            super().shutdown(**options)

    monkeypatch.setattr(atomic, "ThreadPoolExecutor", Pool)
    with pytest.raises(KeyboardInterrupt), storage.flush_behind() as flush:
        for name in ("a", "b", "c"):
            flush(Path(name))
        raise KeyboardInterrupt
    # The one that was under way, if any, is waited for.
    assert flushed in ([], ["a"])


def test_resolve_prefers_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked"))
    assert storage.resolve(tmp_path) == tmp_path


def test_resolve_downloads_only_our_files(tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert storage.resolve("owner/name", revision="v1", token="t", kind="mask") == tmp_path
    assert asked["repo_id"] == "owner/name"
    assert (asked["revision"], asked["token"]) == ("v1", "t")
    assert "mask.safetensors" in asked["allow_patterns"]
    assert "fastdean_config.json" in asked["allow_patterns"]
    assert not any(pattern in ("*", "*.safetensors") for pattern in asked["allow_patterns"])


def _repository_unknown():
    error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    Exception.__init__(error, "404\nnot found")
    return error


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        (
            LocalEntryNotFoundError("offline\nmode; pass 'local_files_only=False'"),
            RuntimeError,
            "the hub could not be reached, and nothing of that name is in its cache$",
        ),
        (ConnectionError("refused"), RuntimeError, "could not be reached"),
        (_repository_unknown(), ValueError, "the hub does not know it"),
    ],
    ids=["offline", "network", "unknown"],
)
def test_resolve_explains_what_failed(monkeypatch, answer, kind, text):
    def snapshot_download(repo_id, **options):
        raise answer

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(kind, match=f"got 'owner/name'; no such folder, and .*{text}") as caught:
        storage.resolve("owner/name")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["./nowhere/mask", "/nowhere", "a/b/c", ""])
def test_resolve_does_not_ask_the_hub_for_a_path(monkeypatch, path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked"))
    monkeypatch.setattr(Path, "is_dir", lambda self: False)
    with pytest.raises(ValueError, match="not of the form owner/name"):
        storage.resolve(path)


class FakeApi:
    """Records what would be uploaded."""

    readme = False
    commits: list = []

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repo_id, *, private, exist_ok):
        return type("Repository", (), {"repo_id": f"me/{repo_id}"})

    def file_exists(self, repo_id, name):
        return self.readme

    def create_commit(self, repo_id, operations, *, commit_message):
        self.commits.append((repo_id, [op.path_in_repo for op in operations], commit_message))
        return type("Commit", (), {"commit_url": f"address of {repo_id}"})


@pytest.mark.parametrize("readme", [False, True], ids=["no_card", "card_exists"])
def test_push_uploads_our_files_and_keeps_a_written_card(tmp_path, monkeypatch, readme):
    path = _write(tmp_path / "m")
    (path / "private.txt").write_text("not for the hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "readme", readme)
    monkeypatch.setattr(FakeApi, "commits", [])
    address = storage.push_folder(path, "name", commit_message="hello", card_text="# card")
    assert address == "address of me/name"
    files = ["fastdean_config.json", "mask.safetensors"] + ([] if readme else ["README.md"])
    assert FakeApi.commits == [("me/name", files, "hello")]


def test_push_uploads_what_the_folder_lists(tmp_path, monkeypatch):
    path = _write(tmp_path / "m")
    (path / "mask-my-notes-of-today.safetensors").write_text("not for the hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "commits", [])
    storage.push_folder(path, "name", commit_message="", card_text="")
    assert FakeApi.commits[0][1] == ["fastdean_config.json", "mask.safetensors", "README.md"]


@pytest.mark.parametrize("linked_cache", [False, True])
def test_push_takes_a_folder_of_the_cache_and_no_other_link(tmp_path, monkeypatch, linked_cache):
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "commits", [])
    repository = tmp_path / "cache" / "models--me--m"
    blobs = _write(repository / "blobs")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    for file in blobs.iterdir():
        (repository / "snapshots" / "abc" / file.name).symlink_to(f"../../blobs/{file.name}")
    cache = tmp_path / "cache"
    if linked_cache:
        cache = tmp_path / "home"
        cache.symlink_to(tmp_path / "cache")
    snapshot = cache / "models--me--m" / "snapshots" / "abc"
    storage.push_folder(snapshot, "name", commit_message="", card_text="")
    assert FakeApi.commits[0][1][:2] == ["fastdean_config.json", "mask.safetensors"]

    # Refused before a repository is made for it.
    monkeypatch.setattr(FakeApi, "create_repo", None)
    elsewhere = (blobs / "mask.safetensors").rename(tmp_path / "elsewhere")
    (blobs / "mask.safetensors").symlink_to(elsewhere)
    with pytest.raises(ValueError, match="must hold its files itself, got .*copy the file there"):
        storage.push_folder(snapshot, "name", commit_message="", card_text="")


def test_push_refuses_other_folders(tmp_path):
    with pytest.raises(ValueError, match="has no fastdean_config.json"):
        storage.push_folder(tmp_path, "name", commit_message="", card_text="")
