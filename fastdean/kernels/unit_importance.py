"""Unit importance of a batch of ragged examples, in one pass over both inputs.

    acc[j] += sum over the examples b of | sum over its tokens t of a_tj g_tj |

a [N, C] are the activations of the C intermediate units of an MLP, g [N, C] the gradients of the
loss with respect to them: activation x gradient, the first-order effect of deactivating a unit.

The work is memory traffic: 2 N C elements read once. The first kernel writes one fp32 row per block
of tokens (an example, or a part of a long one), the second adds the rows up: 1 to 3 % more bytes.
No atomics, so the order of additions depends on the sizes alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdean.kernels import on_device
from fastdean.kernels.token_blocks import placed_token_blocks

_BLOCK_C = 128
# Tokens, and rows, that a program of the first kernel, and of the second, reads at a time.
_BLOCK_T = 32
_BLOCK_M = 32
_NUM_WARPS = 4
# One program per column block reads an example, unless these are too few to keep memory busy. Then
# long examples are cut into parts of this many tokens.
_PART_TOKENS = 512
_ENOUGH_PROGRAMS = 2048


@triton.jit
def _unit_parts_kernel(
    parts_ptr,
    a_ptr,
    g_ptr,
    blocks_ptr,
    C,
    stride_at,
    stride_ac,
    stride_gt,
    stride_gc,
    part_tokens,
    ABSOLUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    pid = tl.program_id(0)
    num_c = tl.cdiv(C, BLOCK_C)
    block = (pid // num_c).to(tl.int64)
    offs_c = (pid % num_c).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_t = tl.arange(0, BLOCK_T).to(tl.int64)
    mask_c = offs_c < C
    row = tl.load(blocks_ptr + 2 * block)
    rows = tl.minimum(tl.load(blocks_ptr + 2 * block + 1), part_tokens)
    a_ptrs = a_ptr + (row + offs_t)[:, None] * stride_at + offs_c[None, :] * stride_ac
    g_ptrs = g_ptr + (row + offs_t)[:, None] * stride_gt + offs_c[None, :] * stride_gc
    total = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for t in range(0, rows, BLOCK_T):
        mask = (offs_t < rows - t)[:, None] & mask_c[None, :]
        a = tl.load(a_ptrs, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptrs, mask=mask, other=0.0).to(tl.float32)
        total += a * g
        a_ptrs += BLOCK_T * stride_at
        g_ptrs += BLOCK_T * stride_gt
    part = tl.sum(total, axis=0)
    if ABSOLUTE:
        part = tl.abs(part)
    tl.store(parts_ptr + block * C + offs_c, part, mask=mask_c)


@triton.jit
def _unit_sum_kernel(
    acc_ptr,
    parts_ptr,
    C,
    num_parts,
    stride_acc,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Adds up rows that are whole examples."""
    offs_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    mask_c = offs_c < C
    total = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for m in range(0, num_parts, BLOCK_M):
        mask = (offs_m < num_parts - m)[:, None] & mask_c[None, :]
        parts_ptrs = parts_ptr + (m + offs_m)[:, None] * C + offs_c[None, :]
        total += tl.load(parts_ptrs, mask=mask, other=0.0)
    acc_ptrs = acc_ptr + offs_c * stride_acc
    acc = tl.load(acc_ptrs, mask=mask_c, other=0.0)
    tl.store(acc_ptrs, acc + tl.sum(total, axis=0), mask=mask_c)


@triton.jit
def _unit_join_kernel(
    acc_ptr,
    parts_ptr,
    blocks_ptr,
    C,
    num_parts,
    stride_acc,
    part_tokens,
    BLOCK_C: tl.constexpr,
):
    """Joins the parts of each example, in order, before the absolute value."""
    offs_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    example = tl.zeros((BLOCK_C,), dtype=tl.float32)
    total = tl.zeros((BLOCK_C,), dtype=tl.float32)
    parts_ptrs = parts_ptr + offs_c
    for m in range(0, num_parts):
        example += tl.load(parts_ptrs, mask=mask_c, other=0.0)
        parts_ptrs += C
        if tl.load(blocks_ptr + 2 * m + 1) <= part_tokens:
            total += tl.abs(example)
            example = tl.zeros((BLOCK_C,), dtype=tl.float32)
    acc_ptrs = acc_ptr + offs_c * stride_acc
    acc = tl.load(acc_ptrs, mask=mask_c, other=0.0)
    tl.store(acc_ptrs, acc + total, mask=mask_c)


def accumulate_unit_importance_(acc: Tensor, a: Tensor, g: Tensor, segments: Tensor) -> None:
    """See `ops.accumulate_unit_importance_`."""
    # A kernel sees the memory of a negated view, not that it is negated.
    a, g = a.resolve_neg(), g.resolve_neg()
    num_rows, units = a.shape
    if units == 0 or num_rows == 0 or len(segments) == 0:
        return
    num_c = triton.cdiv(units, _BLOCK_C)
    longest = int((segments[:, 1] - segments[:, 0]).max())
    whole = longest <= _PART_TOKENS or len(segments) * num_c >= _ENOUGH_PROGRAMS
    part_tokens = max(1, longest) if whole else _PART_TOKENS
    blocks, _ = placed_token_blocks(
        segments, num_rows=num_rows, block_tokens=part_tokens, device=a.device
    )
    num_parts = len(blocks) - 1
    parts = torch.empty(num_parts, units, dtype=torch.float32, device=a.device)
    shared = {"BLOCK_C": _BLOCK_C, "num_warps": _NUM_WARPS, "enable_fp_fusion": False}
    with on_device(a.device):
        _unit_parts_kernel[(num_parts * num_c,)](
            parts,
            a,
            g,
            blocks,
            units,
            *a.stride(),
            *g.stride(),
            part_tokens,
            ABSOLUTE=whole,
            BLOCK_T=_BLOCK_T,
            **shared,
        )
        if whole:
            _unit_sum_kernel[(num_c,)](
                acc, parts, units, num_parts, acc.stride(0), BLOCK_M=_BLOCK_M, **shared
            )
        else:
            _unit_join_kernel[(num_c,)](
                acc, parts, blocks, units, num_parts, acc.stride(0), part_tokens, **shared
            )
