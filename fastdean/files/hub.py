"""Folders of FastDEAN on the Hugging Face hub: fetching and publishing them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fastdean.files.declared import read_json
from fastdean.files.inventory import CONFIG_NAME, file_patterns, is_ours, lies_in
from fastdean.wording.mendable import StateError
from fastdean.wording.nearest import nearest
from fastdean.wording.printable import error_line

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


# For one request: a library asks several times for each file of a model.
_SECONDS = 5.0


def is_unreachable() -> bool:
    """Whether one short request to the hub fails; False if HF_HUB_OFFLINE is set.

    The caller can then ask the cache alone, where the libraries would retry for minutes.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception:  # the client's libraries raise a dozen unrelated types
        return True
    return False


def ask_the_cache_where_unreachable() -> None:
    """Have the libraries ask their cache alone, in the whole process, if the hub does not answer.

    They would retry for half a minute at every source that is not there.
    """
    if is_unreachable():
        from huggingface_hub import constants

        constants.HF_HUB_OFFLINE = True


def why_not_fetched(error: Exception) -> str:
    """What the client of the hub raised, in one line; without its advice to programmers."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError):
        return "the hub could not be reached, and nothing of that name is in its cache"
    return error_line(error)


def cached_commit(model: str) -> str | None:
    """The commit that a model's hub id stood for when its files were last read.

    Read in the cache, without asking the hub; None of a folder or file, and of what is not there.
    """
    from huggingface_hub import try_to_load_from_cache

    if not _REPO_ID.fullmatch(model) or Path(model).exists():
        return None
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        found = try_to_load_from_cache(model, name)
        if isinstance(found, str):
            # The cache keeps a folder for each commit.
            return Path(found).parent.name
    return None


def checkpoint_folder(repo_id: str, revision: str | None, cache_alone: bool) -> Path:
    """The folder of a model's safetensors files, downloaded where they are not in the cache."""
    from huggingface_hub import snapshot_download

    patterns = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
    return Path(
        snapshot_download(
            repo_id, revision=revision, allow_patterns=patterns, local_files_only=cache_alone
        )
    )


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
    # An empty name would stand for the current folder.
    if str(path_or_repo_id) and folder.is_dir():
        return folder
    asked = (
        "path_or_repo_id must be an existing folder or a repository of the Hugging Face hub, "
        f"got {str(path_or_repo_id)!r}"
    )
    if not _REPO_ID.fullmatch(str(path_or_repo_id)):
        raise ValueError(
            f"{asked}; no such folder, and it is not of the form owner/name"
            f"{nearest(str(path_or_repo_id))}"
        )

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    unknown = (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError)
    try:
        return Path(
            snapshot_download(
                str(path_or_repo_id),
                revision=revision,
                token=token,
                allow_patterns=file_patterns(kind or "*"),
                local_files_only=is_unreachable(),
            )
        )
    except (*unknown, OSError) as error:
        near = nearest(str(path_or_repo_id))
        # Newer releases derive the error of an empty cache from several of the unknown ones.
        if isinstance(error, LocalEntryNotFoundError):
            raise StateError(
                f"{asked}; no such folder, and {why_not_fetched(error)}{near}"
            ) from error
        if isinstance(error, unknown):
            said = f"the hub does not know it ({error_line(error)})"
            raise ValueError(f"{asked}; no such folder, and {said}{near}") from error
        said = f"the hub could not be reached ({error_line(error)})"
        raise StateError(f"{asked}; no such folder, and {said}{near}") from error


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
        ValueError: `path` is not a folder of FastDEAN, or a file in it is a link that leads out.
        Errors of `huggingface_hub` (credentials, network) come through as they are.
    """
    folder = Path(path).expanduser()
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(
            f"path must be a folder written by FastDEAN, got {str(folder)!r}, which has no "
            f"{CONFIG_NAME}; pass the folder that FastDEAN wrote"
        )
    from huggingface_hub import CommitOperationAdd, HfApi

    # Before a repository is made.
    files = _own_files(folder)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    operations = [
        CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=str(file)) for file in files
    ]
    if not api.file_exists(repo_id, "README.md"):
        operations.append(
            CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=card_text.encode())
        )
    return api.create_commit(repo_id, operations, commit_message=commit_message).commit_url


def _own_files(folder: Path) -> list[Path]:
    """The files that a folder lists, which are those that were written with it.

    Raises:
        ValueError: one that is no file, or a link that leads out of the folder and of the hub's
            cache that it belongs to.
    """
    config = read_json(folder / CONFIG_NAME)
    known = [file for file in sorted(folder.iterdir()) if is_ours(file.name, config["kind"])]
    names = config.get("sha256")
    if isinstance(names, dict):
        known = [file for file in known if file.name in {CONFIG_NAME, *names}]
    for file in known:
        if not lies_in(file, folder.resolve()):
            raise ValueError(
                f"path must hold its files itself, got {str(file)!r}, a link to "
                f"{str(file.resolve())!r}; copy the file there before it is published"
            )
        if not file.is_file():
            raise ValueError(
                f"path must hold files, got {str(file)!r}, which is none; copy the folder again"
            )
    return known
