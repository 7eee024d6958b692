"""A mask put into a model for good: through the model (`apply`), or in its files (`patch`).

Both take hub ids, write an ordinary Hugging Face folder with a card, and list in
`fastdean_patch.json` what they wrote, so that either may replace what either wrote.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdean.files.hub import is_unreachable, why_not_fetched
from fastdean.files.provenance import now, public_name, versions
from fastdean.files.safetensors import THROUGH_THE_MODEL
from fastdean.files.storage import (
    FORMAT_VERSION,
    holds_only_listed,
    listed,
    new_folder,
    write_json_atomic,
    write_text_atomic,
)
from fastdean.jobs.edit.edited_card import edited_card
from fastdean.jobs.edit.source_texts import carry_texts
from fastdean.jobs.folder import require_free, require_outside
from fastdean.masks import NeuronMask, edits
from fastdean.masks.checkpoint import PatchResult, patch_checkpoint, verify_checkpoint
from fastdean.masks.patched_copy import PATCH_NAME
from fastdean.models.loading import DEMO_MODEL, load_model
from fastdean.wording.nearest import nearest

# Weights in the forms that `patch_checkpoint` does not edit.
_OTHER_WEIGHTS = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx"]


def apply(
    model: str,
    mask: str,
    out: Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
    command: str = "",
    overwrite: bool = False,
) -> tuple[NeuronMask, bool]:
    """Load a model, apply a mask, and save it as an ordinary Hugging Face folder.

    Returns:
        The mask, and whether values were written; False for a model that was masked already.
    Raises:
        ValueError, RuntimeError, OSError: as `load_model`, `NeuronMask.apply_` and
            `verify_checkpoint`; nothing is left behind.
    """
    require_outside(out, model)
    require_free(out, overwrite, _is_edited, "an edited model")
    found = NeuronMask.from_pretrained(mask)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    loaded, tokenizer = load_model(model, dtype=dtype, device="cpu", **options)
    application = edits.apply_(loaded, found)
    wrote = application is not None and application.wrote
    manifest = {
        "kind": "patch",
        "format_version": FORMAT_VERSION,
        "source": public_name(model),
        "mask": {"weights": len(found), "scale": found.scale, "manifest": found.manifest},
        "values_edited": len(found) if wrote else 0,
        "created": now(),
        "versions": versions(),
    }
    with new_folder(out, overwrite=overwrite, may_replace=_is_edited, name="out") as folder:
        _save(loaded, tokenizer, folder)
        carry_texts(model, revision, folder)
        verify_checkpoint(folder, found)
        write_text_atomic(folder / "README.md", edited_card(model, found, mask, command))
        write_json_atomic(folder / PATCH_NAME, {**manifest, "sha256": listed(folder)})
    return found, wrote


def patch(
    checkpoint: str,
    mask: str,
    out: Path,
    *,
    revision: str | None = None,
    command: str = "",
    overwrite: bool = False,
    follow_links: bool = False,
) -> PatchResult:
    """Copy a checkpoint and edit the masked values in its files, without loading the model.

    Raises:
        ValueError, RuntimeError, OSError: as `patch_checkpoint`; nothing is left behind.
    """
    require_free(out, overwrite, _is_edited, "an edited model")
    found = NeuronMask.from_pretrained(mask)
    return patch_checkpoint(
        _folder_of(checkpoint, revision),
        found,
        out,
        overwrite=overwrite,
        follow_links=follow_links,
        card=edited_card(checkpoint, found, mask, command),
    )


def _is_edited(folder: Path) -> bool:
    return holds_only_listed(folder, PATCH_NAME)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    from safetensors import SafetensorError

    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except SafetensorError as error:  # how it reports a full disk
        raise OSError(f"the model could not be written: {error}") from error


def _folder_of(checkpoint: str, revision: str | None) -> Path:
    """The folder itself, or the hub's repository of that name in the cache, downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    # It would stand for the current folder.
    if not checkpoint:
        raise ValueError("checkpoint must be a folder or a hub id, got ''; name the checkpoint")
    folder = Path(checkpoint).expanduser()
    if not folder.is_dir() and (checkpoint == DEMO_MODEL or folder.suffix == ".gguf"):
        raise ValueError(
            "checkpoint must be a folder of safetensors files, or a hub id, got "
            f"{checkpoint!r}, a GGUF file; {THROUGH_THE_MODEL}"
        )
    try:
        validate_repo_id(checkpoint)
        is_local = folder.exists()
    except HFValidationError:
        is_local = True
    if is_local and revision is not None:
        raise ValueError(
            f"revision must be of a hub id, got {revision!r} for {checkpoint!r}, which is on this "
            "disk; leave it out"
        )
    if is_local:
        return folder
    try:
        return Path(
            snapshot_download(
                checkpoint,
                revision=revision,
                ignore_patterns=_OTHER_WEIGHTS,
                local_files_only=is_unreachable(),
            )
        )
    except Exception as error:  # the library raises a dozen unrelated types
        raise ValueError(
            f"checkpoint must be a local folder or a reachable hub id, got {checkpoint!r}: "
            f"{why_not_fetched(error)}{nearest(checkpoint)}"
        ) from error
