"""Modules outside of the layers whose weights are large: tables and the head.

A table is an embedding: what it returns hangs on the tokens alone, so that a batch that has been
looked up once needs it no more. The head makes logits, behind all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastdean.models.layers.replay import stand_ins

# Of the rows of the embedding of tokens, how many a table has at least; those of positions and of
# kinds of tokens are small.
_LARGE = 0.5


def tables_of(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Name -> large embedding outside of the layers."""
    inside = {module for layer in layers.values() for module in layer.modules()}
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module not in inside
    }
    of_tokens = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(of_tokens, nn.Embedding):
        of_tokens = max(found.values(), key=lambda module: module.num_embeddings, default=None)
    least = 0 if of_tokens is None else _LARGE * of_tokens.num_embeddings
    return {n: m for n, m in found.items() if m.num_embeddings >= least}


def head_of(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Name -> module that makes logits; empty for a model that names none outside of its layers."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    inside = {module for layer in layers.values() for module in layer.modules()}
    if head is None or head in inside or isinstance(head, nn.Embedding):
        return {}
    return {name: module for name, module in model.named_modules() if module is head}


def last_stack_begins(layers: Mapping[str, nn.Module]) -> int:
    """The position of the first layer of the last stack: the decoder's, behind an encoder.

    Once it is reached, a model has looked up all of its tokens.
    """
    stacks = [name.rpartition(".")[0] for name in layers]
    return stacks.index(stacks[-1]) if stacks else 0


@contextmanager
def direct_uses(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[set[str]]:
    """Which modules' weights the model uses otherwise than by calling the module.

    Such as a head that multiplies with the embedding's weight itself, or code that asks a weight
    for its device. It cannot be known when a weight is needed that way.

    Yields:
        Their names, complete when the model has run.
    """
    watch = _Watch(modules)
    watched = [model, *modules.values()]
    forwards = [module.forward for module in watched]

    def noted(j: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            with watch.inside(j):
                return forwards[j](*args, **kwargs)

        return forward

    with stand_ins(watched, noted):
        yield watch.found


class _Watch(TorchFunctionMode):
    """Sees every function of torch that is given a weight while the model runs."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.found: set[str] = set()
        self._modules = modules
        self._owners: dict[int, list[str]] = {}
        self._in_module = 0

    @contextmanager
    def inside(self, j: int) -> Iterator[None]:
        """The model (0) or one of the modules is running."""
        if j:
            self._in_module += 1
            try:
                yield
            finally:
                self._in_module -= 1
            return
        self._owners = {}
        for name, module in self._modules.items():
            for weight in module.parameters():
                self._owners.setdefault(id(weight), []).append(name)
        with self:
            yield

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._in_module:
            given = {id(a): a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Tensor)}
            for key in given.keys() & self._owners.keys():
                # Shapes, dtypes and flags are known without the values.
                if _looks_at_it(func, result, given[key]):
                    self.found.update(self._owners[key])
        return result


def _looks_at_it(func: Callable[..., Any], result: Any, weight: Tensor) -> bool:
    if func in _OF_A_DEVICE:
        return True
    parts = result if isinstance(result, tuple | list) else [result]
    return any(isinstance(part, Tensor) and part is not weight for part in parts)


_OF_A_DEVICE: set[Any] = {
    getattr(torch.Tensor, name).__get__ for name in ("device", "is_meta", "is_cuda", "is_cpu")
}
