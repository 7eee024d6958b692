"""An edit that was made once, ready to be made again while the model stays as it was.

What is kept of a model are the names on the way to its parameters, and what `ops.Replacement` keeps
of tensors; never a module, a parameter or memory of theirs. Everything is found, read and compared
anew on every call. Names cost less than `named_parameters`, which lists the whole model.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from fastdean import ops
from fastdean.masks.weights import Part, Weights
from fastdean.ops._dispatch import ENVIRONMENT_VARIABLE


class PreparedEdit:
    """See `prepare`."""

    def __init__(self, parts: list[Part], paths: _Paths, replacement: ops.Replacement) -> None:
        self.parts = parts
        self.find = paths.find
        self.replace_ = replacement.replace_


class PreparedEdits:
    """The prepared edits of one model, each for as long as its mask lives."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[weakref.ref, tuple, PreparedEdit]] = {}

    def get(self, mask: Any, impl: str | None) -> PreparedEdit | None:
        """What was kept for this very mask and the same choice of implementation."""
        kept = self._kept.get(id(mask))
        if kept is None or kept[0]() is not mask or kept[1] != _asked(impl):
            return None
        return kept[2]

    def keep(self, mask: Any, prepared: PreparedEdit | None, impl: str | None) -> None:
        """Replaces what was kept for the mask; None: nothing is kept."""
        kept, key = self._kept, id(mask)
        kept.pop(key, None)
        if prepared is not None:
            kept[key] = (weakref.ref(mask, lambda _: kept.pop(key, None)), _asked(impl), prepared)


def prepare(
    root: nn.Module,
    weights: Weights,
    parts: list[Part],
    names: Iterable[str],
    impl: str | None,
) -> PreparedEdit | None:
    """Prepare writing `written` over `previous`, and back.

    Args:
        parts: as they are to be edited, each place of memory once.
        names: of all parameters that the mask has; those that have no part of their own are other
            names of one that has, and must stay it.
    Returns:
        None where the extension does not edit all of them, or a model hides its parameters.
    """
    edited = {part.name for part in parts}
    everyone = [*parts, *(_unedited(name, weights) for name in names if name not in edited)]
    paths = _Paths([weights.path(part.name) for part in everyone])
    tensors = [weights.parameter(part.name) for part in everyone]
    found = paths.find(root)
    if found is None or any(a is not b for a, b in zip(found, tensors, strict=True)):
        return None
    replacement = ops.prepare_replacement(
        tensors,
        [part.index for part in everyone],
        [part.previous for part in everyone],
        [part.written for part in everyone],
        impl=impl,
    )
    return None if replacement is None else PreparedEdit(parts, paths, replacement)


def _unedited(name: str, weights: Weights) -> Part:
    parameter = weights.parameter(name)
    nothing = torch.empty(0, dtype=parameter.dtype)
    index = torch.empty(0, dtype=torch.int64)
    return Part(name, tuple(parameter.shape), index, nothing, nothing)


def _asked(impl: str | None) -> tuple[str | None, str | None]:
    return impl, os.environ.get(ENVIRONMENT_VARIABLE)


class _Paths:
    """Ways through the tree of modules to parameters, each shared part gone once."""

    def __init__(self, paths: Sequence[str]) -> None:
        children: dict[str, dict[str, str]] = {"": {}}
        for path in paths:
            *steps, _ = path.split(".")
            for depth, step in enumerate(steps):
                here = ".".join(steps[: depth + 1])
                children.setdefault(here, {})
                children[".".join(steps[:depth])][step] = here
        numbers = {"": 0}
        # (number of a module, what takes these of its children, how many).
        self._steps: list[tuple[int, itemgetter, int]] = []
        waiting = [""]
        for here in waiting:
            if children[here]:
                step = (numbers[here], itemgetter(*children[here]), len(children[here]))
                self._steps.append(step)
            for child in children[here].values():
                numbers[child] = len(numbers)
                waiting.append(child)
        # (number of the owner, name) of each parameter.
        self._parameters = [
            (numbers[owner], name) for owner, _, name in (path.rpartition(".") for path in paths)
        ]

    def find(self, root: nn.Module) -> list[Tensor] | None:
        """The parameters there now, or None if a way ends."""
        modules = [root]
        try:
            for number, take, count in self._steps:
                taken = take(modules[number]._modules)
                modules += taken if count > 1 else (taken,)
            return [modules[number]._parameters[name] for number, name in self._parameters]
        except (AttributeError, KeyError):
            return None
