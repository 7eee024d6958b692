"""A model inside PEFT: its modules and parameters as the model without adapters names them.

Found by structure, so that nothing here imports PEFT: an adapted layer holds the layer it adapts
as `base_layer`, a module trained in full holds its copies in `modules_to_save` beside the
`original_module`. What the adapters add has no place in the checkpoint of the model and is left
out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

# What wrappers of a part of a model call what they wrap, which no checkpoint does: torch.compile,
# activation checkpointing, FSDP1. Such a wrapper and what is in it have one name.
_WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


@dataclass(frozen=True)
class Plain:
    """One module of the model without its adapters.

    Attributes:
        name: as in the model once its adapters are merged or removed.
        path: in the model as it is.
        module: the module.
        adapted: an adapter that is neither merged nor off changes what the model makes of it.
    """

    name: str
    path: str
    module: nn.Module
    adapted: bool


def base_model(model: nn.Module) -> nn.Module:
    """The model that PEFT was put around, or `model` itself."""
    return getattr(model, "get_base_model", lambda: model)()


def plain_modules(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[Plain]:
    """The modules in the model's order, as `named_modules` gives them, less those of adapters."""
    inner = base_model(model)
    path = next((path for path, module in model.named_modules() if module is inner), "")
    seen: set[nn.Module] | None = set() if remove_duplicate else None
    yield from _plain(inner, "", path, False, seen)


def parameter_paths(model: nn.Module) -> dict[str, tuple[str, bool]]:
    """Name without adapters -> (path in the model as it is, whether an adapter is on top).

    Tied parameters under all their names.
    """
    return {
        _joined(plain.name, name): (_joined(plain.path, name), plain.adapted)
        for plain in plain_modules(model, remove_duplicate=False)
        for name, _ in plain.module.named_parameters(recurse=False, remove_duplicate=False)
    }


def plain_submodule(model: nn.Module, name: str) -> nn.Module:
    """The module of this name in the model without adapters.

    Raises:
        AttributeError: there is none.
    """
    module = base_model(model)
    for part in name.split(".") if name else []:
        module = _through(module).get_submodule(part)
    return _through(module)


def plain_parameter(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter of this name in the model without adapters; AttributeError if there is none."""
    owner, _, last = name.rpartition(".")
    return plain_submodule(model, owner).get_parameter(last)


def require_no_prompts(model: nn.Module) -> None:
    """Refuse models that put learned tokens or keys in front of what they are given.

    Raises:
        ValueError: prompt, prefix or p-tuning: positions of outputs are not those of the inputs.
    """
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise ValueError(
            "model must see the tokens it is given and no others, got one with a learned prompt "
            f"({getattr(config, 'peft_type', type(config).__name__)}); use model.get_base_model()"
        )


def _plain(
    module: nn.Module, name: str, path: str, adapted: bool, seen: set[nn.Module] | None
) -> Iterator[Plain]:
    inside = _inside(module)
    if inside:
        adapted = adapted or ("base_layer" in module._modules and _is_on(module))
        yield from _plain(module.get_submodule(inside), name, _joined(path, inside), adapted, seen)
        return
    if seen is not None:
        if module in seen:
            return
        seen.add(module)
    yield Plain(name, path, module, adapted)
    for key, child in module._modules.items():
        if child is not None:
            inside = name if key in _WRAPPED else _joined(name, key)
            yield from _plain(child, inside, _joined(path, key), adapted, seen)


def _through(module: nn.Module) -> nn.Module:
    """The module below whatever PEFT wrapped around it."""
    while inside := _inside(module):
        module = module.get_submodule(inside)
    return module


def _inside(module: nn.Module) -> str:
    """Where a wrapper of PEFT holds what it wraps; "" of any other module."""
    if isinstance(module._modules.get("base_layer"), nn.Module):
        return "base_layer"
    return _trained_copy(module) if "original_module" in module._modules else ""


def _is_on(layer: nn.Module) -> bool:
    """Whether what an adapted layer computes differs in kind from what its base layer does."""
    if getattr(layer, "merged", False) or getattr(layer, "disable_adapters", False):
        return False
    parts = getattr(layer, "adapter_layer_names", None)
    active = getattr(layer, "active_adapters", None)
    if parts is None or active is None:
        return True
    return any(name in getattr(layer, part, ()) for part in parts for name in active)


def _trained_copy(wrapper: nn.Module) -> str:
    """Which module of a wrapper is the one in use."""
    if isinstance(wrapper._modules.get("token_adapter"), nn.Module):
        return "token_adapter"
    copies = wrapper._modules.get("modules_to_save")
    if isinstance(copies, nn.ModuleDict) and not getattr(wrapper, "disable_adapters", False):
        for name in getattr(wrapper, "active_adapters", ()):
            if name in copies:
                return f"modules_to_save.{name}"
    return "original_module"


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name
