"""The weights of one layer in memory for as long as they are in use, wherever they are else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn

from fastdean.models.loading import stream_model
from fastdean.models.model_state import undone
from fastdean.models.streaming import StreamedModel

# (layer, the one after it) -> a context in which the layer's weights are in memory.
Windows = Callable[[int, int], AbstractContextManager[None]]


def stream_of(model: Any) -> StreamedModel | None:
    """The streamed model that is given or named; None for a module."""
    if isinstance(model, str | os.PathLike):
        return stream_model(os.fspath(model))
    return model if isinstance(model, StreamedModel) else None


def outside_layers(stream: StreamedModel | None) -> AbstractContextManager[None]:
    """Inside, the weights outside of the layers are in memory."""
    return nullcontext() if stream is None else stream.outside_layers()


def beginning(stream: StreamedModel | None) -> AbstractContextManager[Mapping[str, str]]:
    """Inside, the model can be run as a whole; yields which layers stand for which."""
    return nullcontext({}) if stream is None else stream.beginning()


def resident_windows(layers: Mapping[str, nn.Module]) -> Windows:
    """The windows of a model that is in memory or offloaded by accelerate."""
    modules = list(layers.values())
    return lambda k, then: weights_in(modules[k])


def resident_layers(layers: Mapping[str, nn.Module]) -> list[str]:
    """The names of layers whose weights are in memory, offloaded by nobody."""
    return [
        name
        for name, layer in layers.items()
        if not any(weight.is_meta for weight in layer.parameters())
    ]


@contextmanager
def weights_in(layer: nn.Module) -> Iterator[None]:
    """Inside, weights that accelerate offloaded are on their device, brought in once.

    accelerate's own hooks bring a weight in for every call of its module, and let it go after. A
    layer without offloaded weights stays as it is.
    """
    offloaded = [(module, hook) for module in layer.modules() for hook in _offloading(module)]

    def undo() -> None:
        for module, hook in offloaded:
            hook.offload = True
            hook.post_forward(module, None)

    with undone(undo):
        for module, hook in offloaded:
            hook.pre_forward(module)
            # Inputs are still sent to the device; weights are left alone.
            hook.offload = False
        yield


def _offloading(module: nn.Module) -> list[Any]:
    """The hooks of a module that offload its own weights."""
    hook = getattr(module, "_hf_hook", None)
    # Several hooks of one module stand in a hook of their own.
    return [each for each in getattr(hook, "hooks", (hook,)) if getattr(each, "offload", False)]
