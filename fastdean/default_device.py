"""The caller's default device: for his own tensors and the model that he loads, not for ours.

After `torch.set_default_device("cuda")`, or inside `with torch.device("cuda"):`, torch makes there
what is made without a device. FastDEAN counts, sorts and packs on the CPU and names a device for
all else, so its functions run with the CPU as the default.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

if TYPE_CHECKING:
    import torch

P = ParamSpec("P")
T = TypeVar("T")

# As a default device is, what it was before ours belongs to a thread.
_callers = threading.local()


def cpu_by_default(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function that makes tensors: the CPU is the default device while it runs.

    So it is for what the function calls, the caller's model and loss too. Of a generator
    function each step runs so; what it yields is used under the caller's default device, as is the
    block of a context manager that is made of one.
    """
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def generate(*args: P.args, **kwargs: P.kwargs) -> T:
            return cast(T, _Steps(cast(Any, function(*args, **kwargs))))

        return generate

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        other = _other_than_cpu()
        if other is None:
            return function(*args, **kwargs)
        return _with_default(_cpu(), other, lambda: function(*args, **kwargs))

    return call


def callers_default_device() -> torch.device | None:
    """The default device of who called FastDEAN; None: the CPU, which it is if nobody sets one."""
    return _other_than_cpu() or getattr(_callers, "device", None)


def of_the_caller(items: Iterable[T]) -> Iterator[T]:
    """Steps of the caller's own iterable, under the default device that he set.

    A `DataLoader` that shuffles draws on the default device, where its generator has to be.
    """
    device = getattr(_callers, "device", None)
    if device is None:
        yield from items
        return
    steps = _with_default(device, device, lambda: iter(items))
    while True:
        try:
            item = _with_default(device, device, lambda: next(steps))
        except StopIteration:
            return
        yield item


class _Steps(Generator[Any, Any, Any]):
    """A generator, each step of which runs with the CPU as the default device."""

    def __init__(self, inner: Generator[Any, Any, Any]) -> None:
        self._inner = inner

    @cpu_by_default
    def send(self, value: Any) -> Any:
        return self._inner.send(value)

    @cpu_by_default
    def throw(self, *error: Any) -> Any:
        return self._inner.throw(*error)

    @cpu_by_default
    def close(self) -> None:
        self._inner.close()


def _other_than_cpu() -> torch.device | None:
    """The default device, unless it is the CPU."""
    torch = sys.modules.get("torch")
    # A default device is a mode of torch's functions. Mostly there is no mode at all, which takes a
    # twentieth of the time to see that it takes to ask for the device.
    if torch is None or not torch._C._len_torch_function_stack():
        return None
    device = torch.get_default_device()
    return None if device.type == "cpu" else device


def _cpu() -> torch.device:
    import torch

    return torch.device("cpu")


def _with_default(device: torch.device, callers: torch.device, step: Callable[[], T]) -> T:
    """What `step()` returns with this default device, which is undone after it.

    Args:
        callers: the default device of who called FastDEAN, while it runs.
    """
    import torch

    before = getattr(_callers, "device", None)
    depth = torch._C._len_torch_function_stack()

    def undo() -> None:
        _callers.device = before
        while torch._C._len_torch_function_stack() > depth:
            device.__exit__(None, None, None)

    # Twice: an interrupt of the first time leaves the second. Not by `with`, the end of which an
    # interrupt skips: the caller's own block would then undo this one, and leave its own.
    try:
        try:
            _callers.device = callers
            device.__enter__()
            return step()
        finally:
            undo()
    finally:
        undo()
