"""Weight importance and its exact top k in one operation, without sums of the weight's size.

    value = |W| * (sum over the examples b of a set of | G_b^T X_b |) / n,  every step in fp32;
    for each set the k largest positive values, ties to the lowest flat index

 1. `_tiles_kernel` computes each tile's sums as `_importance_kernel` does, in registers, multiplies
    them with |W| and writes the largest product of each of the tile's rows: 4 / BLOCK_C bytes an
    entry. The k-th largest of these is reached by k entries, one in each of k rows, so no entry
    below it can be among the top k (but for ties that the division makes).
 2. The tiles that reach this bound are computed again, by the same program: the same instructions
    in the same order, so the same bits. Now their sums are written, those of entries below the
    bound as -1.
 3. These candidates, in flat order, go through `select_top`.

Where k is more than the rows of tiles, or more than half of the tiles reach the bound, the sums of
one set at a time are made after all, with `accumulate_importance_` and `select_top`.

Bytes: x and g once for each tile that reads them (from the cache, mostly), the weight once for each
set; operations: those of the accumulation, and once more those of the tiles that reach the bound.

Signed sums are taken last, at the selected entries alone: 2 N M operations.

Source: DEAN (arXiv 2410.16672), importance score; the bound from maxima is our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdean.kernels import interpreted, on_device
from fastdean.kernels.importance import accumulate_importance_
from fastdean.kernels.selection import select_top
from fastdean.kernels.settings import TileSetting, capability_of, tile_setting
from fastdean.kernels.token_blocks import token_blocks

_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows of tiles that are worked on together: they share the inputs' columns in the L2 cache.
_GROUP_R = 8
# If more of the tiles reach the bound, computing all sums once takes less.
_LARGEST_SHARE = 0.5
_BLOCK_M = 32  # entries of a program that adds signed sums
_SIGNED_WARPS = 4

_MAGNITUDE_BITS = tl.constexpr(0x7FFFFFFF)
_INFINITY_BITS = tl.constexpr(0x7F800000)
_INFINITY = _INFINITY_BITS.value
# Below the bits of every number, also of NaN with a sign.
_LOWEST_BITS = -(2**31)


@triton.jit(do_not_specialize=["num_tiles", "first_set", "least", "writes_sums"])
def _tiles_kernel(
    maxima_ptr,
    sums_ptr,
    tiles_ptr,
    x_ptr,
    g_ptr,
    weight_ptr,
    blocks_ptr,
    first_ptr,
    R,
    C,
    num_tiles,
    first_set,
    least,
    writes_sums,
    stride_xt,
    stride_xc,
    stride_gt,
    stride_gr,
    stride_wr,
    stride_wc,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP_R: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Bits of each row's largest product, int32 [sets, num_tiles, BLOCK_R], or if `writes_sums`
    fp32 [programs, BLOCK_R, BLOCK_C]: the sum where the product's bits reach `least`, else -1.

    A row with a NaN or Inf has a maximum of at least Inf's bits. One program for both, and no
    constant that differs, so that both compute the same bits.
    """
    examples = first_set + tl.program_id(1)
    lo = tl.load(first_ptr + examples)
    hi = tl.load(first_ptr + examples + 1)
    tile = tl.load(tiles_ptr + tl.program_id(0))
    num_r = tl.cdiv(R, BLOCK_R)
    per_group = GROUP_R * tl.cdiv(C, BLOCK_C)
    top = (tile // per_group) * GROUP_R
    height = min(num_r - top, GROUP_R)
    start_r = (top + (tile % per_group) % height) * BLOCK_R
    start_c = ((tile % per_group) // height) * BLOCK_C

    offs_r = start_r + tl.arange(0, BLOCK_R)
    offs_c = start_c + tl.arange(0, BLOCK_C)
    offs_t = tl.arange(0, BLOCK_T).to(tl.int64)
    mask_r = offs_r < R
    mask_c = offs_c < C
    g_offs = offs_t[:, None] * stride_gt + offs_r[None, :] * stride_gr
    x_offs = offs_t[:, None] * stride_xt + offs_c[None, :] * stride_xc

    # As in `_importance_kernel`, whose comments hold here too.
    part = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    row = tl.load(blocks_ptr + 2 * lo)
    left = tl.load(blocks_ptr + 2 * lo + 1)
    for i in range(lo, hi):
        mask_t = offs_t[:, None] < left
        mask_g = mask_t if EVEN else mask_t & mask_r[None, :]
        mask_x = mask_t if EVEN else mask_t & mask_c[None, :]
        g = tl.load(g_ptr + row * stride_gt + g_offs, mask=mask_g, other=0.0)
        x = tl.load(x_ptr + row * stride_xt + x_offs, mask=mask_x, other=0.0)
        if UPCAST:
            g = g.to(tl.float32)
            x = x.to(tl.float32)
        part = tl.dot(tl.trans(g), x, part, input_precision="ieee")
        last = left <= BLOCK_T
        row = tl.load(blocks_ptr + 2 * i + 2)
        left = tl.load(blocks_ptr + 2 * i + 3)
        if last:
            total += tl.abs(part)
            part = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)

    weight_ptrs = weight_ptr + offs_r[:, None] * stride_wr + offs_c[None, :] * stride_wc
    weight = tl.load(weight_ptrs, mask=mask_r[:, None] & mask_c[None, :], other=0.0)
    product = (total * tl.abs(weight.to(tl.float32))).to(tl.int32, bitcast=True)
    if writes_sums:
        total = tl.where(product >= least, total, -1.0)
        in_tile = tl.arange(0, BLOCK_R)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * (BLOCK_R * BLOCK_C) + in_tile, total)
    else:
        magnitude = product & _MAGNITUDE_BITS
        largest = tl.max(tl.where(magnitude >= _INFINITY_BITS, magnitude, product), 1)
        place = tl.program_id(1).to(tl.int64) * num_tiles + tl.program_id(0)
        tl.store(maxima_ptr + place * BLOCK_R + tl.arange(0, BLOCK_R), largest)


@triton.jit(do_not_specialize=["M", "number"])
def _signed_kernel(
    signed_ptr,
    index_ptr,
    x_ptr,
    g_ptr,
    blocks_ptr,
    first_ptr,
    M,
    C,
    number,
    stride_xt,
    stride_xc,
    stride_gt,
    stride_gr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """fp32 [M]: the sum over all tokens t of a set of g_tr x_tc at flat indices r * C + c."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    index = tl.load(index_ptr + offs_m, mask=mask_m, other=0)
    offs_t = tl.arange(0, BLOCK_T).to(tl.int64)
    g_offs = offs_t[:, None] * stride_gt + (index // C)[None, :] * stride_gr
    x_offs = offs_t[:, None] * stride_xt + (index % C)[None, :] * stride_xc
    total = tl.zeros((BLOCK_T, BLOCK_M), dtype=tl.float32)
    for i in range(tl.load(first_ptr + number), tl.load(first_ptr + number + 1)):
        row = tl.load(blocks_ptr + 2 * i)
        mask = (offs_t < tl.load(blocks_ptr + 2 * i + 1))[:, None] & mask_m[None, :]
        g = tl.load(g_ptr + row * stride_gt + g_offs, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * stride_xt + x_offs, mask=mask, other=0.0).to(tl.float32)
        total += g * x
    tl.store(signed_ptr + offs_m, tl.sum(total, 0), mask=mask_m)


@dataclass(frozen=True)
class _Problem:
    """One weight with all examples of all sets, and how it is cut.

    Attributes:
        blocks, first: token blocks of the examples, on the device, and where each set's begin.
    """

    x: Tensor
    g: Tensor
    weight: Tensor
    blocks: Tensor
    first: Tensor
    setting: TileSetting

    @property
    def num_tiles(self) -> int:
        return self.setting.programs(*self.weight.shape)

    def launch(
        self,
        maxima: Tensor,
        sums: Tensor,
        tiles: Tensor,
        sets: int,
        first_set: int,
        least: int,
        writes_sums: bool,
    ) -> None:
        rows, columns = self.weight.shape
        setting = self.setting
        _tiles_kernel[(len(tiles), sets)](
            *(maxima, sums, tiles, self.x, self.g, self.weight, self.blocks, self.first),
            *(rows, columns, len(tiles), first_set, least, int(writes_sums)),
            *self.x.stride(),
            *self.g.stride(),
            *self.weight.stride(),
            BLOCK_R=setting.block_r,
            BLOCK_C=setting.block_c,
            BLOCK_T=setting.block_t,
            GROUP_R=_GROUP_R,
            EVEN=setting.divides(rows, columns),
            # The interpreter multiplies bf16 operands as if they were integers.
            UPCAST=interpreted(),
            num_warps=setting.num_warps,
            num_stages=setting.num_stages,
            enable_fp_fusion=False,
        )

    def row_maxima(self, sets: int) -> Tensor:
        """int32 [sets, tiles, BLOCK_R]."""
        shape = (sets, self.num_tiles, self.setting.block_r)
        maxima = torch.empty(shape, dtype=torch.int32, device=self.x.device)
        tiles = torch.arange(self.num_tiles, device=self.x.device)
        self.launch(maxima, self._nothing(torch.float32), tiles, sets, 0, 0, False)
        return maxima

    def tile_sums(self, number: int, tiles: Tensor, least: int) -> Tensor:
        """fp32 [len(tiles), BLOCK_R, BLOCK_C] of one set; -1 where a product is below `least`."""
        shape = (len(tiles), self.setting.block_r, self.setting.block_c)
        sums = torch.empty(shape, dtype=torch.float32, device=self.x.device)
        self.launch(self._nothing(torch.int32), sums, tiles, 1, number, least, True)
        return sums

    def _nothing(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(1, dtype=dtype, device=self.x.device)

    def starts(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """First row and column of tiles, as the kernel finds them."""
        rows, columns = self.weight.shape
        num_r = -(-rows // self.setting.block_r)
        per_group = _GROUP_R * -(-columns // self.setting.block_c)
        top = tiles // per_group * _GROUP_R
        height = (num_r - top).clamp_max(_GROUP_R)
        start_r = (top + tiles % per_group % height) * self.setting.block_r
        return start_r, tiles % per_group // height * self.setting.block_c

    def entries(self, sums: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Flat indices, ascending, and sums of what `tile_sums` has not left out."""
        rows, columns = self.weight.shape
        # NaN is no less than 0 and no more: it is kept where it was not left out.
        tile, r, c = (~(sums < 0)).nonzero(as_tuple=True)
        start_r, start_c = (each[tile] for each in self.starts(tiles))
        row, column = start_r + r, start_c + c
        inside = (row < rows) & (column < columns)
        flat, order = (row * columns + column)[inside].sort()
        return flat, sums[tile, r, c][inside][order]


def select_importance(
    x: Tensor,
    g: Tensor,
    segments: Tensor,
    sets: Tensor,
    weight: Tensor,
    k: Sequence[int],
    *,
    batches: Tensor | None = None,
    signed: bool = False,
) -> list[tuple[Tensor, ...]]:
    """See `ops.select_importance`."""
    # `batches` changes nothing: each example's sums are its own, and those of a set are added one
    # by one. A call of `accumulate_importance_` for each batch adds totals of batches, which may
    # round otherwise.
    # A kernel sees the memory of a negated view, not that it is negated.
    x, g, weight = (each.detach().resolve_neg() for each in (x, g, weight))
    weight = weight if weight.dtype in _WEIGHT_DTYPES else weight.float()
    nothing = [torch.empty(0, dtype=torch.float32, device=x.device)] * (1 + signed)
    if weight.numel() == 0 or not k:
        return [(torch.empty(0, dtype=torch.int64, device=x.device), *nothing) for _ in k]
    with on_device(x.device):
        problem = _problem(x, g, segments, sets, weight, len(k))
        maxima = problem.row_maxima(len(k))
        bounds, largest = _bounds(maxima, k)
        found: list[tuple[Tensor, ...]] = []
        for number, each in enumerate(k):
            mine = segments[sets == number]
            num_examples = max(1, len(mine))
            if largest[number] >= _INFINITY:
                raise _not_finite_error(problem, number, maxima[number])
            index, sums = _selected(
                problem, number, maxima[number], bounds[number], mine, num_examples, each
            )
            more = [_signed_sums(problem, number, index)] if signed else []
            found.append((index, sums, *more))
    return found


def _problem(
    x: Tensor, g: Tensor, segments: Tensor, sets: Tensor, weight: Tensor, num_sets: int
) -> _Problem:
    rows, columns = weight.shape
    mean_tokens = len(x) / max(1, len(segments))
    chip = (x.dtype, capability_of(x.device))
    strided = any(tensor.stride(-1) != 1 for tensor in (x, g, weight))
    setting = tile_setting(rows, columns, mean_tokens, *chip, strided=strided)
    if len(segments):
        made = token_blocks(
            segments,
            num_rows=len(x),
            block_tokens=setting.block_t,
            owners=sets,
            num_owners=num_sets,
        )
    else:
        # A block that nobody reads, as kernels load one ahead.
        counts = torch.zeros(num_sets + 3, dtype=torch.int64, device="cpu")
        made = (counts[:2].view(1, 2), counts[2:])
    blocks, first = (tensor.to(x.device) for tensor in made)
    return _Problem(x, g, weight, blocks, first, setting)


def _bounds(maxima: Tensor, k: Sequence[int]) -> tuple[list[int], list[int]]:
    """Of each set: the k-th largest maximum, or 0 without so many positive ones; and the largest.

    The host waits once for all sets.
    """
    flat = maxima.flatten(1)
    largest = flat.max(1).values
    bounds = [
        row.topk(each).values[-1] if 0 < each <= len(row) else row.new_zeros(())
        for row, each in zip(flat, k, strict=True)
    ]
    read = torch.stack([*bounds, *largest]).tolist()
    return [max(0, bound) for bound in read[: len(k)]], read[len(k) :]


def _selected(
    problem: _Problem,
    number: int,
    maxima: Tensor,
    bound: int,
    segments: Tensor,
    num_examples: int,
    k: int,
) -> tuple[Tensor, Tensor]:
    """Flat indices and sums of one set, whose importance is finite."""
    device = problem.x.device
    least = _least_product(bound, num_examples)
    tiles = (maxima.amax(1) >= least).nonzero().squeeze(1)
    if k == 0 or len(tiles) == 0:
        empty = torch.empty(0, dtype=torch.int64, device=device)
        return empty, torch.empty(0, dtype=torch.float32, device=device)
    if k > maxima.numel() or len(tiles) > _LARGEST_SHARE * problem.num_tiles:
        sums = torch.zeros(problem.weight.shape, dtype=torch.float32, device=device)
        accumulate_importance_(sums, problem.x, problem.g, segments)
        index = select_top(sums, problem.weight, num_examples, k)
        return index, sums.flatten()[index]
    flat, sums = problem.entries(problem.tile_sums(number, tiles, least), tiles)
    columns = problem.weight.shape[1]
    weight = problem.weight[flat // columns, flat % columns]
    chosen = select_top(sums, weight, num_examples, k)
    return flat[chosen], sums[chosen]


def _least_product(bound: int, num_examples: int) -> int:
    """Bits of a product, positive, below which no quotient by n reaches that of `bound`'s."""
    value = torch.tensor(bound, dtype=torch.int32, device="cpu").view(torch.float32)
    quotient = float(value / torch.tensor(float(num_examples), dtype=torch.float32, device="cpu"))
    # What rounds to a number is at most half a last place below it: these are more, of normal and
    # of denormal numbers, so that a few candidates too many may come.
    least = min(quotient * (1 - 2.0**-20), quotient - 2.0**-147) * num_examples
    bits = torch.tensor(least, dtype=torch.float32, device="cpu").view(torch.int32)
    return max(1, int(bits))


def _signed_sums(problem: _Problem, number: int, index: Tensor) -> Tensor:
    signed = torch.empty(len(index), dtype=torch.float32, device=index.device)
    if len(index):
        _signed_kernel[(triton.cdiv(len(index), _BLOCK_M),)](
            *(signed, index, problem.x, problem.g, problem.blocks, problem.first),
            *(len(index), problem.weight.shape[1], number),
            *problem.x.stride(),
            *problem.g.stride(),
            BLOCK_M=_BLOCK_M,
            BLOCK_T=problem.setting.block_t,
            num_warps=_SIGNED_WARPS,
            enable_fp_fusion=False,
        )
    return signed


def _not_finite_error(problem: _Problem, number: int, maxima: Tensor) -> ValueError:
    """For the set's first entry whose importance is not finite; its row is among `maxima`."""
    tile, r = (maxima >= _INFINITY).nonzero(as_tuple=True)
    row = problem.starts(tile)[0] + r
    tiles = tile[row == row.min()].unique()
    flat, sums = problem.entries(problem.tile_sums(number, tiles, _LOWEST_BITS), tiles)
    columns = problem.weight.shape[1]
    value = sums * problem.weight[flat // columns, flat % columns].float().abs()
    first = int((~value.isfinite()).nonzero()[0])
    return ValueError(
        f"importance must be finite, got {float(value[first])} at flat index {int(flat[first])}; "
        "check the losses and the model's weights"
    )
