"""Reading and writing single entries of weights, addressed by flat index.

An index is logical: it counts the elements in row-major order of the tensor's shape, whatever the
strides are, so the same indices mean the same weights in a transposed or sliced view. Tensors may
be parameters that require grad; writes are recorded in autograd's version counters and nowhere
else in autograd. Nothing is written if any argument fails its check.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastdean.ops import _checks, _dispatch, reference


def zero_at_(
    tensors: Sequence[torch.Tensor],
    indices: Sequence[torch.Tensor],
    *,
    impl: str | None = None,
) -> None:
    """Sets the addressed entries to zero, in place.

    Equivalent to: `for t, i in zip(tensors, indices): t.view(-1)[i] = 0` for contiguous tensors.

    Args:
        tensors: float16, bfloat16, float32 or float64; up to 8 dimensions; any strides; may be
            parameters and may lie on several devices.
        indices: one int64 [M] per tensor: row-major flat indices, strictly ascending, within the
            tensor, on the CPU or on the tensor's device.
        impl: None, "reference" or "native".
    Raises: TypeError or ValueError for the arguments; RuntimeError if `impl` cannot run there.
    """
    _checks.check_edited_places(tensors, indices)
    _checks.check_writable(tensors)
    groups: dict[torch.device, list[int]] = {}
    for position, tensor in enumerate(tensors):
        groups.setdefault(tensor.device, []).append(position)
    # Every device's choice before the first write: a choice may raise.
    chosen = {device: _dispatch.choose("zero_at_", device, impl).callable for device in groups}
    for device, positions in groups.items():
        chosen[device]([tensors[p] for p in positions], [indices[p] for p in positions])


def gather_at(
    tensors: Sequence[torch.Tensor], indices: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Copies of the addressed entries: one [M] per tensor, in its dtype and on its device.

    Equivalent to: `[t.reshape(-1)[i] for t, i in zip(tensors, indices)]`, detached.

    Args:
        tensors, indices: as for `zero_at_`.
    Raises: TypeError or ValueError for the arguments.
    """
    _checks.check_edited_places(tensors, indices)
    return reference.gather_at(tensors, indices)


def write_at_(
    tensors: Sequence[torch.Tensor],
    indices: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
) -> None:
    """Writes values to the addressed entries, in place and bit for bit.

    Equivalent to: `for t, i, v in zip(tensors, indices, values): t.view(-1)[i] = v` for contiguous
    tensors.

    Args:
        tensors, indices: as for `zero_at_`.
        values: one [M] per tensor, in the tensor's dtype, on any device.
    Raises: TypeError or ValueError for the arguments.
    """
    _checks.check_edited_places(tensors, indices)
    _checks.check_writable(tensors)
    _checks.check_values(tensors, indices, values)
    reference.write_at_(tensors, indices, values)
