"""Folders of `fastdean_config.json` + safetensors, written whole or not at all.

A folder holds one thing, its *kind* ("mask", "scores"): the configuration with the kind and the
format's version, and one `<kind>.safetensors` or, when large, numbered shards with an index in the
form of a Hugging Face checkpoint. Nothing is ever pickled, and what was written is read back and
compared before it takes its place. The configuration lists the digest of every file and its own;
both are compared whenever the folder is read.

Those who store something find here what they need of `atomic`, `folders`, `inventory` and `hub`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastdean
from fastdean.files.atomic import (
    flush,
    flush_behind,
    is_temporary,
    real_place,
    write_json_atomic,
    write_text_atomic,
)
from fastdean.files.declared import (
    Anything,
    Maps,
    Record,
    Text,
    Whole,
    brief,
    read_json,
    require,
)
from fastdean.files.folders import (
    check_free,
    held,
    is_empty,
    new_folder,
    put_back,
    remove_folder,
    standing,
    sweep,
)
from fastdean.files.hub import push_folder, resolve
from fastdean.files.inventory import (
    CONFIG_NAME,
    file_digest,
    holds_only,
    holds_only_listed,
    is_ours,
    lies_in,
    listed,
)
from fastdean.files.safetensors import opened
from fastdean.wording.mendable import StateError
from fastdean.wording.printable import error_line

__all__ = [
    "CONFIG_NAME",
    "FORMAT_VERSION",
    "check_free",
    "flush_behind",
    "held",
    "holds_only",
    "holds_only_listed",
    "is_empty",
    "is_temporary",
    "lies_in",
    "listed",
    "new_folder",
    "push_folder",
    "read_folder",
    "real_place",
    "remove_folder",
    "resolve",
    "sweep",
    "write_folder",
    "write_json_atomic",
    "write_text_atomic",
]

# 2: the configuration lists digests. Folders of version 1 are read without them.
FORMAT_VERSION = 2
_READS = 50
_INDEX = Record({"weight_map": Maps(Text())}, others=Anything())
_RESERVED = ("kind", "format_version", "fastdean_version", "sha256", "config_sha256")


def write_folder(
    path: str | os.PathLike,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    kind: str,
    overwrite: bool = False,
    max_shard_bytes: float = 5e9,
) -> Path:
    """Write `config` and `tensors` as a new folder, atomically, and return its absolute path.

    Args:
        path: a folder that is new or empty. With `overwrite=True` it may hold an earlier folder of
            the same kind, and nothing else: files of other origin are never deleted.
        config: JSON-serialisable, without NaN; the keys kind, format_version, fastdean_version,
            sha256 and config_sha256 are added here.
        tensors: any dtype, device and strides; stored contiguous, in the order given.
        kind: what the folder holds; also the stem of the tensor files.
        max_shard_bytes: a new shard is begun where the next tensor would pass this size.
    Raises:
        ValueError: a path in use, or a reserved key in `config`.
        OSError: the disk refused (full, not writable); nothing is left behind.
        RuntimeError: what was read back is not what was written; nothing is left behind.
    """
    taken = [key for key in _RESERVED if key in config]
    if taken:
        raise ValueError(
            f"config must not hold the reserved keys {', '.join(_RESERVED)}, got {taken[0]!r}; "
            "rename it"
        )
    full_config = {
        "kind": kind,
        "format_version": FORMAT_VERSION,
        "fastdean_version": fastdean.__version__,
        **config,
    }
    shards = _plan_shards(tensors, kind, max_shard_bytes)
    with new_folder(
        path, overwrite=overwrite, may_replace=lambda folder: holds_only(folder, kind)
    ) as folder:
        # Before the tensors: this raises at once for a configuration that JSON cannot hold.
        json.dumps(full_config, allow_nan=False)
        for file_name, names in shards.items():
            _write_shard(folder / file_name, {name: tensors[name] for name in names})
        if len(shards) > 1:
            write_json_atomic(folder / f"{kind}.safetensors.index.json", _index(tensors, shards))
        full_config["sha256"] = listed(folder)
        full_config["config_sha256"] = config_digest(full_config)
        write_json_atomic(folder / CONFIG_NAME, full_config)
        if read_json(folder / CONFIG_NAME) != json.loads(json.dumps(full_config)):
            raise StateError(f"{folder / CONFIG_NAME} could not be verified after writing")
    return Path(path).expanduser().resolve()


def read_folder(path: str | os.PathLike, *, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration (as it was given to `write_folder`) and the tensors, on the CPU.

    Of a folder that is replaced meanwhile, either the old content or the new.

    Raises:
        ValueError: no such folder, not a folder of FastDEAN, another kind, a newer format, or a
            file that is missing, truncated, foreign or not as it was written; the text names the
            file.
    """
    folder = Path(path).expanduser()
    for _ in range(_READS):
        put_back(folder)
        with standing(folder) as still_there:
            try:
                found = _read(folder, kind)
            except (ValueError, OSError, RuntimeError):
                # What was read may be half of the one and half of the other.
                if still_there():
                    raise
                continue
            if still_there():
                return found
    return _read(folder, kind)


def _read(folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not folder.is_dir():
        raise ValueError(
            f"path must be a folder written by FastDEAN, got {str(folder)!r}, which is not a "
            "folder; check the spelling"
        )
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(
            f"path must be a folder written by FastDEAN, got {str(folder)!r}, which has no "
            f"{CONFIG_NAME}; pass the folder that FastDEAN wrote"
        )
    config = read_json(folder / CONFIG_NAME)
    _check_config(folder, config, kind)
    tensors: dict[str, Tensor] = {}
    stored = _stored_files(folder, kind)
    for file_name, names in stored.items():
        tensors.update(_read_shard(folder / file_name, names))
    if config["format_version"] > 1:
        # After the reading, which says more about a file that is cut short or of another kind.
        _check_listed(folder, config, (*stored, f"{kind}.safetensors.index.json"))
    return {key: value for key, value in config.items() if key not in _RESERVED}, tensors


def _plan_shards(
    tensors: Mapping[str, Tensor], kind: str, max_shard_bytes: float
) -> dict[str, list[str]]:
    """File name -> tensor names, filled greedily in the order given; at least one file."""
    groups: list[list[str]] = [[]]
    size_bytes = 0
    for name, tensor in tensors.items():
        if groups[-1] and size_bytes + tensor.nbytes > max_shard_bytes:
            groups.append([])
            size_bytes = 0
        groups[-1].append(name)
        size_bytes += tensor.nbytes
    if len(groups) == 1:
        return {f"{kind}.safetensors": groups[0]}
    return {
        f"{kind}-{number:05d}-of-{len(groups):05d}.safetensors": names
        for number, names in enumerate(groups, start=1)
    }


def _index(tensors: Mapping[str, Tensor], shards: Mapping[str, list[str]]) -> dict[str, Any]:
    return {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: file_name for file_name, names in shards.items() for name in names},
    }


def _write_shard(file: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # safetensors refuses two names on one storage; here each name simply gets its own copy.
    if len({tensor.untyped_storage() for tensor in plain.values()}) < len(plain):
        plain = {name: tensor.clone() for name, tensor in plain.items()}
    try:
        save_file(plain, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file.name} could not be written: {error_line(error)}") from error
    flush(file)
    _verify_shard(file, plain)


def _verify_shard(file: Path, expected: Mapping[str, Tensor]) -> None:
    """Read the file back and compare every byte, which says more than comparing a hash."""
    try:
        found = _read_shard(file, list(expected))
    except ValueError as error:
        raise StateError(f"{file.name} could not be verified after writing: {error}") from error
    for name, tensor in expected.items():
        same_kind = found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        if not same_kind or not torch.equal(_bytes(found[name]), _bytes(tensor)):
            raise StateError(
                f"{file.name} could not be verified after writing: {name!r} read back differently; "
                "check the disk"
            )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _check_config(folder: Path, config: Any, kind: str) -> None:
    file = folder / CONFIG_NAME
    named = Record({"kind": Text()}, others=Anything())
    require(config, named, file, advice="pass the folder that FastDEAN wrote")
    if config["kind"] != kind:
        raise ValueError(
            f"path must be a folder of kind {kind!r}, got {str(folder)!r}, which is of kind "
            f"{brief(config['kind'])}; pass another folder"
        )
    readable = Record({"format_version": Whole(1, FORMAT_VERSION)}, others=Anything())
    require(config, readable, file, advice="update fastdean")
    if config["format_version"] > 1:
        content = {key: value for key, value in config.items() if key != "config_sha256"}
        if config.get("config_sha256") != config_digest(content):
            raise ValueError(f"{str(file)!r} {_AS_WRITTEN}")


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of a configuration, however it is laid out in its file."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


_AS_WRITTEN = "must be as it was written, got other content: damaged or edited; copy it again"


def _check_listed(folder: Path, config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Compare files with the digests that the configuration lists."""
    digests = config["sha256"] if isinstance(config.get("sha256"), dict) else {}
    for name in names:
        file = folder / name
        if not file.is_file() and name not in digests:
            continue
        if not file.is_file():
            raise ValueError(f"{str(file)!r} must be there, got no such file; copy it too")
        if file_digest(file) != digests.get(name):
            raise ValueError(f"{str(file)!r} {_AS_WRITTEN}")


def _stored_files(folder: Path, kind: str) -> Mapping[str, list[str] | None]:
    """File name -> the names expected in it, or None where there is no index to say so."""
    index_file = folder / f"{kind}.safetensors.index.json"
    if not index_file.exists():
        return {f"{kind}.safetensors": None}
    files: dict[str, list[str]] = {}
    for name, file_name in read_json(index_file, _INDEX)["weight_map"].items():
        if not is_ours(file_name, kind) or "/" in file_name:
            raise ValueError(
                f"{str(index_file)!r} must name files of its own folder, got {file_name!r}"
            )
        files.setdefault(file_name, []).append(name)
    return files


def _read_shard(file: Path, names: list[str] | None) -> dict[str, Tensor]:
    """The tensors of one file; `names`, where given, are exactly those it must hold."""
    if not file.is_file():
        raise ValueError(f"{str(file)!r} must be a safetensors file, got no such file; copy it too")
    with opened(file) as found:
        tensors = {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118
    if names is not None and set(names) != set(tensors):
        odd = sorted(set(names) ^ set(tensors))[0]
        raise ValueError(
            f"{str(file)!r} must hold the tensors that its index names, got a difference at {odd!r}"
        )
    return tensors
