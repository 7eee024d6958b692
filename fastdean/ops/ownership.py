"""Whether a call is one of plain torch, and whether memory has a single holder.

Both decide between ways to the same values: what is not known for certain is taken to be no.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_PLAIN = (Tensor, nn.Parameter)


def nobody_looks_on(*tensors: Tensor) -> bool:
    """Whether nothing stands between a call and the values of `tensors`.

    Nothing does outside of compilers, tracers, modes, transforms and forward-mode differentiation,
    for tensors that are of no subclass: there is no one who would have to see an operation by its
    name, or who could keep what it makes.
    """
    # The compiler first: it cannot trace the other questions.
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
        and all(type(each) in _PLAIN and not torch._is_functional_tensor(each) for each in tensors)
    )


def held_alone(*tensors: Tensor) -> bool:
    """Whether no other tensor, graph, storage object or process shares the memory of `tensors`.

    Python's references to these very tensors are not counted: the caller knows them.
    """
    if not hasattr(torch._C, "_storage_Use_Count"):
        return False
    # One that nobody else can have: how often it counts itself differs between versions of torch.
    alone = _holders(torch.empty(1, device="cpu"))
    return all(_holders(each) == alone for each in tensors)


def _holders(tensor: Tensor) -> tuple[int, int, int, bool]:
    """How many hold the tensor, its storage, and the Python object of the storage.

    And whether other processes may hold the memory, who are not counted.
    """
    storage = tensor.untyped_storage()
    return (
        tensor._use_count(),
        torch._C._storage_Use_Count(storage._cdata),
        sys.getrefcount(storage),
        storage.is_shared(),
    )
