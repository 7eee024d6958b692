"""Sums of a matrix's bits on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdean.native.extension import loaded
from fastdean.native.structs import written

# Below it a second thread takes longer to start than to read.
_LEAST_BYTES_OF_A_WORKER = 1 << 20


def bit_sums(bits: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.bit_sums` in compiled code, of integers [R, C] on the CPU."""
    rows, columns = bits.shape
    most = bits.numel() * bits.element_size() // _LEAST_BYTES_OF_A_WORKER
    num_workers = max(1, min(torch.get_num_threads(), most, rows))
    of_rows = torch.zeros(rows, dtype=torch.int64, device="cpu")
    of_columns = torch.zeros((num_workers, columns), dtype=torch.int64, device="cpu")
    params = written(
        "BitSumsParams",
        bits=bits.data_ptr(),
        stride_r=bits.stride(0),
        stride_c=bits.stride(1),
        bytes=bits.element_size(),
        rows=rows,
        columns=columns,
        of_rows=of_rows.data_ptr(),
        of_columns=of_columns.data_ptr(),
        num_workers=num_workers,
    )
    loaded().bit_sums_cpu(params=params.buffer_info()[0])
    return of_rows, of_columns.sum(0)
