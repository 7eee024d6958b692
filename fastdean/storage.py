"""Folders of `fastdean_config.json` + safetensors, written whole or not at all.

A folder holds one thing, its *kind* ("mask", "scores"): the configuration with the kind and the
format's version, and one `<kind>.safetensors` or, when large, numbered shards with an index in the
form of a Hugging Face checkpoint. Nothing is ever pickled.

Writing goes to a temporary sibling, is flushed, read back and compared, and only then renamed. A
full disk, an interrupt or a crash therefore leaves the old state or the new one, never a mixture.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastdean

CONFIG_NAME = "fastdean_config.json"
FORMAT_VERSION = 1
_RESERVED = ("kind", "format_version", "fastdean_version")
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


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
        config: JSON-serialisable, without NaN; the keys kind, format_version and fastdean_version
            are added here.
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
        write_json_atomic(folder / CONFIG_NAME, full_config)
        for file_name, names in shards.items():
            _write_shard(folder / file_name, {name: tensors[name] for name in names})
        if len(shards) > 1:
            write_json_atomic(folder / f"{kind}.safetensors.index.json", _index(tensors, shards))
        if _read_json(folder / CONFIG_NAME) != json.loads(json.dumps(full_config)):
            raise RuntimeError(f"{folder / CONFIG_NAME} could not be verified after writing")
    return Path(path).expanduser().resolve()


def read_folder(path: str | os.PathLike, *, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration (as it was given to `write_folder`) and the tensors, on the CPU.

    Raises:
        ValueError: no such folder, not a folder of FastDEAN, another kind, a newer format, or a
            file that is missing, truncated or foreign; the text names the file.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"path must be a folder written by FastDEAN, got {str(folder)!r}, which is not a "
            "folder; check the spelling"
        )
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(
            f"path must be a folder written by FastDEAN, got {str(folder)!r}, which has no "
            f"{CONFIG_NAME}; pass the folder that save_pretrained made"
        )
    config = _read_json(folder / CONFIG_NAME)
    _check_config(folder, config, kind)
    tensors: dict[str, Tensor] = {}
    for file_name, names in _stored_files(folder, kind).items():
        tensors.update(_read_shard(folder / file_name, names))
    return {key: value for key, value in config.items() if key not in _RESERVED}, tensors


def resolve(
    path_or_repo_id: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    kind: str | None = None,
) -> Path:
    """The folder itself where it exists, else the hub's repository of that name, downloaded.

    Only FastDEAN's files are fetched (those of `kind`, where given), into the cache of
    `huggingface_hub`, which also honours HF_HUB_OFFLINE, HF_TOKEN and HF_HOME.

    Raises:
        ValueError: neither a folder nor a repository (or revision) that the hub knows.
        RuntimeError: the hub could not be asked, and nothing is in the cache.
    """
    folder = Path(path_or_repo_id).expanduser()
    if folder.is_dir():
        return folder
    asked = (
        "path_or_repo_id must be an existing folder or a repository of the Hugging Face hub, "
        f"got {str(path_or_repo_id)!r}"
    )
    if not _REPO_ID.fullmatch(str(path_or_repo_id)):
        raise ValueError(f"{asked}; no such folder, and it is not of the form owner/name")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                str(path_or_repo_id),
                revision=revision,
                token=token,
                allow_patterns=_file_patterns(kind or "*"),
            )
        )
    # Unreachable first: newer releases derive it from several of the classes below.
    except LocalEntryNotFoundError as error:
        raise RuntimeError(
            f"{asked}; no such folder, and the hub could not be reached ({_one_line(error)})"
        ) from error
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ValueError(
            f"{asked}; no such folder, and the hub does not know it ({_one_line(error)})"
        ) from error
    except OSError as error:
        raise RuntimeError(
            f"{asked}; no such folder, and the hub could not be reached ({_one_line(error)})"
        ) from error


def push_folder(
    path: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str,
    card_text: str,
) -> str:
    """Upload a folder of FastDEAN in one commit and return the commit's address.

    The repository is created where it does not exist. `card_text` becomes its README.md unless it
    has one: a card that somebody wrote is not replaced.

    Raises:
        ValueError: `path` is not a folder of FastDEAN.
        Errors of `huggingface_hub` (credentials, network) come through as they are.
    """
    folder = Path(path).expanduser()
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(
            f"path must be a folder written by FastDEAN, got {str(folder)!r}, which has no "
            f"{CONFIG_NAME}; pass the folder that save_pretrained made"
        )
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    kind = _read_json(folder / CONFIG_NAME)["kind"]
    operations = [
        CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=str(file))
        for file in sorted(folder.iterdir())
        if _is_ours(file.name, kind)
    ]
    if not api.file_exists(repo_id, "README.md"):
        operations.append(
            CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=card_text.encode())
        )
    return api.create_commit(repo_id, operations, commit_message=commit_message).commit_url


@contextmanager
def new_folder(
    path: str | os.PathLike,
    *,
    overwrite: bool = False,
    may_replace: Callable[[Path], bool] = lambda folder: False,
    name: str = "path",
) -> Iterator[Path]:
    """A temporary sibling of `path` to fill; it becomes `path` when the block ends well.

    `may_replace(folder)` says whether an existing non-empty folder is one that `overwrite=True` may
    delete. `name` is the caller's argument, for the error text. On any exception, KeyboardInterrupt
    included, the temporary folder is removed and `path` is as it was.

    Raises:
        ValueError: `path` is a file, or a folder in use that may not be replaced.
    """
    target = Path(path).expanduser().resolve()
    check_free(target, overwrite=overwrite, may_replace=may_replace, name=name)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(target)
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            _flush(file)
        _flush(temporary)
        _publish(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_free(
    target: Path,
    *,
    overwrite: bool,
    may_replace: Callable[[Path], bool],
    name: str = "path",
) -> None:
    """Raise ValueError unless a new folder may come to stand at `target`."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{name} must be a new or empty folder, got the file {str(target)!r}")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ValueError(
            f"{name} must be a new or empty folder, got {str(target)!r}, which has files in it; "
            "choose another or pass overwrite=True"
        )
    if not may_replace(target):
        raise ValueError(
            f"{name} must be a folder that FastDEAN wrote and that holds nothing else, for "
            f"overwrite=True to replace it, got {str(target)!r}; choose another"
        )


def write_json_atomic(path: str | os.PathLike, obj: Any) -> None:
    """Write `obj` as indented UTF-8 JSON; NaN and infinities are refused (ValueError)."""
    write_text_atomic(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text_atomic(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 file under a temporary name beside `path`, flush it, and rename it."""
    target = Path(path)
    temporary = _sibling(target)
    try:
        with open(temporary, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sibling(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


def _publish(temporary: Path, target: Path) -> None:
    """Rename, moving what stood at `target` aside first and putting it back if that fails."""
    if not target.exists():
        os.rename(temporary, target)
    else:
        aside = _sibling(target)
        os.rename(target, aside)
        try:
            os.rename(temporary, target)
        except BaseException:
            os.rename(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    _flush(target.parent)


def _flush(path: Path) -> None:
    """Ask the system to put a file, or the entries of a folder, on the disk."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _file_patterns(kind: str) -> list[str]:
    return [
        CONFIG_NAME,
        f"{kind}.safetensors",
        f"{kind}-*-of-*.safetensors",
        f"{kind}.safetensors.index.json",
    ]


def _is_ours(file_name: str, kind: str) -> bool:
    return any(fnmatch(file_name, pattern) for pattern in _file_patterns(kind))


def holds_only(folder: Path, kind: str) -> bool:
    """Whether `folder` is a folder of this kind without a file of other origin."""
    return (folder / CONFIG_NAME).is_file() and all(
        _is_ours(entry.name, kind) for entry in folder.iterdir()
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


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
    if len({id(storage) for storage in _storages(plain)}) < len(plain):
        plain = {name: tensor.clone() for name, tensor in plain.items()}
    try:
        save_file(plain, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file.name} could not be written: {_one_line(error)}") from error
    _flush(file)
    _verify_shard(file, plain)


def _storages(tensors: Mapping[str, Tensor]) -> list[torch.UntypedStorage]:
    return [tensor.untyped_storage() for tensor in tensors.values()]


def _verify_shard(file: Path, expected: Mapping[str, Tensor]) -> None:
    """Read the file back and compare every byte, which says more than comparing a hash."""
    try:
        found = _read_shard(file, list(expected))
    except ValueError as error:
        raise RuntimeError(f"{file.name} could not be verified after writing: {error}") from error
    for name, tensor in expected.items():
        same_kind = found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        if not same_kind or not torch.equal(_bytes(found[name]), _bytes(tensor)):
            raise RuntimeError(
                f"{file.name} could not be verified after writing: {name!r} read back differently; "
                "check the disk"
            )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{str(file)!r} must be a JSON file, got something else ({_one_line(error)}); "
            "write or copy it again"
        ) from error


def _check_config(folder: Path, config: Any, kind: str) -> None:
    if not isinstance(config, dict) or "kind" not in config:
        raise ValueError(
            f"{str(folder / CONFIG_NAME)!r} must say what the folder holds, got no 'kind'; "
            "pass the folder that save_pretrained made"
        )
    if config["kind"] != kind:
        nouns = {"mask": "a mask"}
        raise ValueError(
            f"path must be a folder of kind {kind!r}, got {str(folder)!r}, which holds "
            f"{nouns.get(config['kind'], config['kind'])}, not {nouns.get(kind, kind)}"
        )
    version = config.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"{str(folder / CONFIG_NAME)!r} must have a format_version up to {FORMAT_VERSION}, got "
            f"{version!r}; update fastdean"
        )


def _stored_files(folder: Path, kind: str) -> dict[str, list[str] | None]:
    """File name -> the names expected in it, or None where there is no index to say so."""
    index_file = folder / f"{kind}.safetensors.index.json"
    if not index_file.exists():
        return {f"{kind}.safetensors": None}
    index = _read_json(index_file)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise ValueError(f"{str(index_file)!r} must hold a weight_map, got none; write it again")
    files: dict[str, list[str] | None] = {}
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not _is_ours(file_name, kind) or "/" in file_name:
            raise ValueError(
                f"{str(index_file)!r} must name files of its own folder, got {file_name!r}"
            )
        files.setdefault(file_name, []).append(name)
    return files


def _read_shard(file: Path, names: list[str] | None) -> dict[str, Tensor]:
    """The tensors of one file; `names`, where given, are exactly those it must hold."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise ValueError(f"{str(file)!r} must be a safetensors file, got no such file; copy it too")
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{str(file)!r} must be a whole safetensors file, got a truncated or foreign one "
            f"({_one_line(error)}); copy or write it again"
        ) from error
    if names is not None and set(names) != set(tensors):
        odd = sorted(set(names) ^ set(tensors))[0]
        raise ValueError(
            f"{str(file)!r} must hold the tensors that its index names, got a difference at {odd!r}"
        )
    return tensors
