"""Where tensors stay between two windows: in the device's memory, the host's, or in files."""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fastdean.coupling.resuming.state_files import InFiles, Key, Name, Note
from fastdean.models.available_memory import available_memory
from fastdean.models.model_state import undone
from fastdean.models.trees import compact
from fastdean.wording.mendable import StateError

# Of the memory there is, what stays free: other processes, fragments, what a window was thought
# not to need.
_MARGIN = 0.1
# How often the system is asked how much there is: after a while, or when a share of it was taken.
_SECONDS, _SHARE = 0.5, 16


class Home(Protocol):
    """A key is used again only after `drop`. Tensors come back with their bits and strides."""

    def keep(self, key: Key, tensors: Mapping[Name, Tensor], note: Note | None = None) -> None:
        """Keep tensors; `note()` says in JSON what a later process must know of them."""

    def bring(self, key: Key) -> dict[Name, Tensor]: ...

    def drop(self, key: Key) -> None: ...

    def foresee(self, size: int) -> None:
        """Hear how many bytes will be kept at a time; RuntimeError if there is no room."""

    def used(self) -> dict[str, int]:
        """By the name of a place, the most bytes that were kept there at a time."""


class InMemory:
    """On the device where they were computed, or in the host's memory.

    Args:
        name: "device" or "host".
        budget: the most bytes, or None.
    """

    def __init__(self, name: str, budget: int | None = None) -> None:
        self.name, self.budget = name, budget
        self._kept: dict[Key, dict[Name, tuple[Tensor, torch.device]]] = {}
        self.held_bytes = self.most_bytes = 0
        self._foreseen: int | None = None

    def place(self, device: torch.device) -> torch.device:
        """Where a tensor of this device is kept."""
        return torch.device("cpu") if self.name == "host" else device

    def keep(self, key: Key, tensors: Mapping[Name, Tensor], note: Note | None = None) -> None:
        size = _size(tensors)
        # What comes before anything is foreseen is judged when it is.
        if self._foreseen is not None:
            self._require_room(self.held_bytes + size)
        self._kept[key] = {
            name: (compact(tensor).to(self.place(tensor.device)), tensor.device)
            for name, tensor in tensors.items()
        }
        self.held_bytes += size
        self.most_bytes = max(self.most_bytes, self.held_bytes)

    def bring(self, key: Key) -> dict[Name, Tensor]:
        return {name: tensor.to(device) for name, (tensor, device) in self._kept[key].items()}

    def drop(self, key: Key) -> None:
        gone = self._kept.pop(key, {})
        self.held_bytes -= sum(tensor.nbytes for tensor, _ in gone.values())

    def foresee(self, size: int) -> None:
        """Room is counted as it is taken: what is foreseen may be a little more."""
        self._foreseen = size
        self._require_room(self.held_bytes)

    def _require_room(self, held: int) -> None:
        """StateError, with the whole need, if so many bytes at a time are more than the budget."""
        if self.budget is not None and held > self.budget:
            raise StateError(
                f"states_budget must hold what the layers return with states={self.name!r}, about "
                f"{max(held, self._foreseen or 0):,} bytes, got {self.budget:,}; raise it, or use "
                "states='auto', which goes on in other memory and in files"
            )

    def used(self) -> dict[str, int]:
        return {self.name: self.most_bytes} if self.most_bytes else {}


class Spilling:
    """Memory, one home after the other while there is room, and then files.

    Args:
        homes: whose budgets are kept.
        reserve: bytes that each must leave free for the rest of the job.
    """

    def __init__(self, homes: Sequence[InMemory], files: InFiles, reserve: int) -> None:
        self._homes, self._files, self._reserve = homes, files, reserve
        self._where: dict[Key, Home] = {}
        self._devices: set[torch.device] = set()
        # What the system said, how much was held then, and when.
        self._asked: dict[torch.device, tuple[int | None, int, float]] = {}

    def keep(self, key: Key, tensors: Mapping[Name, Tensor], note: Note | None = None) -> None:
        size = _size(tensors)
        devices = {tensor.device for tensor in tensors.values()}
        self._devices |= devices
        with_room = (
            home
            for home in self._homes
            if all(self._room(home, device) >= size for device in devices)
        )
        home: Home = next(with_room, self._files)
        home.keep(key, tensors)
        self._where[key] = home

    def bring(self, key: Key) -> dict[Name, Tensor]:
        return self._where[key].bring(key)

    def drop(self, key: Key) -> None:
        if key in self._where:
            self._where.pop(key).drop(key)

    def foresee(self, size: int) -> None:
        rooms = [
            home.held_bytes + max((self._room(home, device) for device in self._devices), default=0)
            for home in self._homes
        ]
        self._files.foresee(int(max(0, size - sum(max(0, room) for room in rooms))))

    def used(self) -> dict[str, int]:
        found: dict[str, int] = {}
        places: list[Home] = [*self._homes, self._files]
        for home in places:
            found |= home.used()
        return found

    def _room(self, home: InMemory, device: torch.device) -> float:
        left = float("inf") if home.budget is None else home.budget - home.held_bytes
        there = self._there(home.place(device))
        if there is None:
            return left
        return min(left, (1 - _MARGIN) * there - self._reserve)

    def _there(self, place: torch.device) -> float | None:
        """What is left of the memory of a place. The system is asked now and then: it is slow."""
        held, now = sum(home.held_bytes for home in self._homes), time.monotonic()
        there, before, since = self._asked.get(place, (None, held, -float("inf")))
        taken = max(0, held - before)
        if now - since > _SECONDS or (there is not None and taken > there / _SHARE):
            there, taken = available_memory(place), 0
            self._asked[place] = (there, held, now)
        return None if there is None else there - taken


@contextmanager
def states_home(
    where: str | Path, budget: int | None, device: torch.device, reserve: int
) -> Iterator[Home]:
    """The home that `score(states=..., states_budget=...)` names.

    Args:
        where: "auto", "device", "host", or a folder. It is made where it is not there; what was
            made goes.
        device: where the model computes.
        reserve: bytes of memory that the job takes besides.
    """
    if where in ("device", "host"):
        yield InMemory(str(where), budget)
        return
    automatic = where == "auto"
    parent = Path(tempfile.gettempdir()) if automatic else Path(where).expanduser()
    # Straight into the folder: one of their own would be left behind when the process is killed.
    mark = f"fastdean-{uuid.uuid4().hex}-"
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    files = InFiles(parent, mark)

    def undo() -> None:
        files.close()
        for left in parent.glob(f"{mark}*"):  # where a file that is open keeps its name
            left.unlink(missing_ok=True)
        for above in made:
            with suppress(OSError):  # somebody else has put something there
                above.rmdir()

    with undone(undo):
        if not automatic:
            try:
                parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StateError(
                    f"states must be a folder that can be made and written to, got {str(where)!r}: "
                    f"{error.strerror or error}; choose another"
                ) from error
            yield files
            return
        memory = [InMemory("device", budget)]
        if device.type != "cpu":
            memory.append(InMemory("host", budget))
        yield Spilling(memory, files, reserve)


def _size(tensors: Mapping[Name, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
