"""Tensors in files, one file per layer and kind; memory holds those of one batch.

Files that are to outlast the process are in kept_files.py.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdean.models.ranks.shards import is_sharded
from fastdean.models.trees import compact
from fastdean.wording.mendable import StateError

# What the keys of records are: all but the last name the file, the last one the record in it.
Key = tuple[Any, ...]
# Of a record: what its tensors are called.
Name = int | str
Note = Callable[[], Any]

_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Part:
    """A tensor of a record."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: str
    size: int

    @classmethod
    def of(cls, tensor: Tensor) -> Part:
        """Of a tensor that is compact."""
        return cls(
            tensor.dtype, tuple(tensor.shape), tensor.stride(), str(tensor.device), tensor.nbytes
        )

    def filled(self, content: Tensor) -> Tensor:
        """The tensor of these bytes, on the CPU."""
        return content.view(self.dtype).as_strided(self.shape, self.stride)


@dataclass
class Stored:
    """A record of a file.

    Attributes:
        offset: of its first tensor's bytes; the others follow.
        parts: name -> tensor.
        note: what its writer said of it.
        sha256: of its bytes, to be compared when they are read; None: they are known to be sound.
    """

    offset: int
    parts: dict[Name, Part]
    note: Any = None
    sha256: str | None = None


@dataclass
class StateFile:
    """A file that grows.

    Attributes:
        end: where the next record begins.
        records: by the last of the key.
    """

    path: Path
    handle: int
    end: int = 0
    records: dict[Any, Stored] = field(default_factory=dict)

    def append(self, content: memoryview | bytes, at: int) -> int:
        """Write at a place, and return where it ended; `end` stays, until a record is whole."""
        content = memoryview(content)
        try:
            while content:
                written = os.pwrite(self.handle, content, at)
                content, at = content[written:], at + written
        except OSError as error:
            raise not_written(self.path.parent, error) from error
        return at

    def read(self, into: memoryview, offset: int) -> None:
        while into:
            got = os.preadv(self.handle, [into], offset)
            if got == 0:
                raise OSError(
                    f"{str(self.path)!r} ended early; files of a job must stay as they are"
                )
            into, offset = into[got:], offset + got


class InFiles:
    """A home in files of its own, which nobody else sees where the system allows that.

    Args:
        folder: made with the first file; whoever made this removes it.
        mark: begins the name of every file.
    """

    name = "files"

    def __init__(self, folder: Path, mark: str = "") -> None:
        self.folder, self._mark = folder, mark
        self.files: dict[Key, StateFile] = {}
        self.most_bytes = 0

    def close(self) -> None:
        while self.files:
            os.close(self.files.popitem()[1].handle)

    def keep(self, key: Key, tensors: Mapping[Name, Tensor], note: Note | None = None) -> None:
        if any(map(is_sharded, tensors.values())):
            raise StateError(
                "layers must return plain tensors for states in files, got one that is sharded "
                "over ranks (DTensor); have the layers' outputs gathered, or keep states in memory "
                "(states='host')"
            )
        file = self._file(key[:-1])
        dense = {name: compact(tensor) for name, tensor in tensors.items()}
        contents = [_bytes(tensor) for tensor in dense.values()]
        stored = Stored(file.end, {name: Part.of(tensor) for name, tensor in dense.items()})
        end = self._begin(file, key, stored, contents, note)
        for content in contents:
            end = file.append(content, end)
        file.end, file.records[key[-1]] = end, stored
        self.most_bytes = max(self.most_bytes, self.held_bytes)

    def bring(self, key: Key, device: str | None = None) -> dict[Name, Tensor]:
        """The tensors of a record, on this device; None: where they were when they were kept."""
        file = self.files[key[:-1]]
        stored = file.records[key[-1]]
        contents = self._read(file, stored)
        return {
            name: part.filled(content).to(device or part.device)
            for (name, part), content in zip(stored.parts.items(), contents, strict=True)
        }

    def drop(self, key: Key) -> None:
        """The file goes with its last record."""
        file = self.files.get(key[:-1])
        if file is not None and file.records.pop(key[-1], None) is not None and not file.records:
            del self.files[key[:-1]]
            os.close(file.handle)
            file.path.unlink(missing_ok=True)

    def foresee(self, size: int) -> None:
        """Raise RuntimeError unless the disk has room for so many bytes."""
        place = self.folder
        while not place.exists() and place != place.parent:
            place = place.parent
        free = shutil.disk_usage(place).free
        if size > free + self.held_bytes:
            raise StateError(
                f"states must have room on a disk for about {size:,} bytes of what the layers "
                f"return, got {free + self.held_bytes:,} in {str(self.folder)!r}; free some, or "
                "name a folder on another disk"
            )

    @property
    def held_bytes(self) -> int:
        return sum(file.end for file in self.files.values())

    def used(self) -> dict[str, int]:
        return {self.name: self.most_bytes} if self.most_bytes else {}

    def _begin(
        self,
        file: StateFile,
        key: Key,
        stored: Stored,
        contents: list[memoryview],
        note: Note | None,
    ) -> int:
        """Write what comes before the bytes of a record; where these begin."""
        return file.end

    def _read(self, file: StateFile, stored: Stored) -> list[Tensor]:
        """The bytes of each tensor of a record."""
        contents, offset = [], stored.offset
        for part in stored.parts.values():
            content = torch.empty(part.size, dtype=torch.uint8)
            file.read(memoryview(content.numpy().data), offset)
            contents.append(content)
            offset += part.size
        return contents

    def _file(self, key: Key) -> StateFile:
        if key not in self.files:
            self.files[key] = self._opened(self.folder / (self._mark + "-".join(map(str, key))))
        return self.files[key]

    def _opened(self, path: Path) -> StateFile:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise not_written(self.folder, error) from error
        # Without a name it goes with the process, however that ends.
        with suppress(OSError):
            path.unlink()
        return StateFile(path, handle)


def not_written(folder: Path, error: OSError) -> OSError:
    """The error to raise where a file cannot be written: of the same number, in our words."""
    if error.errno in _FULL:
        what = f"states must have room on the disk of {str(folder)!r}, got none left; free some"
    else:
        what = (
            f"states must be files that can be written in {str(folder)!r}, got an error: "
            f"{error.strerror or error}; "
            + ("raise the limit (ulimit -f)" if error.errno == errno.EFBIG else "see to that disk")
        )
    told = OSError(f"{what}, or name a folder on another disk, and call again")
    told.errno = error.errno
    return told


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a compact tensor."""
    plain = tensor.cpu()
    flat = plain.as_strided((plain.numel(),), (1,), plain.storage_offset())
    return memoryview(flat.view(torch.uint8).numpy().data)
