"""The table of a mask operation, `PlacesRow` of csrc/fastdean.h, and the memory it points into."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdean.native import structs
from fastdean.native.extension import dtype_code


class Places:
    """The rows of one call, and copies in one buffer of all arrays they point to.

    Args:
        tensors, indices: as for `masks.zero_at_`.
        values: one tensor [M] per tensor, copied; or nothing.
        values_at: in place of `values`, their addresses.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        indices: Sequence[Tensor],
        values: Sequence[Tensor] = (),
        *,
        values_at: Sequence[int] = (),
    ) -> None:
        self.device = tensors[0].device
        self.num_rows = len(tensors)
        self.max_count = max(index.numel() for index in indices)
        self._buffer, addresses = _packed([*indices, *values], self.device)
        addresses += values_at
        n = self.num_rows
        given = [addresses[start : start + n] for start in range(0, len(addresses), n)]
        # Freed while a kernel may still run: safe, the allocator reuses memory in the order of this
        # stream.
        table = _table(tensors, indices, dict(zip(_ARRAYS, given, strict=False)))
        self._rows = torch.frombuffer(table, dtype=torch.int64).to(self.device)
        self.rows_at = self._rows.data_ptr()


_ARRAYS = ("indices", "values")


def _table(
    tensors: Sequence[Tensor], indices: Sequence[Tensor], addresses: dict[str, list[int]]
) -> array:
    codes = {dtype: dtype_code(dtype) for dtype in {tensor.dtype for tensor in tensors}}
    strided = [i for i, tensor in enumerate(tensors) if not tensor.is_contiguous()]
    ranks = [0] * len(tensors)
    for i in strided:
        ranks[i] = tensors[i].dim()
    words = structs.table(
        "PlacesRow",
        len(tensors),
        data=[tensor.data_ptr() for tensor in tensors],
        **addresses,
        count=[index.numel() for index in indices],
        numel=[tensor.numel() for tensor in tensors],
        dtype=[codes[tensor.dtype] for tensor in tensors],
        rank=ranks,
    )
    for i in strided:
        shape, strides = tensors[i].shape, tensors[i].stride()
        structs.write_dimensions(words, "PlacesRow", i, sizes=shape, strides=strides)
    return words


def offsets_of(counts: Sequence[int], widths: Sequence[int]) -> tuple[list[int], int]:
    """Where each array begins in one buffer, and the buffer's size, in bytes.

    The widest elements come first, so that every array is aligned.
    """
    offsets, end = [0] * len(counts), 0
    for i in sorted(range(len(counts)), key=lambda i: -widths[i]):
        offsets[i] = end
        end += counts[i] * widths[i]
    return offsets, end


def _dense(array: Tensor) -> Tensor:
    """Stride 1, also for a single element, which torch calls contiguous at any stride."""
    if array.stride(0) == 1:
        return array
    return array.clone(memory_format=torch.contiguous_format)


def _packed(arrays: Sequence[Tensor], device: torch.device) -> tuple[Tensor, list[int]]:
    """Copies of 1-D tensors in one buffer on `device`, and the address of each."""
    offsets, _ = offsets_of([a.numel() for a in arrays], [a.element_size() for a in arrays])
    # Arrays that are all on the CPU are joined there and take one transfer.
    home = device if any(a.device.type != "cpu" for a in arrays) else torch.device("cpu")
    order = sorted(range(len(arrays)), key=lambda i: -arrays[i].element_size())
    pieces = [_dense(arrays[i].detach().to(home)).view(torch.uint8) for i in order]
    buffer = torch.cat(pieces).to(device)
    return buffer, [buffer.data_ptr() + offset for offset in offsets]
