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
from contextlib import contextmanager
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
        with _cpu_in_place_of(other):
            return function(*args, **kwargs)

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
    with device:
        steps = iter(items)
    while True:
        with device:
            try:
                item = next(steps)
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


@contextmanager
def _cpu_in_place_of(device: torch.device) -> Iterator[None]:
    import torch

    before = getattr(_callers, "device", None)
    _callers.device = device
    try:
        with torch.device("cpu"):
            yield
    finally:
        _callers.device = before
