"""Safetensors files on disk: which of them a model is loaded from, where a tensor's values lie.

No tensor is ever held whole: values are read some neighbours at a time, or mapped.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fastdean.files.declared import Anything, Maps, Record, Text, read_json, read_text
from fastdean.wording.mendable import StateError
from fastdean.wording.printable import error_line

# Type in a file's header -> dtype, of those whose values a mask can hold.
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
# Of those that a model may have besides.
_OTHERS = {
    "BOOL": torch.bool,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
}
_WHOLE_NAME = "model.safetensors"
_INDEX_NAME = "model.safetensors.index.json"
_INDEX = Record({"weight_map": Maps(Text(longest=1000))}, others=Anything())
_ADVICE = "copy it again"
# What to do with weights in another form.
THROUGH_THE_MODEL = "edit it with `fastdean apply`, which loads the model and saves safetensors"
# Neighbouring values are read together, but never a whole large tensor.
_MAX_RUN_BYTES = 1 << 20


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `offset` in bytes from the beginning of the file; `dtype` as stored."""

    name: str
    file_name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """ValueError for a type that only quantised models have."""
        found = (DTYPES | _OTHERS).get(self.dtype)
        if found is None:
            raise ValueError(
                f"source must hold plain numbers, got {self.dtype} in {self.name!r}; use a "
                "checkpoint that is not quantised"
            )
        return found

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize

    def blank(self) -> Tensor:
        """A meta tensor of its shape and dtype."""
        return torch.empty(self.shape, dtype=self.torch_dtype, device="meta")


class MappedFiles:
    """Tensors of a folder's files as views of the mapped files.

    A view takes memory for the parts of it that were looked at. Writing into one leaves the file
    alone.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, mmap.mmap] = {}

    def view(self, tensor: StoredTensor) -> Tensor:
        if not tensor.nbytes:
            return torch.empty(tensor.shape, dtype=tensor.torch_dtype, device="cpu")
        content = torch.frombuffer(
            self._mapped(tensor.file_name),
            dtype=torch.uint8,
            count=tensor.nbytes,
            offset=tensor.offset,
        )
        if tensor.offset % tensor.torch_dtype.itemsize:
            content = content.clone()
        return content.view(tensor.torch_dtype).view(tensor.shape)

    def let_go(self) -> None:
        """Give the memory of all views back to the system; they read their files anew."""
        for mapped in self._files.values():
            if hasattr(mapped, "madvise"):  # Windows
                mapped.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Let go of the files; views that are still in use keep theirs."""
        self._files.clear()

    def _mapped(self, file_name: str) -> mmap.mmap:
        if file_name not in self._files:
            with open(self._folder / file_name, "rb") as file:
                # Private: what is written to the memory does not reach the file.
                self._files[file_name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._files[file_name]

    def want(self, tensors: Iterable[StoredTensor]) -> None:
        """Have the system read them ahead into its own memory, where it can."""
        if not hasattr(os, "posix_fadvise"):  # macOS, Windows
            return
        for tensor in tensors:
            file = os.open(self._folder / tensor.file_name, os.O_RDONLY)
            try:
                os.posix_fadvise(file, tensor.offset, tensor.nbytes, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(file)


def weight_files(source: Path) -> list[str]:
    """The safetensors files that from_pretrained reads, by name.

    Where a folder holds one whole file and an index of shards, only the whole file is loaded.

    Raises:
        ValueError: there are none, or an index or a config.json that cannot be followed.
    """
    return _loaded(source)[0]


def _loaded(source: Path) -> tuple[list[str], dict[str, str]]:
    """The files that from_pretrained reads, and tensor -> file of the index that it follows."""
    there = (name for name in (_WHOLE_NAME, _INDEX_NAME) if (source / name).is_file())
    first = _named_by_config(source) or next(there, None)
    if first is None:
        files, weight_map = sorted(file.name for file in source.glob("*.safetensors")), {}
    elif first.endswith(".json"):
        weight_map = read_json(source / first, _INDEX, advice=_ADVICE)["weight_map"]
        files = sorted(set(weight_map.values()))
        if any(Path(file_name).name != file_name for file_name in files):
            raise ValueError(
                f"{str(source / first)!r} must name files of its own folder, got other paths"
            )
    else:
        files, weight_map = [first], {}
    if not files:
        got, advice = "none", "pass the folder that save_pretrained made"
        others = [f"*{suffix}" for suffix in (".bin", ".gguf") if any(source.glob(f"*{suffix}"))]
        if others:
            got = f"only {' and '.join(others)} files"
            advice = THROUGH_THE_MODEL
        raise ValueError(f"source must hold *.safetensors, got {got} in {str(source)!r}; {advice}")
    return files, weight_map


def _named_by_config(source: Path) -> str | None:
    """What config.json says the weights are called, where it says so and they are there."""
    try:
        text = read_text(source / "config.json", advice=_ADVICE)
        named = json.loads(text).get("transformers_weights")
    # The configuration itself is none of this module's business: a loader will complain.
    except (ValueError, RecursionError, AttributeError):
        return None
    if not isinstance(named, str) or not (source / named).is_file():
        return None
    if Path(named).name != named or not named.endswith((".safetensors", ".safetensors.index.json")):
        raise ValueError(
            f"source must hold its weights in its own folder as *.safetensors, got {named!r} as "
            f"transformers_weights in its config.json; {THROUGH_THE_MODEL}"
        )
    return named


def stored_tensors(source: Path) -> dict[str, StoredTensor]:
    """Tensor name -> where it lies in the files that from_pretrained reads.

    Where two shards hold a name, the index decides.

    Raises:
        ValueError: as `weight_files`; a file that is missing, truncated, foreign or unsound; a name
            in two files without an index that decides.
    """
    files, weight_map = _loaded(source)
    stored: dict[str, StoredTensor] = {}
    for file_name in files:
        for tensor in _read_header(source / file_name):
            if weight_map.get(tensor.name, file_name) != file_name:
                continue
            if tensor.name in stored:
                raise ValueError(
                    f"source must hold each tensor once, got {tensor.name!r} in "
                    f"{stored[tensor.name].file_name!r} and {file_name!r}; remove one of the files"
                )
            stored[tensor.name] = tensor
    return stored


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A `safetensors.safe_open`; the library checks the header and that all bytes are there.

    Raises:
        ValueError: a file that is truncated, foreign or unsound.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as found:
            yield found
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{str(file)!r} must be a whole safetensors file, got a truncated or foreign one "
            f"({error_line(error)}); copy or write it again"
        ) from error


def _read_header(path: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file that is whole."""
    if not path.is_file():
        raise ValueError(
            f"source must hold {path.name!r}, got no such file in {str(path.parent)!r}; "
            "download it too"
        )
    # The library checks offsets and does not tell them.
    with opened(path), open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return [
        StoredTensor(
            name=name,
            file_name=path.name,
            dtype=info["dtype"],
            shape=tuple(info["shape"]),
            offset=8 + length + info["data_offsets"][0],
        )
        for name, info in header.items()
    ]


def _runs(index: Tensor, itemsize: int) -> Iterator[tuple[int, int, int]]:
    """(position in `index`, first element, count) of each stretch of neighbouring elements."""
    most = max(1, _MAX_RUN_BYTES // itemsize)
    is_first = torch.ones_like(index, dtype=torch.bool)
    is_first[1:] = index.diff() != 1
    # Lists: one element of a tensor takes longer to ask for than the read that it is for.
    positions = is_first.nonzero().flatten().tolist()
    elements = index[is_first].tolist()
    ends = [*positions[1:], index.numel()]
    for position, element, end in zip(positions, elements, ends, strict=False):
        for skipped in range(0, end - position, most):
            yield position + skipped, element + skipped, min(end - position - skipped, most)


def read_values(file: BinaryIO, tensor: StoredTensor, index: Tensor) -> Tensor:
    """[M] values of a stored tensor at ascending flat `index`, in its dtype."""
    dtype = DTYPES[tensor.dtype]
    buffer = bytearray(index.numel() * dtype.itemsize)
    for position, first, count in _runs(index, dtype.itemsize):
        file.seek(tensor.offset + first * dtype.itemsize)
        piece = file.read(count * dtype.itemsize)
        if len(piece) != count * dtype.itemsize:
            raise StateError(f"{tensor.file_name} ended early while it was read; try again")
        start = position * dtype.itemsize
        buffer[start : start + len(piece)] = piece
    return torch.frombuffer(buffer, dtype=dtype)
