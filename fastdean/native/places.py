"""The table of a mask operation, `PlacesRow` of csrc/fastdean.h, and the memory it points into."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from fastdean.native.extension import dtype_code
from fastdean.native.structs import written


class Places:
    """The rows of one call, and copies in one buffer of all arrays they point to.

    Args:
        tensors, indices: as for `masks.zero_at_`.
        values, expected: one tensor [M] per tensor, copied; or nothing.
        values_at: in place of `values`, their addresses.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        indices: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor] = (),
        expected: Sequence[torch.Tensor] = (),
        *,
        values_at: Sequence[int] = (),
    ) -> None:
        self.device = tensors[0].device
        self.num_rows = len(tensors)
        self.max_count = max(index.numel() for index in indices)
        self._buffer, addresses = _packed([*indices, *values, *expected], self.device)
        addresses += values_at
        names = ("indices", "values", "expected")
        table = array("q")
        for i, (tensor, index) in enumerate(zip(tensors, indices, strict=True)):
            mine = zip(names, addresses[i :: self.num_rows], strict=False)
            table += _row(tensor, index.numel(), **dict(mine))
        # Freed while a kernel may still run: safe, the allocator reuses memory in the order of this
        # stream.
        self._rows = torch.tensor(table, dtype=torch.int64, device="cpu").to(self.device)
        self.rows_at = self._rows.data_ptr()


def _row(tensor: torch.Tensor, count: int, **addresses: int) -> array:
    contiguous = tensor.is_contiguous()
    return written(
        "PlacesRow",
        data=tensor.data_ptr(),
        **addresses,
        count=count,
        numel=tensor.numel(),
        dtype=dtype_code(tensor.dtype),
        rank=0 if contiguous else tensor.dim(),
        sizes=() if contiguous else tensor.shape,
        strides=() if contiguous else tensor.stride(),
    )


def offsets_of(counts: Sequence[int], widths: Sequence[int]) -> tuple[list[int], int]:
    """Where each array begins in one buffer, and the buffer's size, in bytes.

    The widest elements come first, so that every array is aligned.
    """
    offsets, end = [0] * len(counts), 0
    for i in sorted(range(len(counts)), key=lambda i: -widths[i]):
        offsets[i] = end
        end += counts[i] * widths[i]
    return offsets, end


def _dense(array: torch.Tensor) -> torch.Tensor:
    """Stride 1, also for a single element, which torch calls contiguous at any stride."""
    if array.stride(0) == 1:
        return array
    return array.clone(memory_format=torch.contiguous_format)


def _packed(arrays: Sequence[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, list[int]]:
    """Copies of 1-D tensors in one buffer on `device`, and the address of each."""
    offsets, _ = offsets_of([a.numel() for a in arrays], [a.element_size() for a in arrays])
    # Arrays that are all on the CPU are joined there and take one transfer.
    home = device if any(a.device.type != "cpu" for a in arrays) else torch.device("cpu")
    order = sorted(range(len(arrays)), key=lambda i: -arrays[i].element_size())
    pieces = [_dense(arrays[i].detach().to(home)).view(torch.uint8) for i in order]
    buffer = torch.cat(pieces).to(device)
    return buffer, [buffer.data_ptr() + offset for offset in offsets]
