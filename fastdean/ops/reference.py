"""Every operation in plain torch: written to be read, and what runs where nothing faster does.

Arguments have passed the checks of the public functions in `fastdean.ops`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from fastdean.ops.selection import importance


def zero_at_(tensors: Sequence[torch.Tensor], indices: Sequence[torch.Tensor]) -> None:
    """See `ops.zero_at_`."""
    with torch.no_grad():
        for tensor, index in zip(tensors, indices, strict=True):
            coordinates = _coordinates(tensor, index)
            _at_least_1d(tensor).index_put_(coordinates, tensor.new_zeros(()))


def gather_at(
    tensors: Sequence[torch.Tensor], indices: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """See `ops.gather_at`."""
    with torch.no_grad():
        return [
            _at_least_1d(tensor)[_coordinates(tensor, index)]
            for tensor, index in zip(tensors, indices, strict=True)
        ]


def write_at_(
    tensors: Sequence[torch.Tensor],
    indices: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
) -> None:
    """See `ops.write_at_`."""
    with torch.no_grad():
        for tensor, index, value in zip(tensors, indices, values, strict=True):
            coordinates = _coordinates(tensor, index)
            _at_least_1d(tensor).index_put_(coordinates, value.to(tensor.device))


def _at_least_1d(tensor: torch.Tensor) -> torch.Tensor:
    # A scalar has one element, index 0, and no coordinate to address it by.
    return tensor.unsqueeze(0) if tensor.dim() == 0 else tensor


def _coordinates(tensor: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Row-major flat indices [M] as one coordinate [M] per dimension: right for any strides."""
    return torch.unravel_index(index.to(tensor.device), tensor.shape or (1,))


def _block_height(x: torch.Tensor) -> int:
    """Rows of the product to compute at a time."""
    # On a CPU a block stays in a core's cache between the product, the absolute value and the add.
    # Elsewhere many small blocks would wait for their launches: whole matrices, up to the memory
    # that a product may take.
    block_bytes = (1 if x.device.type == "cpu" else 256) * 1024 * 1024
    return max(16, block_bytes // (x.element_size() * max(1, x.shape[1])))


@torch.no_grad()
def accumulate_importance_(
    acc: torch.Tensor, x: torch.Tensor, g: torch.Tensor, segments: torch.Tensor
) -> None:
    """See `ops.accumulate_importance_`."""
    x, g = _at_least_fp32(x), _at_least_fp32(g)
    height = _block_height(x)
    spans = [(start, end) for start, end in segments.tolist() if end > start]
    with _full_fp32_products():
        for top in range(0, acc.shape[0], height):
            block = acc[top : top + height]
            product = x.new_empty(block.shape)
            for start, end in spans:
                torch.mm(g[start:end, top : top + height].T, x[start:end], out=product)
                block += product.abs_()


@torch.no_grad()
def accumulate_expert_importance_(
    acc: torch.Tensor,
    x: torch.Tensor,
    g: torch.Tensor,
    segments: torch.Tensor,
    experts: torch.Tensor,
) -> None:
    """See `ops.accumulate_expert_importance_`."""
    for expert in experts.unique_consecutive().tolist():
        accumulate_importance_(acc[expert], x, g, segments[experts == expert].cpu())


@contextmanager
def _full_fp32_products() -> Iterator[None]:
    """No TF32 and no bf16 inside, whatever the caller allows the model's own products."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    allowed = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, allowed, strict=True):
            backend.fp32_precision = precision


@torch.no_grad()
def accumulate_unit_importance_(
    acc: torch.Tensor, a: torch.Tensor, g: torch.Tensor, segments: torch.Tensor
) -> None:
    """See `ops.accumulate_unit_importance_`."""
    products = _at_least_fp32(a) * _at_least_fp32(g)
    for start, end in segments.tolist():
        acc += products[start:end].sum(0).abs_()


def select_top(
    sums: torch.Tensor, weight: torch.Tensor | None, num_examples: int, k: int
) -> torch.Tensor:
    """See `ops.select_top`."""
    value = importance(sums, weight, num_examples).flatten()
    if not value.isfinite().all():
        first = int((~value.isfinite()).nonzero()[0])
        raise ValueError(
            f"importance must be finite, got {float(value[first])} at flat index {first}; "
            "check the losses and the model's weights"
        )
    k = min(k, int((value > 0).sum()))
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=value.device)
    # torch.topk leaves open which of equal entries it takes, so it only supplies the k-th value.
    threshold = value.topk(k).values[-1]
    above = (value > threshold).nonzero().squeeze(1)
    ties = (value == threshold).nonzero().squeeze(1)[: k - above.numel()]
    return torch.cat([above, ties]).sort().values


def _at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
