"""Files of tensors that outlast the process, and say themselves what is in them.

A record is 8 bytes that say what it is, the length of its header in 8 more, the SHA-256 of the
header in 32, the header in JSON and the bytes of its tensors. Files only grow; of two records of
one key the later one counts. Which bytes of them stand is written elsewhere (resumable.py): what
lies beyond is cut off when a later process opens them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdean.coupling.resuming.state_files import (
    InFiles,
    Key,
    Note,
    Part,
    StateFile,
    Stored,
    not_written,
)
from fastdean.files.declared import (
    Anything,
    Either,
    Kind,
    Lists,
    Maps,
    Record,
    Row,
    Text,
    Unfit,
    Whole,
    require,
)

_MAGIC = b"fdstate1"
# What is in the place of a file that is not there any more: nothing, or something else.
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
_BEFORE_HEADER = len(_MAGIC) + 8 + 32
# A header has some hundred bytes for each tensor.
_LONGEST_HEADER = 1 << 28
_NAME = Either((Whole(), Text()))
_SIZES = Lists(Whole())
# Name, dtype, shape, strides, device and bytes of a tensor.
_PART = Row((_NAME, Text(longest=100), _SIZES, _SIZES, Text(longest=100), Whole()))
_HEADER = Record(
    {
        "job": Text(longest=100),
        "key": Lists(_NAME, least=2),
        "parts": Lists(_PART),
        "note": Anything(),
        "sha256": Text(longest=64),
    }
)
# What `KeptFiles.standing` says of each file.
STANDING: Kind = Maps(
    Record({"length": Whole(), "headers": Text(longest=64), "dropped": Lists(_NAME)})
)


@dataclass
class _KeptFile(StateFile):
    """Its records' ends and digests of headers, in order, and every key they had."""

    headers: list[tuple[int, bytes]] = field(default_factory=list)
    written: dict[Any, None] = field(default_factory=dict)
    flushed: int = 0

    def standing(self) -> dict[str, Any]:
        digests = b"".join(digest for end, digest in self.headers if end <= self.end)
        return {
            "length": self.end,
            "headers": hashlib.sha256(digests).hexdigest(),
            "dropped": [last for last in self.written if last not in self.records],
        }


class KeptFiles(InFiles):
    """A home in files with which a later process goes on.

    Args:
        folder: holds them, and nothing else that is called like them.
        job: a text that no other job has.
    Attributes:
        besides_bytes: of records that are no states, for which there must be room too.
    """

    besides_bytes = 0

    def __init__(self, folder: Path, job: str) -> None:
        super().__init__(folder)
        self._job = job

    def drop(self, key: Key) -> None:
        """The file stays until `settle`."""
        file = self.files.get(key[:-1])
        if file is not None:
            file.records.pop(key[-1], None)

    def foresee(self, size: int) -> None:
        super().foresee(size + self.besides_bytes)

    def notes(self, kind: str) -> Iterator[tuple[Key, Any, list[Part]]]:
        """The key of every record of a kind, what its writer noted, and its tensors."""
        for name, file in self.files.items():
            if name[0] == kind:
                for last, stored in file.records.items():
                    yield (*name, last), stored.note, list(stored.parts.values())

    def standing(self) -> dict[str, dict[str, Any]]:
        """Flush the files, and say which bytes of them a later process is to find."""
        found = {}
        for file in self.files.values():
            if not file.records:
                continue
            assert isinstance(file, _KeptFile)
            try:
                if file.flushed < file.end:
                    end = file.end
                    os.fsync(file.handle)
                    file.flushed = end
            except OSError as error:
                raise not_written(self.folder, error) from error
            found[file.path.name] = file.standing()
        return found

    def settle(self) -> None:
        """Remove the files of which no record is left."""
        for key in [key for key, file in self.files.items() if not file.records]:
            self.files[key].path.unlink(missing_ok=True)
            os.close(self.files.pop(key).handle)

    def restore(self, standing: Mapping[str, Mapping[str, Any]]) -> None:
        """Open the files as they stood, and remove what was written since.

        Raises:
            ValueError: one of them is not as it was.
        """
        for entry in self.folder.iterdir():
            if is_state_file(entry.name) and entry.name not in standing:
                entry.unlink()
        self.reopen(standing)

    def reopen(self, standing: Mapping[str, Mapping[str, Any]]) -> None:
        """Open these files as they stood.

        Raises:
            ValueError: one of them is not as it was.
        """
        for name, said in standing.items():
            file = self._reopened(self.folder / name)
            key = self._scan(file, said)
            self.files[key] = file

    def _reopened(self, path: Path) -> _KeptFile:
        try:
            return _KeptFile(path, os.open(path, os.O_RDWR))
        except OSError as error:
            if error.errno not in _NO_FILE:
                # Nothing is wrong with what is there.
                raise not_written(path.parent, error) from error
            raise damaged(path, error.strerror or "no file that can be read") from None

    def _scan(self, file: _KeptFile, said: Mapping[str, Any]) -> Key:
        """Read all headers of a file; the key that its records share."""
        path, length = file.path, said["length"]
        if (size := os.fstat(file.handle).st_size) < length:
            raise damaged(path, f"{size:,} of {length:,} bytes")
        dropped, key = set(said["dropped"]), None
        while file.end < length:
            header, digest, offset = self._header(file, length)
            stored = Stored(offset, {}, header["note"], header["sha256"])
            for name, dtype, shape, stride, device, bytes_ in header["parts"]:
                kind = getattr(torch, dtype, None)
                if not isinstance(kind, torch.dtype):
                    raise damaged(path, f"a tensor in {dtype}")
                stored.parts[name] = Part(kind, tuple(shape), tuple(stride), device, bytes_)
            *first, last = header["key"]
            key = tuple(first)
            if header["job"] != self._job or file_name(key) != path.name:
                raise damaged(path, "the file of another job or another layer")
            file.end = offset + sum(part.size for part in stored.parts.values())
            file.headers.append((file.end, digest))
            file.written[last] = None
            file.records.pop(last, None)
            if last not in dropped:
                file.records[last] = stored
        if file.end != length or file.standing()["headers"] != said["headers"] or key is None:
            raise damaged(path, "other content")
        os.ftruncate(file.handle, length)
        file.flushed = length
        return key

    def _header(self, file: _KeptFile, length: int) -> tuple[dict[str, Any], bytes, int]:
        """The header that begins where `file` ends so far, its digest, and where it ends."""

        def read(size: int, at: int) -> bytes:
            if size > min(length - at, _LONGEST_HEADER):
                raise damaged(file.path, "other content")
            content = bytearray(size)
            file.read(memoryview(content), at)
            return bytes(content)

        before = read(_BEFORE_HEADER, file.end)
        magic, size, digest = before[:8], int.from_bytes(before[8:16], "little"), before[16:]
        text = read(size, file.end + _BEFORE_HEADER)
        if magic != _MAGIC or hashlib.sha256(text).digest() != digest:
            raise damaged(file.path, "other content")
        try:
            header = json.loads(text)
        except (ValueError, RecursionError):
            raise damaged(file.path, "other content") from None
        require(header, _HEADER, file.path, advice=_advice(file.path))
        return header, digest, file.end + _BEFORE_HEADER + size

    def _begin(
        self,
        file: StateFile,
        key: Key,
        stored: Stored,
        contents: list[memoryview],
        note: Note | None,
    ) -> int:
        assert isinstance(file, _KeptFile)
        digest = hashlib.sha256()
        for content in contents:
            digest.update(content)
        header = {
            "job": self._job,
            "key": list(key),
            "parts": [
                [name, str(p.dtype).removeprefix("torch."), p.shape, p.stride, p.device, p.size]
                for name, p in stored.parts.items()
            ],
            "note": None if note is None else note(),
            "sha256": digest.hexdigest(),
        }
        text = json.dumps(header, allow_nan=False).encode()
        of_header = hashlib.sha256(text).digest()
        start = _MAGIC + len(text).to_bytes(8, "little") + of_header + text
        stored.offset = file.append(start, file.end)
        # A record that an interrupt cut short is written over.
        while file.headers and file.headers[-1][0] > file.end:
            file.headers.pop()
        file.headers.append((stored.offset + sum(map(len, contents)), of_header))
        file.written[key[-1]] = None
        return stored.offset

    def _read(self, file: StateFile, stored: Stored) -> list[Tensor]:
        contents = super()._read(file, stored)
        if stored.sha256 is not None:
            digest = hashlib.sha256()
            for content in contents:
                digest.update(content.numpy().data)
            if digest.hexdigest() != stored.sha256:
                raise damaged(file.path, "other content")
            stored.sha256 = None
        return contents

    def _opened(self, path: Path) -> StateFile:
        try:
            return _KeptFile(path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        except OSError as error:
            raise not_written(self.folder, error) from error


def file_name(key: Key) -> str:
    return "-".join(map(str, key))


def is_state_file(name: str) -> bool:
    kind, _, number = name.partition("-")
    return kind in ("state", "gradient", "entries") and number.isascii() and number.isdigit()


def damaged(path: Path, got: str) -> Unfit:
    return Unfit(f"{str(path)!r} must be as this job wrote it, got {got}; {_advice(path)}")


def _advice(path: Path) -> str:
    return f"remove {str(path.parent)!r} to start again"
