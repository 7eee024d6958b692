"""Weight importance of a batch of ragged examples, in one pass over the accumulator.

    acc[e] += sum over the examples b of e of | G_b^T X_b |

X_b [T_b, C] are a Linear layer's inputs on the tokens of one example, G_b [T_b, R] the gradients of
its loss with respect to the layer's outputs. G_b^T X_b is that example's gradient of the weight;
DEAN (arXiv 2410.16672) takes its absolute value before the sum over examples. e is an expert of a
stacked layer; an ordinary layer has one.

Each program owns a tile of the weight and goes over all examples. The tile of one example's product
grows in registers (`part`), and at the example's end its absolute value is added to `total`. So no
[B, R, C] array exists, and the accumulator is read and written once per batch. The order of
additions depends on the sizes alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdean.kernels import interpreted, on_device
from fastdean.kernels.settings import (
    TileSetting,
    capability_of,
    searched,
    searched_settings,
    tile_setting,
)
from fastdean.kernels.token_blocks import placed_token_blocks, token_blocks

# Tokens a block -> the blocks, and where each expert's begin.
_Blocks = Callable[[int], tuple[Tensor, Tensor]]

# Rows of tiles that are worked on together: they share the inputs' columns in the L2 cache.
_GROUP_R = 8


@triton.jit
def _importance_kernel(
    acc_ptr,
    x_ptr,
    g_ptr,
    blocks_ptr,
    first_ptr,
    R,
    C,
    stride_ae,
    stride_ar,
    stride_ac,
    stride_xt,
    stride_xc,
    stride_gt,
    stride_gr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP_R: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    expert = tl.program_id(1)
    lo = tl.load(first_ptr + expert)
    hi = tl.load(first_ptr + expert + 1)
    # An expert without tokens costs neither a read nor a write of its accumulator.
    if lo == hi:
        return

    pid = tl.program_id(0)
    num_r = tl.cdiv(R, BLOCK_R)
    per_group = GROUP_R * tl.cdiv(C, BLOCK_C)
    top = (pid // per_group) * GROUP_R
    height = min(num_r - top, GROUP_R)
    start_r = (top + (pid % per_group) % height).to(tl.int64) * BLOCK_R
    start_c = ((pid % per_group) // height).to(tl.int64) * BLOCK_C

    offs_r = start_r + tl.arange(0, BLOCK_R)
    offs_c = start_c + tl.arange(0, BLOCK_C)
    offs_t = tl.arange(0, BLOCK_T).to(tl.int64)
    mask_r = offs_r < R
    mask_c = offs_c < C
    g_offs = offs_t[:, None] * stride_gt + offs_r[None, :] * stride_gr
    x_offs = offs_t[:, None] * stride_xt + offs_c[None, :] * stride_xc

    part = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    # Carried one step ahead: a step that first had to look up its own row would keep the compiler
    # from starting the loads of x and g several steps early.
    row = tl.load(blocks_ptr + 2 * lo)
    left = tl.load(blocks_ptr + 2 * lo + 1)
    for i in range(lo, hi):
        # Both operands are masked: rows outside the example may hold NaN, and 0 * NaN is NaN.
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

    # Addresses made here, not above: they would occupy registers all through the loop.
    acc_ptr += expert.to(tl.int64) * stride_ae
    acc_ptrs = acc_ptr + offs_r[:, None] * stride_ar + offs_c[None, :] * stride_ac
    if EVEN:
        tl.store(acc_ptrs, tl.load(acc_ptrs) + total)
    else:
        mask = mask_r[:, None] & mask_c[None, :]
        tl.store(acc_ptrs, tl.load(acc_ptrs, mask=mask, other=0.0) + total, mask=mask)


def accumulate_importance_(acc: Tensor, x: Tensor, g: Tensor, segments: Tensor) -> None:
    """See `ops.accumulate_importance_`."""

    def blocks(block_tokens: int) -> tuple[Tensor, Tensor]:
        return placed_token_blocks(
            segments, num_rows=x.shape[0], block_tokens=block_tokens, device=x.device
        )

    _accumulate_(acc.unsqueeze(0), x, g, len(segments), blocks)


def accumulate_expert_importance_(
    acc: Tensor, x: Tensor, g: Tensor, segments: Tensor, experts: Tensor
) -> None:
    """See `ops.accumulate_expert_importance_`."""
    segments, experts = (t.to(x.device, non_blocking=True) for t in (segments, experts))

    def blocks(block_tokens: int) -> tuple[Tensor, Tensor]:
        return token_blocks(
            segments,
            num_rows=x.shape[0],
            block_tokens=block_tokens,
            owners=experts,
            num_owners=acc.shape[0],
        )

    _accumulate_(acc, x, g, len(segments), blocks)


def _accumulate_(acc: Tensor, x: Tensor, g: Tensor, num_examples: int, blocks: _Blocks) -> None:
    # A kernel sees the memory of a negated view, not that it is negated.
    x, g = x.resolve_neg(), g.resolve_neg()
    _, rows, columns = acc.shape
    if acc.numel() == 0 or x.shape[0] == 0 or num_examples == 0:
        return
    mean_tokens = x.shape[0] / num_examples
    chip = (x.dtype, capability_of(x.device))
    strided = any(tensor.stride(-1) != 1 for tensor in (acc, x, g))
    default = tile_setting(rows, columns, mean_tokens, *chip, strided=strided)
    with on_device(x.device):
        setting = searched(
            (acc.shape, default.block_t, strided, x.dtype, x.device),
            default,
            searched_settings(rows, columns, *chip, strided=strided),
            lambda each: _launch(torch.empty_like(acc), x, g, *blocks(each.block_t), each),
        )
        _launch(acc, x, g, *blocks(setting.block_t), setting)


def _launch(
    acc: Tensor, x: Tensor, g: Tensor, blocks: Tensor, first: Tensor, setting: TileSetting
) -> None:
    experts, rows, columns = acc.shape
    _importance_kernel[(setting.programs(rows, columns), experts)](
        acc,
        x,
        g,
        blocks,
        first,
        rows,
        columns,
        *acc.stride(),
        *x.stride(),
        *g.stride(),
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
