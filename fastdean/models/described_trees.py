"""What a layer returned, in JSON and back: the tree around its tensors, which are numbered.

Known are tuples, lists and mappings, those with named fields and transformers' outputs included,
and plain values. Nothing is pickled: a class is looked up among those that are imported already.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor

from fastdean.wording.mendable import StateError

_PLAIN = (type(None), bool, int, str)


def described(tree: Any) -> Any:
    """The tree as JSON; its tensors have the numbers in which `trees.tensors` yields them.

    Raises:
        RuntimeError: there is something else in it.
    """
    return _described(tree, count())


def rebuilt(described: Any, tensors: Sequence[Tensor]) -> Any:
    """The inverse of `described`, with these tensors; ValueError for what it never wrote."""
    try:
        return _rebuilt(described, tensors)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"no described tree: {type(error).__name__}: {error}") from error


def _described(tree: Any, numbers: Iterator[int]) -> Any:
    if isinstance(tree, Tensor):
        return {"tensor": next(numbers)}
    if type(tree) in _PLAIN:
        return {"value": tree}
    if type(tree) is float:
        return {"float": tree.hex()}
    if type(tree) is torch.dtype:
        return {"dtype": str(tree).removeprefix("torch.")}
    kind = _kind(type(tree))
    if kind is None:
        raise StateError(
            "resume must be left out for a model whose layers return more than tensors in tuples, "
            f"lists and dictionaries, got {type(tree).__name__}; use order='layers' without it"
        )
    if isinstance(tree, Mapping):
        items = [[_described(key, numbers), _described(tree[key], numbers)] for key in tree]
    else:
        items = [_described(part, numbers) for part in tree]
    named = {"class": f"{type(tree).__module__}:{type(tree).__qualname__}"}
    return {kind: items, **(named if kind in ("fields", "output") else {})}


def _rebuilt(described: Any, tensors: Sequence[Tensor]) -> Any:
    if "tensor" in described:
        return tensors[described["tensor"]]
    if "value" in described:
        return described["value"]
    if "float" in described:
        return float.fromhex(described["float"])
    if "dtype" in described:
        return getattr(torch, described["dtype"])
    ((kind, items),) = ((kind, part) for kind, part in described.items() if kind != "class")
    if kind in ("dict", "ordered", "output"):
        pairs = [(_rebuilt(key, tensors), _rebuilt(value, tensors)) for key, value in items]
        if kind == "output":
            return _named_class(described["class"], kind)(**dict(pairs))
        return dict(pairs) if kind == "dict" else OrderedDict(pairs)
    parts = [_rebuilt(part, tensors) for part in items]
    if kind == "fields":
        return _named_class(described["class"], kind)(*parts)
    return {"tuple": tuple, "list": list, "size": torch.Size}[kind](parts)


def _kind(cls: type) -> str | None:
    known = {tuple: "tuple", list: "list", dict: "dict", OrderedDict: "ordered"}
    if cls in known:
        return known[cls]
    if cls is torch.Size:
        return "size"
    # Only what can be found again.
    if sys.modules.get(cls.__module__) is None or "<locals>" in cls.__qualname__:
        return None
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return "fields"
    outputs = sys.modules.get("transformers.utils.generic")
    if outputs is not None and issubclass(cls, outputs.ModelOutput):
        return "output"
    return None


def _named_class(name: str, kind: str) -> type:
    module, _, path = name.partition(":")
    found: Any = sys.modules[module]
    for part in path.split("."):
        found = getattr(found, part)
    if not isinstance(found, type) or _kind(found) != kind:
        raise TypeError(f"{name} is no class of such a kind")
    return found
