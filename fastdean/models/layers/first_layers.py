"""A model that ends after its first layers, one of each kind at least.

What a model does with its tokens, and what hooks see of its layers, is measured on these, where no
more of its weights are to be in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from fastdean.models.model_state import undone


class ScatteredLayersError(ValueError):
    """Layers lie otherwise than in a list of their own; the text names one of them."""


def first_of_their_kind(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """The name of each layer -> that of the first one that computes alike."""
    first: dict[Any, str] = {}
    return {name: first.setdefault(_kind(layer), name) for name, layer in layers.items()}


@contextmanager
def ending_behind(
    model: nn.Module, layers: Mapping[str, nn.Module], needed: Collection[str]
) -> Iterator[list[str]]:
    """Inside, each stack of the model ends behind the last of its `needed` layers, or the first.

    Yields:
        The names of the layers that are left, in the order of the stacks.
    """
    left = []
    with ExitStack() as cut:
        for stack, names in stacks_of(model, layers):
            last = max((i for i, name in enumerate(names) if name in needed), default=0)
            left += names[: last + 1]
            cut.enter_context(_shortened(stack, last + 1))
        yield left


def stacks_of(
    model: nn.Module, layers: Mapping[str, nn.Module]
) -> list[tuple[nn.ModuleList, list[str]]]:
    """The lists that the layers lie in, with the names of their layers in order.

    Raises:
        ScatteredLayersError: the layers lie in lists of other lists.
    """
    stacks: dict[str, list[str]] = {}
    for name in layers:
        stacks.setdefault(name.rpartition(".")[0], []).append(name)
    found = []
    for path, names in stacks.items():
        stack = model.get_submodule(path)
        if not isinstance(stack, nn.ModuleList) or len(stack) != len(names):
            raise ScatteredLayersError(f"{names[0]} in {type(stack).__name__}")
        found.append((stack, names))
    return found


def _kind(layer: nn.Module) -> tuple:
    """What layers that compute alike have in common: modules, shapes and options by name."""
    found: list[Any] = []
    for path, module in layer.named_modules():
        options = sorted(
            (name, value if isinstance(value, bool | str) else type(value).__name__)
            for name, value in vars(module).items()
            if not name.startswith("_") and name != "training"
        )
        shapes = [(n, tuple(p.shape)) for n, p in module.named_parameters(recurse=False)]
        found.append((path, type(module), *options, *shapes))
    return tuple(found)


@contextmanager
def _shortened(stack: nn.ModuleList, length: int) -> Iterator[None]:
    whole = stack._modules

    def undo() -> None:
        # One assignment, so that no interrupt leaves a part.
        vars(stack)["_modules"] = whole

    with undone(undo):
        vars(stack)["_modules"] = {key: whole[key] for key in list(whole)[:length]}
        yield
