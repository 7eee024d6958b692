"""A debiased model as an ordinary Hugging Face folder, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdean.files.provenance import now, versions
from fastdean.files.safetensors import weight_files
from fastdean.files.storage import (
    holds_only_listed,
    listed,
    new_folder,
    write_json_atomic,
    write_text_atomic,
)
from fastdean.models.model_state import unwrap
from fastdean.wording.mendable import StateError

MANIFEST_NAME = "fastdean_debias.json"


def save_model(
    path: str | os.PathLike,
    model: nn.Module,
    tokenizer: Any,
    *,
    card: str,
    manifest: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Save model and tokenizer with `save_pretrained`, the card and a manifest beside them.

    Args:
        path: a new or empty folder.
        card: the README.md, see `model_card`.
        manifest: JSON for `fastdean_debias.json`, beside time and versions.
        overwrite: replace an earlier output of this function that holds nothing else.
    Returns:
        The absolute path of the folder.
    Raises:
        ValueError: a path in use.
        OSError: the disk refused; nothing is left behind.
        RuntimeError: the files do not hold the model; nothing is left behind.
    """
    with new_folder(path, overwrite=overwrite, may_replace=is_saved_model) as folder:
        inner: Any = unwrap(model)
        inner.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_text_atomic(folder / "README.md", card)
        _verify(folder, inner)
        write_json_atomic(
            folder / MANIFEST_NAME,
            {
                **(manifest or {}),
                "created": now(),
                "versions": versions(),
                "sha256": listed(folder),
            },
        )
    return Path(path).expanduser().resolve()


def is_saved_model(folder: Path) -> bool:
    """Whether `folder` holds an output of `save_model` and nothing else."""
    return holds_only_listed(folder, MANIFEST_NAME)


def _verify(folder: Path, model: nn.Module) -> None:
    """Raise RuntimeError unless the tensors in the files are the model's of the same names."""
    from safetensors import safe_open

    own = model.state_dict()
    compared = 0
    for file in weight_files(folder):
        with safe_open(folder / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if name not in own:
                    continue
                compared += 1
                if not torch.equal(opened.get_tensor(name), own[name].detach().cpu()):
                    raise StateError(
                        f"the saved model must hold the trained {name!r}, got other values in "
                        f"{file!r}; check the disk"
                    )
    if compared == 0:
        raise StateError(
            "the saved model must hold tensors by the model's names, got none; this model renames "
            "its weights when it is saved, so they cannot be verified"
        )
