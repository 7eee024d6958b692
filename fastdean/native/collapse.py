"""The collapse-alignment loss and its backward, on the CPU and on CUDA."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from fastdean.native.extension import cpu_level, dtype_code, loaded
from fastdean.native.structs import written


def collapse_alignment(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    sums: Tensor,
    counts: Tensor,
    decay: float,
    statistic: str,
    *,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ops.collapse_alignment` in compiled code, with the centre and factors for its backward.

    The arguments have passed its checks. With `in_place`, CPU only, the batch joins `sums` and
    `counts`, which must be contiguous, and these are returned; an error leaves them unchanged.
    """
    features, weight = _with_contiguous_rows(features), _with_contiguous_rows(weight)
    labels, sums, counts = labels.contiguous(), sums.contiguous(), counts.contiguous()
    loss = sums.new_empty(())
    centre, factors = sums.new_empty(sums.shape[1]), sums.new_empty(3, len(sums))
    if in_place:
        new_sums, new_counts = sums, counts
    else:
        new_sums, new_counts = torch.empty_like(sums), torch.empty_like(counts)
    decay_cell = array("d", [decay])
    _run_collapse(
        "collapse_alignment",
        weight.device,
        features=features.data_ptr(),
        features_stride=features.stride(0),
        features_dtype=dtype_code(features.dtype),
        labels=labels.data_ptr(),
        weight=weight.data_ptr(),
        weight_stride=weight.stride(0),
        weight_dtype=dtype_code(weight.dtype),
        old_sums=sums.data_ptr(),
        old_counts=counts.data_ptr(),
        decay=decay_cell.buffer_info()[0],
        statistic=loaded().COLLAPSE_STATISTICS[statistic],
        sums=new_sums.data_ptr(),
        counts=new_counts.data_ptr(),
        centre=centre.data_ptr(),
        factors=factors.data_ptr(),
        loss=loss.data_ptr(),
        sums_dtype=dtype_code(sums.dtype),
        rows=len(labels),
        columns=sums.shape[1],
        classes=len(sums),
    )
    return loss, new_sums, new_counts, centre, factors


def collapse_alignment_backward(
    grad_loss: Tensor,
    labels: Tensor,
    weight: Tensor,
    sums: Tensor,
    counts: Tensor,
    centre: Tensor,
    factors: Tensor,
    features_dtype: torch.dtype,
    needs_weight: bool,
    needs_features: bool,
) -> tuple[Tensor, Tensor]:
    """`ops.collapse_alignment_backward` in compiled code."""
    weight, labels = _with_contiguous_rows(weight), labels.contiguous()
    sums, counts, centre, factors = (t.contiguous() for t in (sums, counts, centre, factors))
    grad_weight = weight.new_empty(sums.shape if needs_weight else 0)
    shape = (len(labels), sums.shape[1]) if needs_features else 0
    grad_features = weight.new_empty(shape, dtype=features_dtype)
    if needs_weight or needs_features:
        _run_collapse(
            "collapse_alignment_backward",
            weight.device,
            features_dtype=dtype_code(features_dtype),
            labels=labels.data_ptr(),
            weight=weight.data_ptr(),
            weight_stride=weight.stride(0),
            weight_dtype=dtype_code(weight.dtype),
            sums=sums.data_ptr(),
            counts=counts.data_ptr(),
            centre=centre.data_ptr(),
            factors=factors.data_ptr(),
            sums_dtype=dtype_code(sums.dtype),
            grad_loss=grad_loss.data_ptr(),
            grad_weight=grad_weight.data_ptr() if needs_weight else 0,
            # An empty tensor has address 0 too, and nothing to compute.
            grad_features=grad_features.data_ptr() if needs_features else 0,
            rows=len(labels),
            columns=sums.shape[1],
            classes=len(sums),
        )
    return grad_weight, grad_features


def _with_contiguous_rows(matrix: Tensor) -> Tensor:
    """The matrix, or a copy if a row's elements do not lie side by side."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _run_collapse(op: str, device: torch.device, **fields: int) -> None:
    """Calls the compiled `op`; `fields` may leave out those it does not read."""
    extension = loaded()
    common = {"level": cpu_level(), "num_workers": torch.get_num_threads()}
    params = written("CollapseParams", **fields, **common)
    address = params.buffer_info()[0]
    if device.type == "cpu":
        size = extension.collapse_workspace_bytes(params=address)
        workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
        params[-1] = workspace.data_ptr()
        getattr(extension, f"{op}_cpu")(params=address)
        return
    with torch.cuda.device(device):
        size = extension.collapse_cuda_workspace_bytes(params=address)
        # Freed while the kernels may still run: safe, the allocator reuses memory in the order of
        # this stream.
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        params[-1] = workspace.data_ptr()
        stream = torch.cuda.current_stream(device).cuda_stream
        getattr(extension, f"{op}_cuda")(params=address, stream=stream)
