"""What a model is made of and where it lies, and context managers that change its state.

Nothing here runs the model.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastdean.wording.mendable import InputTypeError

_CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_NO_WEIGHTS = "model must have weights, got meta tensors without an offload hook; load it first"


def require_module(model: Any) -> None:
    """TypeError unless `model` is a module; the name of one is not."""
    if isinstance(model, nn.Module):
        return
    name = f" {os.fspath(model)!r}" if isinstance(model, str | os.PathLike) else ""
    raise InputTypeError(
        f"model must be a torch.nn.Module, got {type(model).__name__}{name}; load it first "
        "(fastdean.models.load_model), or edit its files with fastdean.patch_checkpoint "
        "(`fastdean patch`)"
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, DistributedDataParallel or DataParallel."""
    if isinstance(model, str | os.PathLike):
        require_module(model)
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        if hasattr(model, "_orig_mod"):
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, wrappers):
            model = model.module
        else:
            return model


def input_device(model: nn.Module) -> torch.device:
    """The device the model's inputs must lie on, also when its weights are offloaded."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embedding, "weight", next(model.parameters()))
    if weight.device.type != "meta":
        return weight.device
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    raise ValueError(_NO_WEIGHTS)


def input_embedding(model: nn.Module) -> nn.Module:
    """The module that turns tokens into vectors, as models of transformers give it."""
    of_transformers: Any = model
    return of_transformers.get_input_embeddings()


def weight_of(module: nn.Module, name: str = "weight") -> Tensor:
    """The weight of a module that has one of this name, as it is stored."""
    weight = getattr(module, name)
    assert isinstance(weight, Tensor)
    return weight


def execution_device(
    module: nn.Module, default: torch.device, name: str = "weight"
) -> torch.device:
    """The device `module` computes on, also when its weight is offloaded."""
    device = weight_of(module, name).device
    if device.type != "meta":
        return device
    hook = getattr(module, "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or default)


def materialised_weight(module: nn.Module, name: str = "weight") -> Tensor:
    """The weight of `module`; an offloaded one is copied to the CPU.

    Raises:
        ValueError: a meta tensor that no offload hook can fill.
    """
    weight = weight_of(module, name)
    if weight.device.type != "meta":
        return weight
    if not getattr(getattr(module, "_hf_hook", None), "offload", False):
        raise ValueError(_NO_WEIGHTS)
    from accelerate.utils import align_module_device

    with align_module_device(module, execution_device=torch.device("cpu")):
        return weight_of(module, name).detach().clone()


def text_config(model: nn.Module) -> Any:
    """The configuration of the model's text part; None for a model without one."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def config_entry(config: Any, name: str) -> Any:
    """An entry of a configuration, or None; the largest where layers have one each.

    transformers refuses to tell those by the name alone (layers with heads of their own number).
    """
    try:
        return getattr(config, name, None)
    except RuntimeError:
        of_layers = (getattr(layer, name, None) for layer in config.per_layer_config)
        return max((value for value in of_layers if value is not None), default=None)


def max_tokens(model: nn.Module) -> int | None:
    """How many tokens of one example the model has positions for; None where it sets no bound.

    Models that number positions from behind the padding token (RoBERTa, `padding_idx` of the
    position embeddings) have `padding_idx + 1` fewer than `max_position_embeddings`.
    """
    model = unwrap(model)
    text = text_config(model)
    # MPT, whose attention has a bias for so many tokens, calls it otherwise.
    longest = getattr(text, "max_position_embeddings", getattr(text, "max_seq_len", None))
    # Configurations write "no bound" as None, 0 or -1.
    if longest is None or longest < 1:
        return None
    for module in model.modules():
        positions = module._modules.get("position_embeddings")
        if isinstance(positions, nn.Embedding) and positions.padding_idx is not None:
            return longest - positions.padding_idx - 1
    return longest


@contextmanager
def undone(undo: Callable[[], None]) -> Iterator[None]:
    """Call `undo` after the block, twice: an interrupt of the first leaves the second."""
    try:
        try:
            yield
        finally:
            undo()
    finally:
        undo()


@contextmanager
def evaluation_state(model: nn.Module) -> Iterator[None]:
    """Dropout and key-value cache are off inside; modes and config are as before outside."""
    training = [module for module in model.modules() if module.training]
    configs = [getattr(model, "config", None), text_config(model)]
    configs = [c for c in {id(c): c for c in configs}.values() if hasattr(c, "use_cache")]
    use_cache = [config.use_cache for config in configs]

    def undo() -> None:
        for module in training:
            module.training = True
        for config, value in zip(configs, use_cache, strict=True):
            config.use_cache = value

    with undone(undo):
        # A walk over all modules, once for every small pass.
        if training:
            model.eval()
        for config in configs:
            config.use_cache = False
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient inside: autograd computes dX and never dW."""
    # By place: offloading replaces the parameter objects during the forward pass.
    trainable = [
        (module, name)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]

    def require_grad(required: bool) -> None:
        for module, name in trainable:
            parameter = module._parameters[name]
            assert parameter is not None
            parameter.requires_grad_(required)

    with undone(lambda: require_grad(True)):
        require_grad(False)
        yield


@contextmanager
def fresh_leaves(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Inside, parameters that share the weights' memory and require gradients stand in for them.

    So that a backward pass reaches neither the weights' own `.grad` nor what is hooked to them
    (an optimizer step, the buckets of DistributedDataParallel). They come in the given order.
    """
    leaves = {id(weight): nn.Parameter(weight.detach()) for weight in weights}
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in leaves
    ]

    def undo() -> None:
        for module, name, parameter in places:
            module._parameters[name] = parameter
        # Of what takes a gradient, autocast keeps what it cast it to until the caller's ends.
        torch.clear_autocast_cache()

    with undone(undo):
        for module, name, parameter in places:
            module._parameters[name] = leaves[id(parameter)]
        yield list(leaves.values())


@contextmanager
def strict_determinism(deterministic: bool) -> Iterator[None]:
    """With `deterministic`, operations that cannot repeat their bits raise inside the block."""
    if not deterministic:
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # Without it torch refuses every matrix product on a GPU in this mode.
    own_workspace = _CUBLAS_WORKSPACE not in os.environ

    def undo() -> None:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        if own_workspace:
            os.environ.pop(_CUBLAS_WORKSPACE, None)

    with undone(undo):
        os.environ.setdefault(_CUBLAS_WORKSPACE, ":4096:8")
        torch.use_deterministic_algorithms(True)
        yield


@contextmanager
def eager() -> Iterator[None]:
    """Every module is called as a module inside, so that its hooks run.

    Compiled modules and functions do not fire hooks that were added after compilation, and torch's
    fused encoder layers none at all.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    # Nothing was compiled where the compiler was never imported, and importing it takes seconds.
    compiler = "torch._dynamo" in sys.modules
    stances: list = []

    def undo() -> None:
        torch.backends.mha.set_fastpath_enabled(fused)
        for stance in stances:
            stance.__exit__(None, None, None)

    with undone(undo):
        torch.backends.mha.set_fastpath_enabled(False)
        if compiler:
            stances.append(torch.compiler.set_stance("force_eager"))
        yield
