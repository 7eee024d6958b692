"""An edit that was made once, ready to be made again while the model stays as it was.

What is kept of a model are the names on the way to its parameters, and what `ops.Replacement` keeps
of tensors; never a module, a parameter or memory of theirs. Everything is found, read and compared
anew on every call. Names cost less than `named_parameters`, which lists the whole model.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, itemgetter
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
    everyone = [everyone[position] for position in paths.order]
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
    nothing = torch.empty(0, dtype=parameter.dtype, device="cpu")
    index = torch.empty(0, dtype=torch.int64, device="cpu")
    return Part(name, tuple(parameter.shape), index, nothing, nothing)


def _asked(impl: str | None) -> tuple[str | None, str | None]:
    return impl, os.environ.get(ENVIRONMENT_VARIABLE)


_modules_of = attrgetter("_modules")
_parameters_of = attrgetter("_parameters")


class _Paths:
    """Ways through the tree of modules to parameters, gone level by level.

    In a model of equal layers one step takes a whole level, without a loop in Python.

    Args:
        paths: names of parameters as in `named_parameters`, each once.
    Attributes:
        order: positions in `paths`, in the order in which `find` returns the parameters.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.order: list[int] = []
        # Per level: what is taken of the parameters of its modules, and of their children.
        self._levels: list[tuple[list[_Step], list[_Step]]] = []
        numbers = {path: number for number, path in enumerate(paths)}
        level = [_Node.of(paths)]
        while level:
            parameters = _steps([node.parameters for node in level])
            children = _steps([tuple(node.children) for node in level])
            self._levels.append((parameters, children))
            for step in parameters:
                found = (f"{level[n].prefix}{name}" for n in step.positions for name in step.names)
                self.order += (numbers[path] for path in found)
            level = [
                level[n].children[name]
                for step in children
                for n in step.positions
                for name in step.names
            ]

    def find(self, root: nn.Module) -> list[Tensor] | None:
        """The parameters there now, in `order`, or None if a way ends."""
        modules, found = [root], []
        try:
            for parameters, children in self._levels:
                for step in parameters:
                    found += step.take(_parameters_of, modules)
                below: list[nn.Module] = []
                for step in children:
                    below += step.take(_modules_of, modules)
                modules = below
        except (AttributeError, KeyError):
            return None
        return found


@dataclass(frozen=True)
class _Node:
    """A module on the way: what it is called, its parameters and its children that are wanted."""

    prefix: str
    parameters: tuple[str, ...]
    children: dict[str, _Node]

    @classmethod
    def of(cls, paths: Iterable[str], prefix: str = "") -> _Node:
        own, below = [], {}
        for path in paths:
            name, dot, rest = path.partition(".")
            if dot:
                below.setdefault(name, []).append(rest)
            else:
                own.append(name)
        children = {name: cls.of(inside, f"{prefix}{name}.") for name, inside in below.items()}
        return cls(prefix, tuple(own), children)


class _Step:
    """The same names of several modules of a level.

    Args:
        positions: of the modules, among `size` of the level.
    """

    def __init__(self, positions: list[int], names: tuple[str, ...], size: int) -> None:
        self.positions, self.names = positions, names
        self._all = positions == list(range(size))
        self._take = itemgetter(*names)
        self._one = len(names) == 1

    def take(self, dictionary_of: attrgetter, modules: Sequence[nn.Module]) -> Iterable[Any]:
        """What is under the names, module after module."""
        chosen = modules if self._all else [modules[position] for position in self.positions]
        taken = map(self._take, map(dictionary_of, chosen))
        return taken if self._one else chain.from_iterable(taken)


def _steps(names_of_level: Sequence[tuple[str, ...]]) -> list[_Step]:
    """One step for all modules of a level of which the same names are wanted."""
    positions: dict[tuple[str, ...], list[int]] = {}
    for position, names in enumerate(names_of_level):
        if names:
            positions.setdefault(names, []).append(position)
    return [_Step(each, names, len(names_of_level)) for names, each in positions.items()]
