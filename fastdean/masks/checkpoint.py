"""`patch_checkpoint`: a mask applied to a Hugging Face folder on disk, without loading the model.

The folder is copied block by block, with the few bytes of the masked weights exchanged on the way.
Neither a tensor nor a model is ever held: a 70B checkpoint is patched in the time of a copy, on a
machine that could not load it.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdean.files import storage
from fastdean.files.declared import Anything, Exactly, Record, read_json
from fastdean.files.safetensors import (
    DTYPES,
    THROUGH_THE_MODEL,
    StoredTensor,
    read_values,
    stored_tensors,
    weight_files,
)
from fastdean.masks.entries import MaskEntry, same_bits, suppressed
from fastdean.masks.mask import NeuronMask
from fastdean.models.experts.fused_tensors import FusedTensor, fused_tensors
from fastdean.wording.mendable import StateError

__all__ = ["PatchResult", "patch_checkpoint", "verify_checkpoint"]

PATCH_NAME = "fastdean_patch.json"
_NOT_COPIED = {".git", ".cache"}
_BLOCK_BYTES = 1 << 18
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
    _check_places(source, out)
    # Before anything is read: a pipe would keep its reader waiting for ever.
    contents = list(_contents(source, (out, *out.parents)))
    for found in contents:
        _require_own(found, source, follow_links)
    edits = _plan(source, mask, stored_tensors(source))
    with storage.new_folder(
        out, overwrite=overwrite, may_replace=_is_patched, name="out", keep_modes=True
    ) as folder:
        digests = _copy_patched(source, contents, folder, edits, mask.scale)
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
    named = _named(stored)
    fused = _fused(folder, mask, stored, named)
    for name, entry in mask.entries.items():
        if name in fused and not fused[name].reason:
            for part, tensor in _parts(entry, fused[name]):
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


@dataclass(frozen=True)
class _Edit:
    """An entry of the mask, or an expert's part of it, and its tensor in a file.

    Attributes:
        stored_name: of the tensor, with a star where experts lie in a tensor each.
    """

    name: str
    entry: MaskEntry
    tensor: StoredTensor
    stored_name: str


def _check_places(source: Path, out: Path) -> None:
    if not source.is_dir():
        advice = "pass the folder it lies in" if source.exists() else "download the model first"
        advice = THROUGH_THE_MODEL if source.suffix == ".gguf" else advice
        raise ValueError(
            f"source must be a local folder of a checkpoint, got {str(source)!r}, which is "
            f"{'a file' if source.exists() else 'not a folder'}; {advice}"
        )
    if out == source or source in out.parents or out in source.parents:
        raise ValueError(
            f"out must be a folder outside of source, got {str(out)!r} for source {str(source)!r}; "
            "choose another"
        )


def _is_patched(folder: Path) -> bool:
    return storage.holds_only_listed(folder, PATCH_NAME)


def _plan(
    source: Path, mask: NeuronMask, stored: Mapping[str, StoredTensor]
) -> dict[str, list[_Edit]]:
    """File name -> its edits, after checking names, shapes, dtypes and values of all of them."""
    named = _named(stored)
    fused = _fused(source, mask, stored, named)
    edits: list[_Edit] = []
    unmapped: list[str] = []
    taken: dict[str, str] = {}
    for name, entry in mask.entries.items():
        if name in fused:
            found = fused[name]
            shared = next((t.name for part in found.parts for t in part if t.name in taken), None)
            reason = found.reason
            if shared is not None:
                reason = f"{taken[shared]!r} of the mask means {shared!r}, too"
            if reason:
                unmapped.append(f"{name!r} ({reason})")
                continue
            taken.update((t.name, name) for part in found.parts for t in part)
            edits.extend(_Edit(name, part, t, found.name) for part, t in _parts(entry, found))
            continue
        tensors, reason = _locate(source, entry, named(name))
        shared = next((tensor.name for tensor in tensors if tensor.name in taken), None)
        if shared is not None:
            reason = f"{taken[shared]!r} of the mask means the same tensor, {shared!r}"
        if reason:
            unmapped.append(f"{name!r} ({reason})")
            continue
        taken.update((tensor.name, name) for tensor in tensors)
        edits.extend(_Edit(name, entry, tensor, tensor.name) for tensor in tensors)
    if unmapped:
        more = f" and {len(unmapped) - 3} more" if len(unmapped) > 3 else ""
        raise ValueError(
            f"mask must name tensors of the checkpoint, got {len(unmapped)} of {len(mask.names)} "
            f"that {str(source)!r} does not have: {'; '.join(unmapped[:3])}{more}; "
            f"{THROUGH_THE_MODEL}"
        )
    grouped: dict[str, list[_Edit]] = {}
    for edit in edits:
        _check_values(source, edit, mask.scale)
        grouped.setdefault(edit.tensor.file_name, []).append(edit)
    return dict(sorted(grouped.items()))


def _fused(
    folder: Path,
    mask: NeuronMask,
    stored: Mapping[str, StoredTensor],
    named: Callable[[str], list[StoredTensor]],
) -> dict[str, FusedTensor]:
    """Of stacked parameters that the files hold otherwise, the tensors that they are made of."""
    wanted = {
        name: entry.shape
        for name, entry in mask.entries.items()
        if len(entry.shape) == 3 and not any(t.shape == entry.shape for t in named(name))
    }
    return fused_tensors(folder, stored, wanted) if wanted else {}


def _parts(entry: MaskEntry, fused: FusedTensor) -> Iterator[tuple[MaskEntry, StoredTensor]]:
    """The entry's part in each tensor that holds some of it."""
    local = fused.local(entry.index, entry.shape)
    for tensor, here in fused.places(entry.index, entry.shape):
        yield MaskEntry(local[here], entry.original[here], tensor.shape), tensor


def _shorter_names(name: str) -> Iterator[str]:
    """`name` without one, two, ... leading components, up to the first layer number."""
    parts = name.split(".")
    for start in range(1, len(parts)):
        if parts[start - 1].isdigit():
            return
        yield ".".join(parts[start:])


def _named(stored: Mapping[str, StoredTensor]) -> Callable[[str], list[StoredTensor]]:
    """A function that gives the tensors that a parameter's name may mean, whatever their shapes."""
    longer: dict[str, list[StoredTensor]] = {}
    for name, tensor in stored.items():
        for shorter in _shorter_names(name):
            longer.setdefault(shorter, []).append(tensor)

    def named(name: str) -> list[StoredTensor]:
        if name in stored:
            return [stored[name]]
        shorter = [stored[other] for other in _shorter_names(name) if other in stored]
        return shorter + longer.get(name, [])

    return named


def _locate(
    source: Path, entry: MaskEntry, named: list[StoredTensor]
) -> tuple[list[StoredTensor], str]:
    """Those of the tensors of a parameter's name that it means, or none and the reason.

    More than one only where all hold the originals: copies of one tensor under several names.
    """
    if not named:
        return [], "no tensor of that name: renamed or fused in the file"
    fitting = [tensor for tensor in named if tensor.shape == entry.shape]
    if not fitting:
        return [], f"shape {list(entry.shape)} in the mask, {list(named[0].shape)} in the file"
    if len(fitting) > 1 and not all(_holds_originals(source, entry, each) for each in fitting):
        names = " or ".join(repr(tensor.name) for tensor in fitting[:3])
        return [], f"not unique: {names}"
    return fitting, ""


def _holds_originals(source: Path, entry: MaskEntry, tensor: StoredTensor) -> bool:
    if tensor.dtype not in DTYPES:
        return False
    with open(source / tensor.file_name, "rb", buffering=0) as file:
        return _count_other(read_values(file, tensor, entry.index), entry) == 0


def _count_other(values: Tensor, entry: MaskEntry) -> int:
    """How many values differ from the originals, rounded to the dtype of the values."""
    return int((~same_bits(values, entry.original.to(values.dtype))).sum())


def _check_values(source: Path, edit: _Edit, scale: float) -> None:
    tensor = edit.tensor
    if tensor.dtype not in DTYPES:
        raise ValueError(
            f"source must hold {tensor.name!r} as one of {', '.join(DTYPES)}, got {tensor.dtype} "
            f"(quantised) in {tensor.file_name!r}; use a checkpoint that is not quantised"
        )
    with open(source / tensor.file_name, "rb", buffering=0) as file:
        other = _count_other(read_values(file, tensor, edit.entry.index), edit.entry)
    if other:
        raise ValueError(
            f"source must be the model that the mask was made on, got {tensor.name!r} in "
            f"{tensor.file_name!r}, which holds other values than the mask's originals at {other} "
            f"of {len(edit.entry)} places: another model or already patched"
        )
    if not bool(suppressed(edit.entry.original, scale, DTYPES[tensor.dtype]).isfinite().all()):
        raise ValueError(
            f"mask must keep every value finite, got scale {scale:g} for {tensor.name!r} stored as "
            f"{tensor.dtype}; use a smaller scale"
        )


@dataclass(frozen=True)
class _Patch:
    """The bytes of a file that change: int64 [K] ascending offsets, uint8 [K] before and after."""

    offsets: np.ndarray
    before: np.ndarray
    after: np.ndarray

    @classmethod
    def of(cls, edits: list[_Edit], scale: float) -> _Patch:
        offsets = [np.empty(0, np.int64)]
        before, after = [np.empty(0, np.uint8)], [np.empty(0, np.uint8)]
        for edit in sorted(edits, key=lambda edit: edit.tensor.offset):
            original, dtype = edit.entry.original, DTYPES[edit.tensor.dtype]
            first = edit.tensor.offset + edit.entry.index.numpy() * dtype.itemsize
            offsets.append((first[:, None] + np.arange(dtype.itemsize)).reshape(-1))
            before.append(original.to(dtype).view(torch.uint8).numpy())
            after.append(suppressed(original, scale, dtype).view(torch.uint8).numpy())
        return cls(np.concatenate(offsets), np.concatenate(before), np.concatenate(after))

    def blocks(self, file: Path) -> Iterator[bytearray]:
        """The content of the file with the bytes exchanged, in blocks."""
        at = first = 0
        changed = StateError(f"{file.name} changed while it was copied; try again")
        with open(file, "rb") as opened:
            while block := bytearray(opened.read(_BLOCK_BYTES)):
                last = int(np.searchsorted(self.offsets, at + len(block)))
                places, content = self.offsets[first:last] - at, np.frombuffer(block, np.uint8)
                if (content[places] != self.before[first:last]).any():
                    raise changed
                content[places] = self.after[first:last]
                yield block
                at, first = at + len(block), last
        if first < len(self.offsets):
            raise changed


def _copy_patched(
    source: Path,
    contents: list[Path],
    target: Path,
    edits: Mapping[str, list[_Edit]],
    scale: float,
) -> dict[str, str]:
    """Copy contents, following links, into an existing folder, with the suppressed values in it.

    All files are on the disk at the end, compared with the source; the first error ends it.
    Returns name -> digest of every file of the copy. The manifest of an earlier patch is left out.
    """
    digests: dict[str, str] = {}
    copied = [found for found in contents if found != source / PATCH_NAME]
    with storage.flush_behind() as behind:
        for found in copied:
            name = found.relative_to(source).as_posix()
            place = target / name
            if found.is_dir():
                place.mkdir()
                continue
            patch = _Patch.of(edits.get(name, []), scale)
            _copy_file(found, place, patch)
            behind(place)
            behind(partial(_check_copy, found, place, patch, name, digests))
    for found in copied:
        # Afterwards, so that a file or folder that is read-only could be written. Folders stay open
        # to their owner: `overwrite` must be able to remove them.
        mode = stat.S_IMODE(found.stat().st_mode)
        place = target / found.relative_to(source)
        place.chmod(mode | 0o700 if place.is_dir() else mode)
    return dict(sorted(digests.items()))


def _copy_file(source: Path, copy: Path, patch: _Patch) -> None:
    with open(copy, "xb") as file:
        file.writelines(patch.blocks(source))


def _check_copy(
    source: Path, copy: Path, patch: _Patch, name: str, digests: dict[str, str]
) -> None:
    """Read both files again: the copy is the source with the bytes exchanged, and nothing else.

    Finds a flipped bit as well as a source that was changed while it was copied. The digest of what
    was compared is put into `digests`, so that it need not be read once more.
    """
    different = StateError(
        f"{copy.name} could not be verified after writing: it differs from the edited source; "
        "check the disk, and that nothing changes the source"
    )
    digest = hashlib.sha256()
    with open(copy, "rb") as file:
        for block in patch.blocks(source):
            if file.read(len(block)) != block:
                raise different
            digest.update(block)
        if file.read(1):
            raise different
    digests[name] = digest.hexdigest()


def _contents(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """The files and folders to copy, a folder before its contents; `above` must not be entered."""
    real = folder.resolve()
    if real in above:
        raise ValueError(
            f"source must hold no link to a folder that it is copied from or to, got "
            f"{str(folder)!r}, which leads to {str(real)!r}; remove the link"
        )
    for found in sorted(folder.iterdir()):
        if found.name in _NOT_COPIED and found.is_dir():
            continue
        yield found
        if found.is_dir():
            yield from _contents(found, (*above, real))


def _require_own(found: Path, source: Path, follow_links: bool) -> None:
    """Refuse anything but files and folders, and a link that leads out of the source."""
    try:
        real = found.resolve(strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"source must hold no link that leads back to itself, got {str(found)!r}; remove the "
            "link"
        ) from error
    if not real.is_file() and not real.is_dir():
        raise ValueError(
            f"source must hold files and folders only, got {str(found)!r}, a device, pipe or "
            "socket; remove it"
        )
    if not follow_links and not storage.lies_in(found, source):
        raise ValueError(
            f"source must hold no link that leads out of it, got {str(found)!r}, which leads to "
            f"{str(real)!r}; remove the link, or pass follow_links=True (--follow-links) if it is "
            "part of the model"
        )


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
    source: Path, mask: NeuronMask, edits: Mapping[str, list[_Edit]], result: PatchResult
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
