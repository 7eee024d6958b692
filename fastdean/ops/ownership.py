"""Whether a call is one of plain torch, and whether memory has a single holder.

Both choose between two ways to the same values. Where they are not certain they answer False.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_PLAIN = (Tensor, nn.Parameter)


def nobody_looks_on(*tensors: Tensor) -> bool:
    """Whether a call on `tensors` is one of plain torch.

    That is a call outside of compilers, tracers, modes, transforms and forward-mode
    differentiation, on tensors of no subclass: nothing has to see an operation by its name, or
    could keep its results.
    """
    # The compiler first, because it cannot trace the other questions.
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

    Python's references to these tensors do not count; the caller knows them.
    """
    if not hasattr(torch._C, "_storage_Use_Count"):
        return False
    # Compared with a tensor that nobody else has: versions of torch count it differently.
    alone = _holders(torch.empty(1, device="cpu"))
    return all(_holders(each) == alone for each in tensors)


def _holders(tensor: Tensor) -> tuple[int, int, int, bool]:
    """Holders of the tensor, of its storage and of the storage's Python object.

    And whether other processes, which are not counted, may hold the memory.
    """
    storage = tensor.untyped_storage()
    return (
        tensor._use_count(),  # type: ignore[attr-defined]  # torch annotates it nowhere
        torch._C._storage_Use_Count(storage._cdata),
        sys.getrefcount(storage),
        storage.is_shared(),
    )
