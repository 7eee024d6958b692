"""Tensors in what layers are given and return: nested tuples, lists and mappings."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

# Where a tensor is in a tree: the keys that lead to it.
Path = tuple[Any, ...]


def tensors(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor with its path, in order."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from tensors(value, (*path, key))
    elif isinstance(tree, tuple | list):
        for position, value in enumerate(tree):
            yield from tensors(value, (*path, position))


def mappings(tree: Any, path: Path = ()) -> Iterator[tuple[Path, MutableMapping]]:
    """Every mapping that can be written to, with its path."""
    if isinstance(tree, MutableMapping):
        yield path, tree
        for key, value in tree.items():
            yield from mappings(value, (*path, key))
    elif isinstance(tree, tuple | list):
        for position, value in enumerate(tree):
            yield from mappings(value, (*path, position))


def replaced(tree: Any, new: Mapping[Path, Tensor], path: Path = ()) -> Any:
    """A copy of the tree with the tensors of `new` in their places; other tensors are shared.

    Every tuple, list and mapping is a copy, so that whoever writes into one leaves `tree` alone.
    """
    if isinstance(tree, Tensor):
        return new.get(path, tree)
    if isinstance(tree, Mapping):
        # A shallow copy first: a mapping of a class of its own cannot be made from pairs alone.
        made: Any = copy.copy(tree)
        for key in list(tree):
            made[key] = replaced(tree[key], new, (*path, key))
        return made
    if isinstance(tree, tuple | list):
        items = [replaced(value, new, (*path, i)) for i, value in enumerate(tree)]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


def compact(tensor: Tensor) -> Tensor:
    """The tensor, or a copy, with the strides of a clone and no byte of memory beside its own."""
    strides = torch.empty_like(tensor, device="meta").stride()
    own = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor.detach() if own and tensor.stride() == strides else tensor.detach().clone()
