"""A checkpoint's files copied with edited bytes, and compared with the originals."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fastdean.files import storage
from fastdean.files.safetensors import (
    DTYPES,
)
from fastdean.masks.entries import suppressed
from fastdean.masks.patch_plan import Edit
from fastdean.wording.mendable import StateError

PATCH_NAME = "fastdean_patch.json"
_NOT_COPIED = {".git", ".cache"}
_BLOCK_BYTES = 1 << 18


@dataclass(frozen=True)
class _Patch:
    """The bytes of a file that change: int64 [K] ascending offsets, uint8 [K] before and after."""

    offsets: np.ndarray
    before: np.ndarray
    after: np.ndarray

    @classmethod
    def of(cls, edits: list[Edit], scale: float) -> _Patch:
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


def copy_patched(
    source: Path,
    contents: list[Path],
    target: Path,
    edits: Mapping[str, list[Edit]],
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


def contents_of(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
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
            yield from contents_of(found, (*above, real))


def require_own(found: Path, source: Path, follow_links: bool) -> None:
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
