"""What every layer returned for every batch, and the gradients of it, while a sweep needs them.

In memory, or in files: a layer's states then take T x hidden numbers of a file, and memory holds
those of one batch.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Protocol

import torch
from torch import Tensor

from fastdean.models.model_state import undone
from fastdean.models.replay import Returned
from fastdean.models.trees import Path


class Home(Protocol):
    """Where tensors stay between two windows; a key is used again only after `drop`."""

    def keep(self, key: tuple, tensors: Mapping[Path, Tensor]) -> None: ...

    def bring(self, key: tuple) -> dict[Path, Tensor]: ...

    def drop(self, key: tuple) -> None: ...


class InMemory:
    """On the device where they were computed, or in the host's memory.

    Args:
        host: move them to the CPU, and back to their device when they are needed.
    """

    def __init__(self, host: bool = False) -> None:
        self._host = host
        self._kept: dict[tuple, dict[Path, tuple[Tensor, torch.device]]] = {}

    def keep(self, key: tuple, tensors: Mapping[Path, Tensor]) -> None:
        self._kept[key] = {
            path: (tensor.cpu() if self._host else tensor, tensor.device)
            for path, tensor in tensors.items()
        }

    def bring(self, key: tuple) -> dict[Path, Tensor]:
        return {path: tensor.to(device) for path, (tensor, device) in self._kept[key].items()}

    def drop(self, key: tuple) -> None:
        self._kept.pop(key, None)


@dataclass(frozen=True)
class _InFile:
    dtype: torch.dtype
    shape: torch.Size
    device: torch.device
    offset: int
    size: int


class InFiles:
    """In one file per layer and kind.

    Args:
        folder: an empty one, with room for them.
    """

    def __init__(self, folder: FilePath) -> None:
        self._folder = folder
        self._files: dict[tuple, int] = {}
        # By layer and kind, then by batch: when the last batch goes, so does the file.
        self._kept: dict[tuple, dict[int, dict[Path, _InFile]]] = {}

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def keep(self, key: tuple, tensors: Mapping[Path, Tensor]) -> None:
        file = self._file(key)
        offset = os.lseek(file, 0, os.SEEK_END)
        places = {}
        for path, tensor in tensors.items():
            content = _bytes(tensor)
            _write(file, content)
            places[path] = _InFile(tensor.dtype, tensor.shape, tensor.device, offset, len(content))
            offset += len(content)
        self._kept.setdefault(key[:-1], {})[key[-1]] = places

    def bring(self, key: tuple) -> dict[Path, Tensor]:
        file = self._file(key)
        found = {}
        for path, place in self._kept[key[:-1]][key[-1]].items():
            content = torch.empty(place.size, dtype=torch.uint8)
            _read(file, memoryview(content.numpy().data), place.offset)
            found[path] = content.view(place.dtype).view(place.shape).to(place.device)
        return found

    def drop(self, key: tuple) -> None:
        """The file goes with the last batch of a layer."""
        of_layer = self._kept.get(key[:-1], {})
        if of_layer.pop(key[-1], None) is not None and not of_layer:
            os.close(self._files.pop(key[:-1]))
            self._path(key).unlink()

    def _path(self, key: tuple) -> FilePath:
        return self._folder / "-".join(map(str, key[:-1]))

    def _file(self, key: tuple) -> int:
        of_layer = key[:-1]
        if of_layer not in self._files:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
            self._files[of_layer] = os.open(self._path(key), flags, 0o600)
        return self._files[of_layer]


@dataclass
class States:
    """By layer and batch: what a layer returned, and the gradient of the loss in it."""

    home: Home
    # With tensors of no content in their places: the shapes alone.
    _shapes: dict[tuple[int, int], Returned] = field(default_factory=dict)
    _graded: set[tuple[int, int]] = field(default_factory=set)

    def keep(self, layer: int, batch: int, returned: Returned) -> None:
        found = returned.tensors()
        self.home.keep(("state", layer, batch), found)
        blank = {path: torch.empty_like(tensor, device="meta") for path, tensor in found.items()}
        self._shapes[layer, batch] = returned.replaced(blank)

    def returned(self, layer: int, batch: int) -> Returned:
        return self._shapes[layer, batch].replaced(self.home.bring(("state", layer, batch)))

    def shapes(self, layer: int, batch: int) -> Returned:
        """What the layer returned, its tensors on the meta device."""
        return self._shapes[layer, batch]

    def add_gradients(self, layer: int, batch: int, gradients: Mapping[Path, Tensor]) -> None:
        """Add to the gradients of some of the tensors; those of no gradient yet start at it."""
        key = ("gradient", layer, batch)
        if not gradients:
            return
        total = dict(gradients)
        if (layer, batch) in self._graded:
            for path, before in self.home.bring(key).items():
                total[path] = before + total[path] if path in total else before
            self.home.drop(key)
        self.home.keep(key, total)
        self._graded.add((layer, batch))

    def gradients(self, layer: int, batch: int) -> dict[Path, Tensor]:
        if (layer, batch) not in self._graded:
            return {}
        return self.home.bring(("gradient", layer, batch))

    def drop(self, layer: int, batch: int) -> None:
        self.home.drop(("state", layer, batch))
        self.home.drop(("gradient", layer, batch))
        self._graded.discard((layer, batch))
        self._shapes.pop((layer, batch), None)


@contextmanager
def states_home(where: str | FilePath) -> Iterator[Home]:
    """The home that `score(states=...)` names.

    Args:
        where: "device", "host", or a folder. It is made where it is not there; what was made goes.
    """
    if where in ("device", "host"):
        yield InMemory(host=where == "host")
        return
    folder = FilePath(where).expanduser() / f"states-{uuid.uuid4().hex}"
    made = [parent for parent in folder.parents if not parent.exists()]
    files = InFiles(folder)

    def undo() -> None:
        files.close()
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # somebody else has put something there
                parent.rmdir()

    with undone(undo):
        folder.mkdir(parents=True)
        yield files


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data


def _write(file: int, content: memoryview) -> None:
    while content:
        content = content[os.write(file, content) :]


def _read(file: int, into: memoryview, offset: int) -> None:
    while into:
        got = os.preadv(file, [into], offset)
        if got == 0:
            raise OSError("a file of states ended early; it must stay as it is during a job")
        into, offset = into[got:], offset + got
