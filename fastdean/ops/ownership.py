"""Whether a call is one of plain torch, and whether memory has a single holder.

Both decide between ways to the same values: what is not known for certain is taken to be no.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_PLAIN = (Tensor, nn.Parameter)
# Of a tensor's storage: the tensor, and the Python object that it is asked by.
_HOLDERS = 2
# Of that object: a local name, and the argument of the one who counts.
_REFERENCES = 2


def nobody_looks_on(*tensors: Tensor) -> bool:
    """Whether nothing stands between a call and the values of `tensors`.

    Nothing does outside of compilers, tracers, modes, transforms and forward-mode differentiation,
    for tensors that are of no subclass: there is no one who would have to see an operation by its
    name, or who could keep what it makes.
    """
    return (
        all(type(each) in _PLAIN for each in tensors)
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


def held_alone(tensor: Tensor) -> bool:
    """Whether no other tensor, graph or storage object shares the memory of `tensor`.

    Python's references to this very tensor are not counted: the caller knows them.
    """
    count = getattr(torch._C, "_storage_Use_Count", None)
    if count is None or tensor._use_count() != 1:
        return False
    storage = tensor.untyped_storage()
    return count(storage._cdata) == _HOLDERS and sys.getrefcount(storage) <= _REFERENCES
