"""A model as it is found, and the states it is put into and back.

Below its wrappers, on its devices, and the context managers that change a model or torch for the
length of a block. Nothing here runs the model.

What a context manager undoes, it undoes twice: an interrupt of the first leaves the second.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, DistributedDataParallel or DataParallel."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, wrappers):
            model = model.module
        else:
            return model


def input_device(model: nn.Module) -> torch.device:
    """The device the model's inputs must lie on, also when its weights are offloaded."""
    weight = next(model.parameters())
    if hasattr(model, "get_input_embeddings"):
        weight = getattr(model.get_input_embeddings(), "weight", weight)
    if weight.device.type != "meta":
        return weight.device
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    raise ValueError(
        "model must have weights, got meta tensors without an offload hook; load it first"
    )


def execution_device(module: nn.Module, default: torch.device) -> torch.device:
    """The device `module` computes on, also when its weight is offloaded."""
    device = module.weight.device
    if device.type != "meta":
        return device
    hook = getattr(module, "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or default)


def materialised_weight(module: nn.Module) -> Tensor:
    """The weight of `module`; an offloaded one is copied to the CPU.

    Raises:
        ValueError: a meta tensor that no offload hook can fill.
    """
    weight = module.weight
    if weight.device.type != "meta":
        return weight
    if not getattr(getattr(module, "_hf_hook", None), "offload", False):
        raise ValueError(
            "model must have weights, got meta tensors without an offload hook; load it first"
        )
    from accelerate.utils import align_module_device

    with align_module_device(module, execution_device=torch.device("cpu")):
        return module.weight.detach().clone()


def max_tokens(model: nn.Module) -> int | None:
    """How many tokens of one example the model has positions for; None where it sets no bound.

    Models that number positions from behind the padding token (RoBERTa, `padding_idx` of the
    position embeddings) have `padding_idx + 1` fewer than `max_position_embeddings`.
    """
    model = unwrap(model)
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    # MPT, whose attention has a bias for so many tokens, calls it otherwise.
    longest = getattr(text, "max_position_embeddings", getattr(text, "max_seq_len", None))
    # Configurations write "no bound" as None, 0 or -1.
    if longest is None or longest < 1:
        return None
    for module in model.modules():
        positions = getattr(module, "position_embeddings", None)
        if isinstance(positions, nn.Embedding) and positions.padding_idx is not None:
            return longest - positions.padding_idx - 1
    return longest


@contextmanager
def evaluation_state(model: nn.Module) -> Iterator[None]:
    """Dropout and key-value cache are off inside; modes and config are as before outside."""
    training = [module for module in model.modules() if module.training]
    configs = [c for c in {id(c): c for c in _configs(model)}.values() if hasattr(c, "use_cache")]
    use_cache = [config.use_cache for config in configs]

    def undo() -> None:
        for module in training:
            module.training = True
        for config, value in zip(configs, use_cache, strict=True):
            config.use_cache = value

    try:
        try:
            model.eval()
            for config in configs:
                config.use_cache = False
            yield
        finally:
            undo()
    finally:
        undo()


def _configs(model: nn.Module) -> list:
    config = getattr(model, "config", None)
    if config is None:
        return []
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return [config, text]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient inside: autograd computes dX and never dW."""
    # By name: offloading replaces the parameter objects during the forward pass.
    trainable = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad
    ]

    def undo() -> None:
        for name in trainable:
            model.get_parameter(name).requires_grad_(True)

    try:
        try:
            for name in trainable:
                model.get_parameter(name).requires_grad_(False)
            yield
        finally:
            undo()
    finally:
        undo()


@contextmanager
def fresh_leaves(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
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

    try:
        try:
            for module, name, parameter in places:
                module._parameters[name] = leaves[id(parameter)]
            yield list(leaves.values())
        finally:
            undo()
    finally:
        undo()


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

    try:
        try:
            os.environ.setdefault(_CUBLAS_WORKSPACE, ":4096:8")
            torch.use_deterministic_algorithms(True)
            yield
        finally:
            undo()
    finally:
        undo()


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

    try:
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            if compiler:
                stances.append(torch.compiler.set_stance("force_eager"))
            yield
        finally:
            undo()
    finally:
        undo()
