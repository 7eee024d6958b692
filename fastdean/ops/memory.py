"""Whether a tensor's values lie in memory that an operation can read and write.

A kernel, torch's own too, follows an address and strides: missing memory ends the process. These
checks are cheap and read no value. They cannot see memory that another thread or library frees
meanwhile, nor a read-only page after a tensor's first one; NumPy's read-only arrays on the heap are
ordinary memory.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import platform
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdean.wording.mendable import InputTypeError, StateError

_PLAIN = (Tensor, nn.Parameter)


class Fault(NamedTuple):
    """Why a tensor is refused: it must `expected`, got `got`; `advice` says what to do."""

    kind: type[Exception]
    expected: str
    got: str
    advice: str

    def error(self, name: str) -> Exception:
        return self.kind(f"{name} must {self.expected}, got {self.got}; {self.advice}")


def check_tensor(name: str, value: object) -> None:
    """Raises: TypeError unless `value` is a tensor, ValueError unless it has one shape."""
    if not isinstance(value, Tensor):
        raise InputTypeError(
            f"{name} must be a tensor, got {type(value).__name__}; make it with torch.as_tensor"
        )
    if value.is_nested:
        raise _layout_fault("nested").error(name)


def check_dense(name: str, tensor: Tensor) -> None:
    """Raises: ValueError for a sparse tensor, of which there are no strides."""
    if tensor.layout is not torch.strided:
        raise _layout_fault(tensor.layout).error(name)


def check_memory(name: str, tensor: Tensor) -> None:
    """Raises: TypeError or ValueError for a tensor with a `memory_fault`."""
    fault = memory_fault(tensor)
    if fault is not None:
        raise fault.error(name)


def check_written(name: str, tensor: Tensor) -> None:
    """Raises: ValueError for a tensor with a `write_fault`."""
    fault = write_fault(tensor)
    if fault is not None:
        raise fault.error(name)


def check_apart(name: str, written: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """Raises: ValueError if `written` shares an element's memory with one of `others`."""
    for other_name, other in others.items():
        if other is not None and _share_memory(written, other):
            raise ValueError(
                f"{name} must share no memory with {other_name}, got views of the same elements; "
                "clone one of them"
            )


def check_surroundings() -> None:
    """Raises: RuntimeError where new tensors hold no values.

    That is inside a FakeTensorMode and inside some transforms of `torch.func`.
    """
    made = torch.empty(1, dtype=torch.uint8, device="cpu")
    if type(made) is not Tensor or memory_fault(made) is not None:
        raise StateError(
            "operations of fastdean must be called where new tensors hold values, got a "
            "FakeTensorMode or a transform of torch.func around the call; call them outside of it"
        )


def memory_fault(tensor: Tensor) -> Fault | None:
    """Why the tensor's elements cannot be read at its address and strides; None if they can."""
    # Runs before every operation, so it asks as little as possible.
    if type(tensor) not in _PLAIN and _computes_elsewhere(type(tensor)):
        return Fault(
            TypeError,
            "be a plain tensor or parameter",
            type(tensor).__name__,
            "pass the local tensor that it wraps",
        )
    if not (tensor.is_cpu or tensor.is_cuda):
        # On other devices torch runs every operation.
        return _meta_fault(tensor)
    if tensor.is_nested:
        return _layout_fault("nested")
    try:
        available = tensor.untyped_storage().nbytes()
    except (NotImplementedError, RuntimeError, ValueError):
        if tensor.layout is not torch.strided:
            return _layout_fault(tensor.layout)
        return _without_memory_fault("one without a storage, as inside a transform of torch.func")
    count = tensor.numel()
    if count == 0:
        return None
    if not tensor.is_contiguous():
        count = 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            if stride < 0:
                return _without_memory_fault("one of a negative stride")
            count += (size - 1) * stride
    needed = (tensor.storage_offset() + count) * tensor.itemsize
    if needed > available:
        return _without_memory_fault(
            f"one that needs {needed} bytes of a storage of {available}, freed or cut short"
        )
    if tensor.data_ptr() == 0:
        return _without_memory_fault("one without an address, as inside a transform of torch.func")
    return None


def _computes_elsewhere(kind: type[Tensor]) -> bool:
    """Whether a subclass of tensors implements torch's operations itself."""
    return kind.__torch_dispatch__ is not Tensor.__torch_dispatch__


def _meta_fault(tensor: Tensor) -> Fault | None:
    if not tensor.is_meta:
        return None
    return Fault(
        ValueError,
        "hold data",
        "a tensor on the meta device",
        "an offloaded weight must be loaded before it is used",
    )


def _layout_fault(layout: object) -> Fault:
    return Fault(
        ValueError, "be a dense tensor", f"layout {layout}", "convert it to one of torch.strided"
    )


def _without_memory_fault(got: str) -> Fault:
    return Fault(
        ValueError,
        "hold its values in memory",
        got,
        "gather or reload it first, and call outside of transforms",
    )


def write_fault(tensor: Tensor) -> Fault | None:
    """Why a tensor without a `memory_fault` cannot be written in place; None if it can.

    Its elements share memory, torch negates it on reading, its memory is read-only, or it was made
    in inference mode and this call is outside of it.
    """
    expected, advice = "be a tensor that can be written in place", ""
    if tensor.is_neg():
        got, advice = "a negated view", "pass tensor.resolve_neg()"
    elif tensor.is_inference() and not torch.is_inference_mode_enabled():
        got = "one made in inference mode, outside of it"
        advice = "edit it inside torch.inference_mode, or clone it"
    elif _overlaps_itself(tensor):
        expected = "have a place in memory for every element"
        layout = f"strides {tensor.stride()} and shape {tuple(tensor.shape)}"
        expanded = 0 in tensor.stride()
        got = f"an expanded tensor of {layout}" if expanded else f"one that overlaps, of {layout}"
        advice = "write to the tensor that it is a view of"
    elif tensor.device.type == "cpu" and tensor.numel() and not _is_writable(tensor.data_ptr()):
        expected = "lie in memory that can be written"
        got = "read-only memory, such as a file mapped with mode 'r'"
        advice = "clone it, or map the file with mode 'c'"
    else:
        return None
    return Fault(ValueError, expected, got, advice)


def _overlaps_itself(tensor: Tensor) -> bool:
    if tensor.is_contiguous():
        return False
    dims = [(s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]
    if tensor.numel() == 0:
        return False
    span = 1
    for stride, size in sorted(dims):
        if stride < span:
            break
        span += (size - 1) * stride
    else:
        return False
    # Interleaved strides, which are rare, may still give every element its own place.
    reach = 1 + sum((size - 1) * stride for stride, size in dims)
    if reach < tensor.numel():
        return True
    return len(_elements(tensor).unique()) < tensor.numel()


def _share_memory(a: Tensor, b: Tensor) -> bool:
    if a.device != b.device or a.numel() == 0 or b.numel() == 0:
        return False
    (a_start, a_end), (b_start, b_end) = _span(a), _span(b)
    if a_end <= b_start or b_end <= a_start:
        return False
    # Columns of one buffer, which are rare, interleave without sharing an element.
    a_bytes, b_bytes = _bytes(a, a_start), _bytes(b, a_start)
    return bool(torch.isin(a_bytes, b_bytes).any())


def _span(tensor: Tensor) -> tuple[int, int]:
    """The address of the first element, and the one after the last."""
    start = tensor.data_ptr()
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return start, start + (1 + sum((n - 1) * s for n, s in sizes)) * tensor.itemsize


def _elements(tensor: Tensor) -> Tensor:
    """The offset of each element from the first, in elements: int64 [numel], on the CPU."""
    found = torch.zeros(1, dtype=torch.int64, device="cpu")
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        steps = torch.arange(size, dtype=torch.int64, device="cpu") * stride
        found = (found[:, None] + steps).flatten()
    return found


def _bytes(tensor: Tensor, origin: int) -> Tensor:
    """The offset of each byte of the elements from `origin`: int64, on the CPU."""
    width = torch.arange(tensor.itemsize, dtype=torch.int64, device="cpu")
    return (
        tensor.data_ptr() - origin + _elements(tensor)[:, None] * tensor.itemsize + width
    ).flatten()


# The number of Linux's system call `futex`, by processor.
_FUTEX = {"x86_64": 202, "aarch64": 98}
_WAKE_OP_PRIVATE = 5 | 128
_OR_WITH_NOTHING = 2 << 28


@functools.cache
def _probe() -> Callable[[int], bool]:
    number = _FUTEX.get(platform.machine())
    if sys.platform != "linux" or number is None:
        return lambda address: True
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    call.argtypes = [ctypes.c_long, *(ctypes.c_void_p, ctypes.c_int, ctypes.c_int)]
    call.argtypes += [ctypes.c_long, ctypes.c_void_p, ctypes.c_uint]
    nobody = ctypes.c_uint32()
    nobody_at = ctypes.addressof(nobody)

    def is_writable(address: int, keep: ctypes.c_uint32 = nobody) -> bool:
        word = address & ~3
        done = call(number, nobody_at, _WAKE_OP_PRIVATE, 0, 0, word, _OR_WITH_NOTHING)
        return done >= 0 or ctypes.get_errno() != errno.EFAULT

    return is_writable


def _is_writable(address: int) -> bool:
    """Whether the page there can be written; True where the system cannot tell.

    A write to a read-only page would end the process. So the kernel does it: an atomic OR of the
    word with 0, which changes nothing and returns an error where it cannot write.
    """
    return _probe()(address)
