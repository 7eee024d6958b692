"""Single entries of weights, read and written by flat index."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdean.native.extension import loaded
from fastdean.native.places import Places, offsets_of


def gather_at(tensors: Sequence[Tensor], indices: Sequence[Tensor]) -> list[Tensor]:
    """`ops.gather_at` in compiled code; arguments and errors as for `zero_at_`."""
    if not tensors:
        return []
    counts = [index.numel() for index in indices]
    offsets, size = offsets_of(counts, [tensor.element_size() for tensor in tensors])
    out = torch.empty(size, dtype=torch.uint8, device=tensors[0].device)
    values = [out.data_ptr() + offset for offset in offsets]
    _run_on_places("gather_at", Places(tensors, indices, values_at=values))
    return [
        out[offset : offset + count * tensor.element_size()].view(tensor.dtype)
        for tensor, offset, count in zip(tensors, offsets, counts, strict=True)
    ]


def write_at_(
    tensors: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor]
) -> None:
    """`ops.write_at_` in compiled code; arguments and errors as for `zero_at_`."""
    if tensors:
        _run_on_places("write_at", Places(tensors, indices, values))


def zero_at_(tensors: Sequence[Tensor], indices: Sequence[Tensor]) -> None:
    """`ops.zero_at_` in compiled code: one call, and on CUDA one launch, per device.

    The arguments have passed the checks of `ops.zero_at_`; all tensors lie on one device.
    Raises: RuntimeError if the extension cannot run there or CUDA reports an error.
    """
    if tensors:
        _run_on_places("zero_at", Places(tensors, indices))


def _run_on_places(op: str, places: Places) -> None:
    extension = loaded()
    rows = {"rows": places.rows_at, "num_rows": places.num_rows}
    if places.device.type == "cpu":
        getattr(extension, f"{op}_cpu")(**rows, num_workers=torch.get_num_threads())
        return
    with torch.cuda.device(places.device):
        stream = torch.cuda.current_stream(places.device).cuda_stream
        getattr(extension, f"{op}_cuda")(**rows, max_count=places.max_count, stream=stream)
