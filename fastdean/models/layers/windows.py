"""The weights of one layer in memory for as long as they are in use, wherever they are else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastdean.models.layers.ahead import Ahead, lane_to
from fastdean.models.layers.outside import head_of, last_stack_begins, tables_of
from fastdean.models.layers.streaming import StreamedModel
from fastdean.models.loading import stream_model
from fastdean.models.model_state import undone


class Windows(Protocol):
    """Bring weights into memory for a while.

    `StreamedModel` does, `ShardedModel` and `OffloadedModel`.
    """

    @property
    def tables(self) -> Mapping[str, nn.Module]:
        """Those of `on_demand` that return the same for a batch as often as they are called."""

    @property
    def on_demand(self) -> Mapping[str, nn.Module]:
        """Name -> module outside of the layers whose weights must be brought before it runs."""

    def layer(self, k: int, then: int) -> AbstractContextManager[None]:
        """In which the weights of layer k are in memory; `then` is the next, or k."""

    def bring(self, name: str) -> None:
        """Have the weights of a module of `on_demand` in memory for as long as it may be used."""

    def close(self) -> None:
        """Let go of all that was brought."""


class InParts(Protocol):
    """A model that is never whole in memory. `StreamedModel` is one, and `ShardedModel`."""

    def outside_layers(self) -> AbstractContextManager[None]:
        """In which the weights outside of the layers are in memory."""

    def beginning(self) -> AbstractContextManager[Mapping[str, str]]:
        """In which the model ends after the first layers of each kind, which are in memory."""


def stream_of(model: Any) -> StreamedModel | None:
    """The streamed model that is given or named; None for a module."""
    if isinstance(model, str | os.PathLike):
        return stream_model(os.fspath(model))
    return model if isinstance(model, StreamedModel) else None


def outside_layers(parts: InParts | None) -> AbstractContextManager[None]:
    """Inside, the weights outside of the layers are in memory; None: of a whole model."""
    return nullcontext() if parts is None else parts.outside_layers()


def beginning(parts: InParts | None) -> AbstractContextManager[Mapping[str, str]]:
    """Inside, the model can be run as a whole; yields which layers stand for which."""
    return nullcontext({}) if parts is None else parts.beginning()


class OffloadedModel:
    """The windows of a model that is in memory, or the parts of it that accelerate offloaded.

    accelerate's own hooks bring a weight in for every call of its module, and let it go after. Here
    tables and head stay as in a `StreamedModel`, other modules outside of the layers once they were
    called.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self._layers = list(layers.values())
        self._stack_begins = last_stack_begins(layers)
        inside = {module for layer in self._layers for module in layer.modules()}
        self.on_demand = {
            name: module
            for name, module in model.named_modules()
            if module not in inside and _offloading(module)
        }
        self.tables = {
            name: module
            for name, module in tables_of(model, layers).items()
            if name in self.on_demand
        }
        self._head = head_of(model, layers)
        self._open: dict[str, ExitStack] = {}
        self._ahead = Ahead(lane_to(_device_of(self._layers)))

    @contextmanager
    def layer(self, k: int, then: int) -> Iterator[None]:
        if k > self._stack_begins:
            self._let_go(self.tables)
        self._let_go(self._head)
        with weights_in(self._layers[k], self._ahead.take(k)):
            if then != k and then < len(self._layers):
                self._ahead.begin(then, _sources(self._layers[then]))
            yield

    def bring(self, name: str) -> None:
        if name not in self._open:
            self._open[name] = stack = ExitStack()
            stack.enter_context(_weights_of([self.on_demand[name]], {}))

    def close(self) -> None:
        self._ahead.close()
        self._let_go(self.on_demand)

    def _let_go(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self._open:
                self._open.pop(name).close()


def resident_layers(layers: Mapping[str, nn.Module]) -> list[str]:
    """The names of layers whose weights are in memory, offloaded by nobody."""
    return [
        name
        for name, layer in layers.items()
        if not any(weight.is_meta for weight in layer.parameters())
    ]


def weights_in(
    layer: nn.Module, there: Mapping[str, Tensor] | None = None
) -> AbstractContextManager[None]:
    """Inside, weights that accelerate offloaded are on their device, brought in once.

    A layer without offloaded weights stays as it is.

    Args:
        there: those that are on the device already, as `_sources` names them.
    """
    return _weights_of(list(layer.modules()), there or {})


@contextmanager
def _weights_of(modules: Sequence[nn.Module], there: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the modules' own offloaded weights are on their device."""
    offloaded = [(module, hook) for module in modules for hook in _offloading(module)]

    def undo() -> None:
        for module, hook in offloaded:
            hook.offload = True
            hook.post_forward(module, None)

    with undone(undo):
        for number, (module, hook) in enumerate(offloaded):
            with _taken_from(hook, number, there):
                hook.pre_forward(module)
            # Inputs are still sent to the device; weights are left alone.
            hook.offload = False
        yield


def _offloading(module: nn.Module) -> list[Any]:
    """The hooks of a module that offload its own weights."""
    hook = getattr(module, "_hf_hook", None)
    # Several hooks of one module stand in a hook of their own.
    return [each for each in getattr(hook, "hooks", (hook,)) if getattr(each, "offload", False)]


def _device_of(layers: Iterable[nn.Module]) -> torch.device:
    """Where offloaded layers compute; the CPU where nothing is offloaded, or to several devices."""
    devices = {
        torch.device(hook.execution_device)
        for layer in layers
        for module in layer.modules()
        for hook in _offloading(module)
    }
    return devices.pop() if len(devices) == 1 else torch.device("cpu")


def _sources(layer: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """What gives each offloaded weight, by the number of its hook and its name there."""
    offloaded = [hook for module in layer.modules() for hook in _offloading(module)]
    names = [
        [name for name, weight in module.named_parameters(recurse=False) if weight.is_meta]
        for module in layer.modules()
        for _ in _offloading(module)
    ]
    return {
        f"{number} {name}": partial(hook.weights_map.__getitem__, name)
        for number, hook in enumerate(offloaded)
        for name in names[number]
    }


class _Taken(dict):
    """Weights that are on the device already, and the others from where they are."""

    def __init__(self, there: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
        super().__init__(there)
        self._others = others

    def __missing__(self, name: str) -> Tensor:
        return self._others[name]


@contextmanager
def _taken_from(hook: Any, number: int, there: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, accelerate's hook finds the weights of its module among those of `there`."""
    others = hook.weights_map
    mine = {
        name.partition(" ")[2]: tensor
        for name, tensor in there.items()
        if name.startswith(f"{number} ")
    }

    def undo() -> None:
        hook.weights_map = others

    with undone(undo):
        if mine:
            hook.weights_map = _Taken(mine, others)
        yield
