"""The masked weights of one parameter: their places, original values and suppressed values.

A weight is addressed by its flat row-major index, and values are compared bit by bit: the originals
are what tells one model from another.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdean.wording.mendable import InputTypeError

EDITABLE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class MaskEntry:
    """The masked weights of one parameter.

    Args:
        index: int64 [M], flat row-major indices, strictly ascending, on the CPU.
        original: [M], the values there, in the parameter's dtype, finite, on the CPU.
        shape: the parameter's shape.
    Raises:
        TypeError, ValueError: anything else.
    """

    index: Tensor
    original: Tensor
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        _check_tensor("index", self.index, (torch.int64,))
        _check_tensor("original", self.original, EDITABLE_DTYPES)
        if self.original.shape != self.index.shape:
            raise ValueError(
                f"original must have one value per index ({len(self)}), got {len(self.original)}"
            )
        if len(self) and not bool((self.index[1:] > self.index[:-1]).all()):
            raise ValueError("index must be strictly ascending, got another order; sort it")
        if len(self) and not 0 <= int(self.index[0]) <= int(self.index[-1]) < self.numel:
            raise ValueError(
                f"index must be within 0..{self.numel - 1} for shape {list(self.shape)}, "
                f"got {int(self.index[0])}..{int(self.index[-1])}"
            )
        if not bool(self.original.isfinite().all()):
            raise ValueError("original must be finite, got NaN or infinity; check the model")

    def __len__(self) -> int:
        return self.index.numel()

    @property
    def numel(self) -> int:
        """Elements of the parameter."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The parameter's dtype."""
        return self.original.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of indices and originals."""
        return self.index.nbytes + self.original.nbytes

    def equals(self, other: MaskEntry) -> bool:
        """Whether both address the same weights and hold the same bits."""
        return (
            self.shape == other.shape
            and self.dtype == other.dtype
            and torch.equal(self.index, other.index)
            and bool(same_bits(self.original, other.original).all())
        )

    def require_same_originals(self, other: MaskEntry, name: str) -> None:
        """Raise ValueError unless both can be entries of the parameter `name` of one model."""
        if self.shape != other.shape or self.dtype != other.dtype:
            raise ValueError(
                f"masks must agree on the shape and dtype of {name!r}, got {list(self.shape)} "
                f"{self.dtype} and {list(other.shape)} {other.dtype}"
            )
        here, there = shared_positions(self.index, other.index)
        if not bool(same_bits(self.original[here], other.original[there]).all()):
            raise ValueError(
                "masks must hold the same originals where both hold a weight, got others in "
                f"{name!r} ({here.numel()} shared weights); they were made on different models"
            )

    def union(self, other: MaskEntry) -> MaskEntry:
        """The weights in either; the originals must agree."""
        index, place = torch.cat([self.index, other.index]).unique(return_inverse=True)
        original = torch.empty(index.shape, dtype=self.dtype, device="cpu")
        original[place] = torch.cat([self.original, other.original])
        return MaskEntry(index, original, self.shape)

    def intersection(self, other: MaskEntry) -> MaskEntry:
        """The weights in both."""
        return self._where(torch.isin(self.index, other.index))

    def difference(self, other: MaskEntry) -> MaskEntry:
        """The weights in this one only."""
        return self._where(~torch.isin(self.index, other.index))

    def empty(self) -> MaskEntry:
        """None of the weights, of the same parameter."""
        return MaskEntry(self.index[:0], self.original[:0], self.shape)

    def _where(self, keep: Tensor) -> MaskEntry:
        return MaskEntry(self.index[keep], self.original[keep], self.shape)


def checked_scale(scale: Any) -> float:
    """A finite factor as a float; TypeError or ValueError for anything else."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise InputTypeError(f"scale must be a number, got {type(scale).__name__}")
    # An integer may be too large for a float, and finite all the same.
    if not abs(scale) <= sys.float_info.max:
        raise ValueError(f"scale must be finite, got {scale}")
    # So that -0.0 reads as the 0 that it does.
    return float(scale) + 0.0


def suppressed(original: Tensor, scale: float, dtype: torch.dtype | None = None) -> Tensor:
    """`original * scale`, computed in float32 (float64 for float64), rounded once to `dtype`.

    Args:
        original: [M], a dtype of `EDITABLE_DTYPES`.
        dtype: of the result; None is that of `original`.
    Returns:
        [M]; at scale 0 positive zeros throughout, for negative originals too.
    """
    dtype = dtype or original.dtype
    if scale == 0.0:
        return torch.zeros(original.shape, dtype=dtype, device=original.device)
    wide = torch.promote_types(original.dtype, torch.float32)
    return original.to(wide).mul(scale).to(dtype)


def same_bits(left: Tensor, right: Tensor) -> Tensor:
    """Elementwise bit equality of two tensors of one dtype and shape: -0.0 is not 0.0. bool [M]."""
    bits = _BITS[left.element_size()]
    return left.contiguous().view(bits) == right.contiguous().view(bits)


def shared_positions(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The positions, in each, of the indices that are in both, int64; `right` is ascending."""
    here = torch.isin(left, right).nonzero().flatten()
    return here, torch.searchsorted(right, left[here])


def _check_tensor(name: str, tensor: Any, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise InputTypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise InputTypeError(f"{name} must be {expected}, got {tensor.dtype}")
    if tensor.dim() != 1 or tensor.device.type != "cpu":
        raise ValueError(
            f"{name} must be 1-D and on the CPU, got {tensor.dim()}-D on {tensor.device}"
        )
