"""The table of a mask operation, `PlacesRow` of csrc/fastdean.h, and the memory it points into."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import ModuleType

import torch

from fastdean.native.extension import dtype_code, loaded


class Places:
    """The rows of one call and, copied into one buffer, what they point to besides the tensors.

    Args:
        tensors, indices: as for `masks.zero_at_`.
        arrays: up to two, `values` and `expected`: each one tensor [M] per tensor, copied.
        addresses: the same given by address, where there are no arrays.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        indices: Sequence[torch.Tensor],
        *arrays: Sequence[torch.Tensor],
        addresses: Sequence[Sequence[int]] = (),
    ) -> None:
        extension = loaded()
        self.device = tensors[0].device
        self.num_rows = len(tensors)
        self.max_count = max(index.numel() for index in indices)
        packed = [*indices, *itertools.chain.from_iterable(arrays)]
        self._buffer, where = _packed(packed, self.device)
        count = len(tensors)
        given = [where[start : start + count] for start in range(0, len(where), count)]
        given += addresses
        unused = [[0] * len(tensors)] * (3 - len(given))
        rows = [
            _places_row(extension, tensor, index.numel(), pointers)
            for tensor, index, *pointers in zip(tensors, indices, *given, *unused, strict=True)
        ]
        # Freed while a kernel may still run: safe, the allocator reuses memory in the order of this
        # stream.
        self._rows = torch.tensor(rows, dtype=torch.int64, device="cpu").to(self.device)
        self.rows_at = self._rows.data_ptr()


def _places_row(
    extension: ModuleType, tensor: torch.Tensor, count: int, pointers: Sequence[int]
) -> list[int]:
    """One `PlacesRow`, field by field; `pointers` to indices, values and expected."""
    contiguous = tensor.is_contiguous()
    rank = 0 if contiguous else tensor.dim()
    padding = [0] * (extension.MAX_RANK - rank)
    return [
        tensor.data_ptr(),
        *pointers,
        count,
        tensor.numel(),
        dtype_code(extension, tensor.dtype),
        rank,
        *([] if contiguous else tensor.shape),
        *padding,
        *([] if contiguous else tensor.stride()),
        *padding,
    ]


def layout(counts: Sequence[int], widths: Sequence[int]) -> tuple[list[int], int]:
    """Where arrays begin in one buffer, and its size; in bytes.

    The widest elements come first, so that every array is aligned to its own.
    """
    offsets, end = [0] * len(counts), 0
    for i in sorted(range(len(counts)), key=lambda i: -widths[i]):
        offsets[i] = end
        end += counts[i] * widths[i]
    return offsets, end


def _dense(array: torch.Tensor) -> torch.Tensor:
    """Of stride 1 also where there is one element, which torch calls contiguous at any stride."""
    if array.stride(0) == 1:
        return array
    return array.clone(memory_format=torch.contiguous_format)


def _packed(arrays: Sequence[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, list[int]]:
    """Copies of 1-D tensors in one buffer on `device`, and the address of each."""
    offsets, _ = layout([a.numel() for a in arrays], [a.element_size() for a in arrays])
    # On the CPU where they all are, so that one transfer carries them.
    home = device if any(a.device.type != "cpu" for a in arrays) else torch.device("cpu")
    order = sorted(range(len(arrays)), key=lambda i: -arrays[i].element_size())
    pieces = [_dense(arrays[i].detach().to(home)).view(torch.uint8) for i in order]
    buffer = torch.cat(pieces)
    buffer = buffer.to(device)
    return buffer, [buffer.data_ptr() + offset for offset in offsets]
