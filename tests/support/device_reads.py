"""Who reads values of the device: found out on a CPU, where every read is cheap and none shows.

Tensors that would lie on the device are marked, and so is whatever is computed from them. A read of
a marked tensor is what would make the host wait for a GPU: a value (`item`, `bool`, `tolist`), a
shape that depends on values (`nonzero`, boolean masks, `unique`), a copy to the host.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READING_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_INDEXING = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_}
# These never reach the dispatcher where the tensor is on the CPU already.
_READING_METHODS = ("tolist", "numpy", "cpu")


class Read(NamedTuple):
    """One read: by which package, in which function, through which operation."""

    package: str
    function: str
    operation: str


class DeviceReads(TorchDispatchMode):
    """Context manager that lists, in `reads`, the reads of marked tensors inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[Read] = []
        # Kept alive, so that no other storage gets the address of a marked one.
        self._marked: dict[int, torch.UntypedStorage] = {}
        self._patches = ExitStack()

    def mark(self, tensors: Iterable[torch.Tensor]) -> None:
        """Say that these tensors lie on the device."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._marked[storage._cdata] = storage

    def by(self, package: str) -> list[Read]:
        """The reads by functions of one package."""
        return [read for read in self.reads if read.package == package]

    def __enter__(self) -> DeviceReads:
        for name in _READING_METHODS:
            patched = self._noting(name, getattr(torch.Tensor, name))
            self._patches.enter_context(mock.patch.object(torch.Tensor, name, patched))
        self._patches.enter_context(
            mock.patch.object(torch.Tensor, "to", self._noting_moves(torch.Tensor.to))
        )
        return super().__enter__()

    def __exit__(self, *exc_info: object) -> None:
        super().__exit__(*exc_info)
        self._patches.close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, torch.Tensor)]
        marked = any(self._is_marked(tensor) for tensor in tensors)
        if marked and _reads(func, tensors):
            self._note(func.overloadpacket.__name__)
        result = func(*args, **(kwargs or {}))
        if marked:
            self.mark(t for t in tree_leaves(result) if isinstance(t, torch.Tensor))
        return result

    def _is_marked(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._marked

    def _note(self, operation: str) -> None:
        self.reads.append(Read(*_reader(), operation))

    def _noting(self, name: str, original: Callable) -> Callable:
        def method(tensor, *args, **kwargs):
            if self._is_marked(tensor):
                self._note(name)
            return original(tensor, *args, **kwargs)

        return method

    def _noting_moves(self, original: Callable) -> Callable:
        def to(tensor, *args, **kwargs):
            # A `torch.device` may be that of another marked tensor: on a CPU they look alike.
            named = any(isinstance(a, str) and a == "cpu" for a in (*args, *kwargs.values()))
            if named and self._is_marked(tensor):
                self._note("to")
            return original(tensor, *args, **kwargs)

        return to


def _reads(func, tensors: list[torch.Tensor]) -> bool:
    if func.overloadpacket in _INDEXING:
        # An index of integers says how long the result is, a mask does not.
        return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors[1:])
    return bool(_READING_TAGS & set(func.tags))


def _reader() -> tuple[str, str]:
    """Package and function of the innermost frame outside torch and this file."""
    frame = sys._getframe(1)
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in ("torch", __name__):
            return package, frame.f_code.co_name
        frame = frame.f_back
    raise AssertionError("a read without a reader")
