"""The checkpoints of a training, from which it goes on.

    checkpoint-000120/     weights, optimizer and regulariser after step 120; the job; the history

A checkpoint appears whole or not at all. The one before it stays until a third is written, so that
training can go on from it where the last is damaged; at the end only the last stays. This takes
disk space for three, each about three times the model (weights and AdamW's two moments). One job
owns the checkpoints of a folder; other files in it are neither read nor changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdean.files.declared import (
    Anything,
    Either,
    Kind,
    Lists,
    Maps,
    Maybe,
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


def _part(levels: int) -> Kind:
    """A part of the state: {"tensor": its name}, {"value": JSON} or {"mapping": parts by key}."""
    kinds: list[Kind] = [Record({"tensor": Text(longest=1000)}), Record({"value": Anything()})]
    if levels:
        kinds.append(Record({"mapping": Maps(_part(levels - 1))}))
    return Either(tuple(kinds))


_HISTORY = Record(
    {"step": Whole(least=1), "loss": Real(), "base": Real(), "collapse": Maybe(Real())},
    optional={"learning_rate": Real(), "eval": Maps(Anything())},
)
# Written by `Checkpoints.save`.
_CONFIG = Record(
    {
        "job": Maps(Anything()),
        "step": Whole(least=1),
        "state": _part(levels=8),
        "history": Lists(_HISTORY, least=1),
    }
)


@dataclass(frozen=True)
class Checkpoint:
    """A training after a step: `state` is that given to `save`."""

    job: dict[str, Any]
    step: int
    state: dict[str, Any]
    history: list[dict[str, Any]]
    folder: Path


class Checkpoints:
    """One job's checkpoints.

    Args:
        folder: need not exist.
        job: the training's arguments and digests, as plain JSON; another training has others.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any]) -> None:
        self._folder = folder
        self._job = json.loads(json.dumps(job))
        self._damaged: dict[Path, Unfit] = {}

    def restore(self, take: Callable[[Checkpoint], None], *, resume: bool) -> Checkpoint | None:
        """Give the last checkpoint that is not damaged to `take`, and return it, or None.

        A line of the log names a later one that is damaged.

        Args:
            take: restores the state; for a damaged one it raises `Unfit` and changes nothing.
        Raises:
            ValueError: the folder is a file, or holds checkpoints of another job, of this one with
                `resume=False`, or damaged ones only.
        """
        if self._folder.exists() and not self._folder.is_dir():
            raise ValueError(
                f"out must be a folder, got the file {str(self._folder)!r}; choose another"
            )
        self._damaged = {}
        for folder in reversed(self._stored()):
            try:
                found = self._read(folder)
                self._require_own(found)
                if not resume:
                    raise ValueError(
                        "out must hold no training for resume=False, got "
                        f"{str(self._folder)!r} with this one after step {found.step}; "
                        "pass resume=True or choose another folder"
                    )
                take(found)
            except Unfit as error:
                self._damaged[folder] = error
                continue
            if self._damaged:
                last, reason = next(iter(self._damaged.items()))
                said = "%s is damaged, training goes on from the one before: %s"
                logger.warning(said, last.name, reason)
            return found
        if self._damaged:
            raise next(iter(self._damaged.values()))
        return None

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        history: list[dict[str, Any]],
        *,
        last: bool = False,
    ) -> None:
        """Write a checkpoint and remove the earlier ones, but for the one before it.

        Args:
            state: nested mappings with text keys, of tensors and of JSON values.
            last: the training ends here: remove the one before too.
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
            # Writing replaces whole checkpoints only.
            del self._damaged[place]
            remove_folder(place)
        before = [folder for folder in self._stored() if folder not in self._damaged]
        written = write_folder(place, config, tensors, kind=KIND, overwrite=True)
        others = [folder for folder in before if folder.resolve() != written]
        self._remove([*self._damaged, *(others if last else others[:-1])])

    def keep_only(self, checkpoint: Checkpoint) -> None:
        """Remove all other checkpoints."""
        self._remove([folder for folder in self._stored() if folder != checkpoint.folder])

    def _remove(self, folders: Iterable[Path]) -> None:
        for folder in folders:
            remove_folder(folder)
        self._damaged = {}
        # Left by a kill while a checkpoint was written or removed.
        for left in self._folder.glob(f".{_PREFIX}*"):
            if is_temporary(left.name):
                sweep(self._folder / left.name[1:].rsplit(".", 2)[0])

    def _stored(self) -> list[Path]:
        """The folders of the checkpoints by step, damaged ones too."""
        found = [path for path in self._folder.glob(f"{_PREFIX}*") if _is_checkpoint(path)]
        return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)))

    def _read(self, folder: Path) -> Checkpoint:
        """Raises `Unfit` for a damaged checkpoint."""
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
        return Checkpoint(config["job"], step, state, history, folder)

    def _require_own(self, found: Checkpoint) -> None:
        differing = [
            key for key in {**self._job, **found.job} if self._job.get(key) != found.job.get(key)
        ]
        if differing:
            raise ValueError(
                f"out must hold no training or this one unfinished, got {str(self._folder)!r} with "
                f"one that differs in {', '.join(sorted(differing))}; choose another folder, or "
                "start from the same weights with the same arguments"
            )


def _is_checkpoint(path: Path) -> bool:
    """Whether all files in `path` have the names of a checkpoint's; it may be damaged."""
    number = path.name.removeprefix(_PREFIX)
    if not (number.isascii() and number.isdigit() and path.is_dir()):
        return False
    names = [entry.name for entry in path.iterdir()]
    return bool(names) and all(is_ours(name, KIND) for name in names)


def announce(folder: Path, step: int, steps: int) -> None:
    """Log that training goes on from a checkpoint."""
    where = f"the checkpoint of step {step} of {steps} in {str(folder)!r}"
    if step == steps:
        logger.warning("training was finished already: weights and history are those of %s", where)
    else:
        logger.warning("training resumes from %s", where)


def _without_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON; its tensors go into `tensors`, each under its path."""
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
    """The inverse of `_without_tensors`; removes from `tensors` those it uses."""
    if "tensor" in stored:
        if stored["tensor"] not in tensors:
            expected = f"the tensor {stored['tensor']!r}"
            raise unfit(file, "state", expected, "no such tensor", _ADVICE)
        return tensors.pop(stored["tensor"])
    if "mapping" in stored:
        return {key: _nested(part, tensors, file) for key, part in stored["mapping"].items()}
    return stored["value"]
