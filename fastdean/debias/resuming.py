"""The folder that training writes as it goes, and goes on from.

    checkpoint-000120/     weights, optimizer and regulariser after step 120; the job; the history

A checkpoint appears whole under its own name before the one before it is removed, so that a crash
at any moment leaves at least one. One job owns the checkpoints of a folder; other files in it are
neither read nor changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdean._logging import logger
from fastdean.storage import (
    holds_only,
    is_temporary,
    read_folder,
    remove_folder,
    sweep,
    write_folder,
)

KIND = "training"
_PREFIX = "checkpoint-"


@dataclass(frozen=True)
class Checkpoint:
    """What was stored after a step: `state` as it was given to `save`, and the history."""

    step: int
    state: dict[str, Any]
    history: list[dict[str, Any]]


class Checkpoints:
    """One job's checkpoints.

    Args:
        folder: need not exist.
        job: what tells this training from another, as plain JSON.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any]) -> None:
        self._folder = folder
        self._job = json.loads(json.dumps(job))

    def latest(self, *, resume: bool) -> Checkpoint | None:
        """The last checkpoint of this job, or None where the folder holds none.

        Raises:
            ValueError: the folder is a file, holds checkpoints of another job, or of this one that
                `resume=False` would not go on from; a checkpoint is damaged.
        """
        if self._folder.exists() and not self._folder.is_dir():
            raise ValueError(
                f"out must be a folder, got the file {str(self._folder)!r}; choose another"
            )
        found = self._stored()
        if not found:
            return None
        config, tensors = read_folder(found[-1], kind=KIND)
        differing = [
            key
            for key in {**self._job, **config["job"]}
            if self._job.get(key) != config["job"].get(key)
        ]
        if differing:
            raise ValueError(
                f"out must hold no training or this one unfinished, got {str(self._folder)!r} with "
                f"one that differs in {', '.join(sorted(differing))}; choose another folder, or "
                "start from the same weights with the same arguments"
            )
        if not resume:
            raise ValueError(
                f"out must hold no training for resume=False, got {str(self._folder)!r} with this "
                f"one after step {config['step']}; pass resume=True or choose another folder"
            )
        return Checkpoint(config["step"], _nested(config["state"], tensors), config["history"])

    def save(self, step: int, state: Mapping[str, Any], history: list[dict[str, Any]]) -> None:
        """Store a checkpoint and remove the earlier ones.

        Args:
            state: nested mappings with text keys, of tensors and of JSON values.
        """
        tensors: dict[str, Tensor] = {}
        config = {
            "job": self._job,
            "step": step,
            "state": _without_tensors(state, "", tensors),
            "history": history,
        }
        before = self._stored()
        written = write_folder(
            self._folder / f"{_PREFIX}{step:06d}", config, tensors, kind=KIND, overwrite=True
        )
        for folder in before:
            if folder.resolve() != written:
                remove_folder(folder)
        # Of a checkpoint whose writing or removal a kill cut short.
        for left in self._folder.glob(f".{_PREFIX}*"):
            if is_temporary(left.name):
                sweep(self._folder / left.name[1:].rsplit(".", 2)[0])

    def _stored(self) -> list[Path]:
        """The folders of the checkpoints, the last one last."""
        found = {
            path.name.removeprefix(_PREFIX): path
            for path in self._folder.glob(f"{_PREFIX}*")
            if holds_only(path, KIND)
        }
        steps = sorted((name for name in found if name.isdigit()), key=int)
        return [found[step] for step in steps]


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


def _nested(stored: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    if "tensor" in stored:
        return tensors[stored["tensor"]]
    if "mapping" in stored:
        return {key: _nested(part, tensors) for key, part in stored["mapping"].items()}
    return stored["value"]
