"""Hooks on modules that are gone at the end, whatever interrupts their coming or going.

An interrupt can lose the handle that `register_forward_hook` returns. So hooks are found again by
what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fastdean.models.model_state import undone
from fastdean.models.trees import replaced, tensors


@contextmanager
def forward_hooks(hooks: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Call `hook(module, args, kwargs, output)` on what each module itself returned.

    Before every other forward hook, those that torch calls for all modules included: they may
    return something else.
    """

    def of_all_modules(module: nn.Module, args: tuple, kwargs: dict, output: object) -> object:
        hook = hooks.get(module)
        return None if hook is None else hook(module, args, kwargs, output)

    everywhere = torch_module._global_forward_hooks

    def undo() -> None:
        _remove(of_all_modules, everywhere, torch_module._global_forward_hooks_with_kwargs)
        for module, hook in hooks.items():
            _remove(hook, module._forward_hooks, module._forward_hooks_with_kwargs)

    with undone(undo):
        if everywhere:
            # torch annotates hooks that return nothing, and its OrderedDict as a dict.
            handle = torch_module.register_module_forward_hook(
                of_all_modules,  # type: ignore[arg-type]
                with_kwargs=True,
            )
            everywhere.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]
        else:
            for module, hook in hooks.items():
                module.register_forward_hook(hook, with_kwargs=True, prepend=True)
        yield


@contextmanager
def forward_pre_hooks(hooks: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Call `hook(module, args, kwargs)` on what each module will see: after all others so far."""

    def undo() -> None:
        for module, hook in hooks.items():
            _remove(hook, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)

    with undone(undo):
        for module, hook in hooks.items():
            module.register_forward_pre_hook(hook, with_kwargs=True)
        yield


def _remove(hook: Callable, registered: dict, with_kwargs: dict) -> None:
    for key in [key for key, other in registered.items() if other is hook]:
        # Last from where the next search looks.
        with_kwargs.pop(key, None)
        del registered[key]


@dataclass(frozen=True)
class Casting:
    """A forward hook that brings floating-point tensors to a dtype, and nothing else.

    Attributes:
        before: whether it is called on what the module is given, with keywords, or on what it
            returned.
    """

    dtype: torch.dtype
    before: bool

    def __call__(self, module: nn.Module, args: tuple, other: Any) -> Any:
        tree = (args, other) if self.before else other
        found = {p: t for p, t in tensors(tree) if t.is_floating_point() and t.dtype != self.dtype}
        return replaced(tree, {p: t.to(self.dtype) for p, t in found.items()}) if found else None


@contextmanager
def hooks_exchanged(
    modules: Iterable[nn.Module], instead: Callable[[Callable, bool], Callable | None]
) -> Iterator[None]:
    """Inside, other forward hooks of the modules stand in for theirs, in the same order.

    Args:
        instead: what stands in for a hook, None for nothing; called with whether it runs before
            the forward.
    """
    before = [
        (registered, dict(registered), runs_before)
        for module in modules
        for registered, runs_before in (
            (module._forward_pre_hooks, True),
            (module._forward_hooks, False),
        )
    ]

    def undo() -> None:
        for registered, hooks, _ in before:
            _fill(registered, {**hooks, **{k: h for k, h in registered.items() if k not in hooks}})

    with undone(undo):
        for registered, hooks, runs_before in before:
            other = {key: instead(hook, runs_before) for key, hook in hooks.items()}
            _fill(registered, {key: hook for key, hook in other.items() if hook is not None})
        yield


def _fill(registered: dict, hooks: Mapping[int, Callable]) -> None:
    """Handles of hooks know the dictionary that they are in, so that it stays the same one."""
    if list(registered.items()) != list(hooks.items()):
        registered.clear()
        registered.update(hooks)


def has_hooks(module: nn.Module) -> bool:
    """Whether a forward hook that may look at tensors hangs on the module, or on all modules."""
    registered = (
        *(module._forward_hooks, module._forward_pre_hooks),
        *(torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks),
    )
    return any(not isinstance(hook, Casting) for hooks in registered for hook in hooks.values())


def take_gradients(leaves: Sequence[Tensor], take: Callable[[int, Tensor], None]) -> None:
    """Call `take(position, gradient)` for each leaf in a backward pass, and keep no gradient.

    At no time is there more than one gradient of them all. The leaves are the caller's own; what is
    hooked to them goes with them.
    """

    def taking(position: int) -> Callable[[Tensor], None]:
        def hook(leaf: Tensor) -> None:
            gradient, leaf.grad = leaf.grad, None
            assert gradient is not None  # It has just been accumulated.
            take(position, gradient)

        return hook

    for position, leaf in enumerate(leaves):
        leaf.register_post_accumulate_grad_hook(taking(position))
