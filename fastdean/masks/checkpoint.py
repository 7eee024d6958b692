"""`patch_checkpoint`: a mask applied to a Hugging Face folder on disk, without loading the model.

The folder is copied block by block, with the few bytes of the masked weights exchanged on the way.
Neither a tensor nor a model is ever held: a 70B checkpoint is patched in the time of a copy, on a
machine that could not load it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fastdean.files import storage
from fastdean.files.declared import Anything, Exactly, Record, read_json
from fastdean.files.safetensors import (
    DTYPES,
    StoredTensor,
    read_values,
    stored_tensors,
    weight_files,
)
from fastdean.masks.entries import MaskEntry, same_bits, suppressed
from fastdean.masks.mask import NeuronMask
from fastdean.masks.patch_plan import (
    Edit,
    check_places,
    fused_in,
    parts_of,
    planned_edits,
    tensors_named,
)
from fastdean.masks.patched_copy import PATCH_NAME, contents_of, copy_patched, require_own
from fastdean.wording.mendable import StateError

__all__ = ["PatchResult", "patch_checkpoint", "verify_checkpoint"]
_OTHER_WEIGHTS = (
    "*.safetensors",
    "pytorch_model*.bin",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.onnx",
)


@dataclass(frozen=True)
class PatchResult:
    """What `patch_checkpoint` did.

    Args:
        out: the edited folder.
        files_edited: names of the safetensors files in which something was written.
        values_edited: number of values written.
        renamed: parameter name in the mask -> tensor name in the file, where they differ.
        unpatched_files: other files with weights (pytorch_model.bin, GGUF, shards beside a whole
            model.safetensors, ...), copied unedited; a program that reads those sees the model
            without the mask.
    """

    out: Path
    files_edited: tuple[str, ...]
    values_edited: int
    renamed: dict[str, str]
    unpatched_files: tuple[str, ...]


def patch_checkpoint(
    source: str | os.PathLike,
    mask: NeuronMask,
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
    follow_links: bool = False,
    card: str | None = None,
) -> PatchResult:
    """Copy a Hugging Face folder to `out` with the mask applied to the files it is loaded from.

    Experts that are one parameter of the model and a tensor each in the files are found by
    transformers' rules for them.

    The result is, bit for bit, what `mask.apply_(model)` and `model.save_pretrained(out)` give,
    with the source's sharding, names, dtype and file modes. The source is only read. Every byte of
    the copy is compared with the source afterwards. A manifest, `fastdean_patch.json`, is added; it
    lists the digest of every file.

    Args:
        source: a local folder with `*.safetensors`. Symbolic links are followed where they lead to
            something in the folder itself, or to the files of the hub's cache that it belongs to.
            Devices, pipes and sockets are refused. Version control and cache folders are not
            copied.
        mask: its names may differ from the file's by a leading prefix such as "model." where that
            leaves one tensor of the same shape; its dtype may differ where every original rounds
            to the value in the file.
        out: a new or empty folder outside of `source`.
        overwrite: replace an earlier output of this function that holds nothing else.
        follow_links: follow links that lead out of `source`, too. They are refused otherwise: what
            they lead to need not be part of the model, and the copy may be published.
        card: the README.md of the copy; that of the source then is called README.source.md.
    Raises:
        ValueError: a folder or file that is missing, truncated, foreign or quantised; names,
            shapes or values of another model, or of one patched already; a link that leads out of
            the source, back to a folder it lies in, or to `out`; `out` in use.
        OSError: the disk refused, or a link leads nowhere; nothing is left behind.
        RuntimeError: what was read back is not what was written, or the source changed meanwhile;
            nothing is left behind.
    """
    source, out = Path(source).expanduser().resolve(), Path(out).expanduser().resolve()
    check_places(source, out)
    # Before anything is read: a pipe would keep its reader waiting for ever.
    contents = list(contents_of(source, (out, *out.parents)))
    for found in contents:
        require_own(found, source, follow_links)
    edits = planned_edits(source, mask, stored_tensors(source))
    with storage.new_folder(
        out, overwrite=overwrite, may_replace=_is_patched, name="out", keep_modes=True
    ) as folder:
        digests = copy_patched(source, contents, folder, edits, mask.scale)
        every = [edit for group in edits.values() for edit in group]
        result = PatchResult(
            out=out,
            files_edited=tuple(edits),
            values_edited=sum(len(edit.entry) for edit in every),
            renamed={
                edit.name: edit.stored_name for edit in every if edit.name != edit.stored_name
            },
            unpatched_files=_other_weights(digests, weight_files(source)),
        )
        manifest = _manifest(source, mask, edits, result)
        (folder / PATCH_NAME).unlink(missing_ok=True)
        digests.pop(PATCH_NAME, None)
        if card is not None:
            _write_card(folder, card, digests)
        manifest["sha256"] = dict(sorted(digests.items()))
        storage.write_json_atomic(folder / PATCH_NAME, manifest)
    return result


def verify_checkpoint(folder: str | os.PathLike, mask: NeuronMask) -> None:
    """Read the masked values of a saved model and compare them with what the mask makes of them.

    For a model that was edited in memory and saved: its names may have gained or lost a leading
    prefix, and its dtype may be another one.

    Raises:
        RuntimeError: a parameter of the mask is not in the files, or a value in them is not the
            suppressed original, rounded to the file's dtype; the text names the parameter.
        ValueError: the folder holds no safetensors, or truncated or foreign ones.
    """
    folder = Path(folder)
    stored = stored_tensors(folder)
    named = tensors_named(stored)
    fused = fused_in(folder, mask, stored, named)
    for name, entry in mask.entries.items():
        if name in fused and not fused[name].reason:
            for part, tensor in parts_of(entry, fused[name]):
                if not _holds_suppressed(folder, part, tensor, mask.scale):
                    raise StateError(
                        f"the saved model must hold the masked values of {name!r}, got others in "
                        f"{tensor.name!r} of {tensor.file_name!r}; check the disk, and that "
                        "nothing edits the model while it is saved"
                    )
            continue
        fitting = [
            tensor
            for tensor in named(name)
            if tensor.shape == entry.shape and tensor.dtype in DTYPES
        ]
        if not fitting:
            raise StateError(
                f"the saved model must hold {name!r} of shape {list(entry.shape)}, got no such "
                f"tensor in {str(folder)!r}: renamed, fused or quantised in the file"
            )
        if not any(_holds_suppressed(folder, entry, tensor, mask.scale) for tensor in fitting):
            raise StateError(
                f"the saved model must hold the masked values of {name!r}, got others in "
                f"{fitting[0].file_name!r}; check the disk, and that nothing edits the model while "
                "it is saved"
            )


def _holds_suppressed(folder: Path, entry: MaskEntry, tensor: StoredTensor, scale: float) -> bool:
    expected = suppressed(entry.original, scale, DTYPES[tensor.dtype])
    with open(folder / tensor.file_name, "rb", buffering=0) as file:
        return bool(same_bits(read_values(file, tensor, entry.index), expected).all())


def _is_patched(folder: Path) -> bool:
    return storage.holds_only_listed(folder, PATCH_NAME)


def _write_card(folder: Path, card: str, digests: dict[str, str]) -> None:
    readme, of_source = folder / "README.md", folder / "README.source.md"
    # What was patched before has the first source's card under that name.
    if readme.is_file() and not of_source.exists():
        readme.rename(of_source)
        digests[of_source.name] = digests[readme.name]
    storage.write_text_atomic(readme, card)
    digests |= storage.listed(folder, [readme.name])


def _other_weights(names: Iterable[str], patched: list[str]) -> tuple[str, ...]:
    return tuple(
        name
        for name in names
        if name not in patched
        and any(fnmatch(name.rsplit("/", 1)[-1], pattern) for pattern in _OTHER_WEIGHTS)
    )


def _manifest(
    source: Path, mask: NeuronMask, edits: Mapping[str, list[Edit]], result: PatchResult
) -> dict[str, Any]:
    """Provenance that travels with the folder; the folder's name, not its path, names the source.

    The manifest of an earlier patch of the source goes under "earlier".
    """
    earlier_file = source / PATCH_NAME
    earlier = None
    if earlier_file.is_file():
        earlier = read_json(
            earlier_file,
            Record({"kind": Exactly("patch")}, others=Anything()),
            advice="remove it from the checkpoint if the checkpoint was not patched",
        )
    return {
        "kind": "patch",
        "format_version": storage.FORMAT_VERSION,
        "source": source.name,
        "mask": {"weights": len(mask), "scale": mask.scale, "manifest": mask.manifest},
        "values_edited": result.values_edited,
        "files": {name: sum(len(e.entry) for e in group) for name, group in edits.items()},
        "renamed": result.renamed,
        "unpatched_files": list(result.unpatched_files),
        "earlier": earlier,
    }
