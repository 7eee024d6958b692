"""Reading and writing single entries of weights, addressed by flat index.

An index counts a tensor's elements in row-major order of its shape, whatever its strides: the same
indices mean the same weights in a transposed or sliced view. Tensors may be parameters that require
grad; autograd sees writes in its version counters only. If any argument fails its check, nothing is
written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdean.ops import _checks, _dispatch
from fastdean.ops.writes import note_writes


def zero_at_(
    tensors: Sequence[Tensor], indices: Sequence[Tensor], *, impl: str | None = None
) -> None:
    """Sets the addressed entries to zero, in place.

    Equivalent to: `for t, i in zip(tensors, indices): t.view(-1)[i] = 0` for contiguous tensors.

    Args:
        tensors: float16, bfloat16, float32 or float64; up to 8 dimensions; any strides; may be
            parameters and may lie on several devices. Those made in inference mode can be written
            only in it.
        indices: one int64 [M] per tensor: row-major flat indices, strictly ascending, within the
            tensor, on the CPU or on the tensor's device.
        impl: None, "reference" or "native".
    Raises: TypeError or ValueError for the arguments, also where their memory is freed, cut short
        or (under Linux) read-only; RuntimeError if `impl` cannot run there, or inside a
        FakeTensorMode or a transform of torch.func.
    """
    _checks.check_edited_places(tensors, indices)
    _checks.check_writable(tensors)
    _write("zero_at_", impl, tensors, indices)


def gather_at(
    tensors: Sequence[Tensor], indices: Sequence[Tensor], *, impl: str | None = None
) -> list[Tensor]:
    """Copies of the addressed entries: one [M] per tensor, in its dtype and on its device.

    Equivalent to: `[t.reshape(-1)[i] for t, i in zip(tensors, indices)]`, detached.

    Args:
        tensors, indices, impl: as for `zero_at_`.
    Raises: as `zero_at_`.
    """
    _checks.check_edited_places(tensors, indices)
    found: dict[int, Tensor] = {}
    for positions, values in _on_every_device("gather_at", impl, tensors, indices):
        found.update(zip(positions, values, strict=True))
    return [found[position] for position in range(len(tensors))]


def write_at_(
    tensors: Sequence[Tensor],
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    impl: str | None = None,
) -> None:
    """Writes values to the addressed entries, in place and bit for bit.

    Equivalent to: `for t, i, v in zip(tensors, indices, values): t.view(-1)[i] = v` for contiguous
    tensors. Where tensors share memory, the values for it must agree.

    Args:
        tensors, indices, impl: as for `zero_at_`.
        values: one [M] per tensor, in the tensor's dtype, on any device.
    Raises: as `zero_at_`.
    """
    _checks.check_edited_places(tensors, indices)
    _checks.check_writable(tensors)
    _checks.check_values(tensors, indices, values)
    _write("write_at_", impl, tensors, indices, values)


def _write(op: str, impl: str | None, tensors: Sequence[Tensor], *others: Sequence[Tensor]) -> None:
    try:
        _on_every_device(op, impl, tensors, *others)
    finally:
        # One device may have been written to before another one failed.
        note_writes(tensors)


def _by_device(tensors: Sequence[Tensor]) -> dict[torch.device, list[int]]:
    """Device -> positions of its tensors."""
    groups: dict[torch.device, list[int]] = {}
    for position, tensor in enumerate(tensors):
        groups.setdefault(tensor.device, []).append(position)
    return groups


def _on_every_device(
    op: str, impl: str | None, *arguments: Sequence[Tensor]
) -> list[tuple[list[int], Any]]:
    """Runs `op` once per device of the first argument: (positions, what it returned) of each."""
    groups = _by_device(arguments[0])
    # Choose for every device before the first write, because a choice may raise.
    chosen: Mapping[torch.device, Callable] = {
        device: _dispatch.choose(op, device, impl).callable for device in groups
    }
    return [
        (positions, chosen[device](*([each[p] for p in positions] for each in arguments)))
        for device, positions in groups.items()
    ]
