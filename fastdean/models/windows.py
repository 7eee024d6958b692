"""The weights of one layer in memory for as long as they are in use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fastdean.models.model_state import undone


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
