"""The folder that training writes as it goes, and goes on from.

    checkpoint-000120/     weights, optimizer and regulariser after step 120; the job; the history

A checkpoint appears whole under its own name, and the one before it is kept beside it until a third
is written: where the last is damaged, training goes on from the one before. While it runs this
takes room for three, each about three times the model (weights and AdamW's two moments); the last
save leaves its own alone. One job owns the checkpoints of a folder; other files in it are neither
read nor changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdean.files.declared import (
    Anything,
    Kind,
    Lists,
    Maps,
    Maybe,
    Misfit,
    Real,
    Record,
    Text,
    Unfit,
    Whole,
    require,
    unfit,
)
from fastdean.files.inventory import is_ours
from fastdean.files.storage import (
    CONFIG_NAME,
    is_temporary,
    read_folder,
    remove_folder,
    sweep,
    write_folder,
)
from fastdean.wording.log import logger

KIND = "training"
_PREFIX = "checkpoint-"
_ADVICE = "remove this checkpoint to start again"


@dataclass(frozen=True)
class _Node:
    """A part of the state: {"tensor": its name}, {"mapping": parts by key} or {"value": JSON}."""

    deepest: int = 8

    def check(self, value: Any, where: str) -> None:
        if not isinstance(value, Mapping) or len(value) != 1:
            raise Misfit(
                where, "an object of tensor, mapping or value", f"a {type(value).__name__}"
            )
        if self.deepest == 0:
            raise Misfit(where, "a state of few levels", "a deeper one")
        kinds: dict[str, Kind] = {
            "tensor": Text(longest=1000),
            "mapping": Maps(_Node(self.deepest - 1)),
            "value": Anything(),
        }
        Record(optional=kinds).check(value, where)


_HISTORY = Record(
    {"step": Whole(least=1), "loss": Real(), "base": Real(), "collapse": Maybe(Real())},
    optional={"learning_rate": Real(), "eval": Maps(Anything())},
)
# What `Checkpoints.save` writes.
_CONFIG = Record(
    {
        "job": Maps(Anything()),
        "step": Whole(least=1),
        "state": _Node(),
        "history": Lists(_HISTORY, least=1),
    }
)


@dataclass(frozen=True)
class Checkpoint:
    """What was stored after a step: `state` as it was given to `save`, and the history."""

    step: int
    state: dict[str, Any]
    history: list[dict[str, Any]]
    folder: Path = field(compare=False)


class Checkpoints:
    """One job's checkpoints.

    Args:
        folder: need not exist.
        job: what tells this training from another, as plain JSON.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any]) -> None:
        self._folder = folder
        self._job = json.loads(json.dumps(job))
        self._damaged: list[Path] = []

    def restore(self, take: Callable[[Checkpoint], None], *, resume: bool) -> Checkpoint | None:
        """Hand the last checkpoint of this job that is not damaged to `take`, and return it.

        Where a later one is damaged, one line of the log says so. None where the folder holds none.

        Args:
            take: takes the state over; raises `Unfit`, and takes nothing, where it is damaged.
        Raises:
            ValueError: the folder is a file, holds checkpoints of another job, or of this one that
                `resume=False` would not go on from; all checkpoints are damaged.
        """
        if self._folder.exists() and not self._folder.is_dir():
            raise ValueError(
                f"out must be a folder, got the file {str(self._folder)!r}; choose another"
            )
        self._damaged = []
        reasons: list[Unfit] = []
        for folder in reversed(self._stored()):
            try:
                found = self._read(folder)
                self._require_own(found)
                if not resume:
                    raise ValueError(
                        "out must hold no training for resume=False, got "
                        f"{str(self._folder)!r} with this one after step {found.checkpoint.step}; "
                        "pass resume=True or choose another folder"
                    )
                take(found.checkpoint)
            except Unfit as reason:
                self._damaged.append(folder)
                reasons.append(reason)
                continue
            if reasons:
                logger.warning(
                    "%s is damaged, training goes on from the one before: %s",
                    self._damaged[0].name,
                    reasons[0],
                )
            return found.checkpoint
        if reasons:
            raise reasons[0]
        return None

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        history: list[dict[str, Any]],
        *,
        last: bool = False,
    ) -> None:
        """Store a checkpoint and remove the earlier ones, but for the one before it.

        Args:
            state: nested mappings with text keys, of tensors and of JSON values.
            last: the training ends here; no earlier one is kept.
        """
        tensors: dict[str, Tensor] = {}
        config = {
            "job": self._job,
            "step": step,
            "state": _without_tensors(state, "", tensors),
            "history": history,
        }
        place = self._folder / f"{_PREFIX}{step:06d}"
        if place in self._damaged:
            # Nothing else would make room for it: it may not even say any more whose it is.
            self._damaged.remove(place)
            remove_folder(place)
        before = [folder for folder in self._stored() if folder not in self._damaged]
        written = write_folder(place, config, tensors, kind=KIND, overwrite=True)
        others = [folder for folder in before if folder.resolve() != written]
        self._remove([*self._damaged, *(others if last else others[:-1])])

    def keep_only(self, checkpoint: Checkpoint) -> None:
        """Remove the other checkpoints of a training that was finished already."""
        self._remove([folder for folder in self._stored() if folder != checkpoint.folder])

    def _remove(self, folders: Iterable[Path]) -> None:
        for folder in folders:
            remove_folder(folder)
        self._damaged = []
        # Of a checkpoint whose writing or removal a kill cut short.
        for left in self._folder.glob(f".{_PREFIX}*"):
            if is_temporary(left.name):
                sweep(self._folder / left.name[1:].rsplit(".", 2)[0])

    def _stored(self) -> list[Path]:
        """The folders of the checkpoints, the last one last; whole or not."""
        found = [path for path in self._folder.glob(f"{_PREFIX}*") if _is_checkpoint(path)]
        return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)))

    def _read(self, folder: Path) -> _Read:
        """Raises `Unfit` for a checkpoint that is damaged."""
        file = folder / CONFIG_NAME
        try:
            config, tensors = read_folder(folder, kind=KIND)
        except ValueError as error:
            raise Unfit(str(error)) from error
        require(config, _CONFIG, file, advice=_ADVICE)
        step, history = config["step"], config["history"]
        if [entry["step"] for entry in history] != list(range(1, len(history) + 1)):
            raise unfit(file, "history", "steps from 1 on", "others", _ADVICE)
        if len(history) != step:
            raise unfit(file, "history", f"{step} steps", f"{len(history)}", _ADVICE)
        left = dict(tensors)
        state = _nested(config["state"], left, file)
        if left or not isinstance(state, dict):
            raise unfit(file, "state", "all tensors of the folder", "fewer", _ADVICE)
        return _Read(config["job"], Checkpoint(step, state, history, folder))

    def _require_own(self, found: _Read) -> None:
        differing = [
            key for key in {**self._job, **found.job} if self._job.get(key) != found.job.get(key)
        ]
        if differing:
            raise ValueError(
                f"out must hold no training or this one unfinished, got {str(self._folder)!r} with "
                f"one that differs in {', '.join(sorted(differing))}; choose another folder, or "
                "start from the same weights with the same arguments"
            )


@dataclass(frozen=True)
class _Read:
    job: dict[str, Any]
    checkpoint: Checkpoint


def _is_checkpoint(path: Path) -> bool:
    """Whether `path` is a checkpoint of ours, by the names of the files in it, damaged or not."""
    number = path.name.removeprefix(_PREFIX)
    if not (number.isascii() and number.isdigit() and path.is_dir()):
        return False
    names = [entry.name for entry in path.iterdir()]
    return bool(names) and all(is_ours(name, KIND) for name in names)


def announce(folder: Path, step: int, steps: int) -> None:
    """Say that training goes on from a checkpoint instead of starting."""
    where = f"the checkpoint of step {step} of {steps} in {str(folder)!r}"
    if step == steps:
        logger.warning("training was finished already: weights and history are those of %s", where)
    else:
        logger.warning("training resumes from %s", where)


def _without_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` with each tensor put into `tensors` under its path and its place marked."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, Mapping):
        inner = {
            str(key): _without_tensors(part, f"{path}/{key}" if path else str(key), tensors)
            for key, part in value.items()
        }
        return {"mapping": inner}
    return {"value": value}


def _nested(stored: Mapping[str, Any], tensors: dict[str, Tensor], file: Path) -> Any:
    """The state that `_without_tensors` took apart; its tensors are taken out of `tensors`."""
    if "tensor" in stored:
        if stored["tensor"] not in tensors:
            expected = f"the tensor {stored['tensor']!r}"
            raise unfit(file, "state", expected, "no such tensor", _ADVICE)
        return tensors.pop(stored["tensor"])
    if "mapping" in stored:
        return {key: _nested(part, tensors, file) for key, part in stored["mapping"].items()}
    return stored["value"]
