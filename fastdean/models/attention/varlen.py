"""Attention of packed examples in one fused kernel: `torch.nn.attention.varlen.varlen_attn`.

    O_s = softmax(scale * Q_s K_s^T, over the last tokens up to the row's own) V_s

for each example s, with the softmax in fp32 and no weights kept. The kernel is FlashAttention's.
What it does not do (fp32, soft-caps, sinks, other masks, other devices) is `declined`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

_WIDEST_HEAD = 256
# Numbers of 16 bits that one load of 16 bytes takes: starts and strides are multiples of it.
_AT_ONCE = 8
# What torch calls `use_deterministic_algorithms(True, warn_only=True)`.
_WARN_ONLY = 1


def declined(
    query: Tensor, key: Tensor, value: Tensor, *, softcap: float | None, sinks: Tensor | None
) -> str | None:
    """Why the kernel does not take these [1, H, N, d], or None where it does."""
    width = query.shape[-1]
    if softcap is not None or sinks is not None:
        return "it has no soft-caps and no sinks"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return "it takes bf16 and fp16 only"
    if not query.dtype == key.dtype == value.dtype:
        return "it takes queries, keys and values of one dtype"
    if not width == key.shape[-1] == value.shape[-1]:
        return "it takes queries, keys and values of one width"
    if width % _AT_ONCE or width > _WIDEST_HEAD:
        return f"it takes heads of a multiple of {_AT_ONCE} up to {_WIDEST_HEAD}"
    if torch.get_deterministic_debug_mode() == _WARN_ONLY:
        return "its backward pass repeats its bits in torch's strict mode only, not in warn_only"
    if query.shape[1] != key.shape[1] and "enable_gqa" not in _options():
        return "this torch's does not say that heads may share keys"
    return lacking(query.device)


def lacking(device: torch.device) -> str | None:
    """Why there is no such kernel on this device, or None where there is."""
    if device.type != "cuda" or torch.version.cuda is None:
        return "it runs on CUDA only"
    if not {"scale", "window_size"} <= _options():
        return "this torch has none with a scale and a window"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this torch was built without FlashAttention"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it runs on GPUs of compute capability 8.0 and above"
    return None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    longest: int,
    window: tuple[int, int],
    scaling: float,
) -> Tensor:
    """Attention of each example by itself, with gradients.

    In torch's strict mode (`use_deterministic_algorithms(True)`) the backward pass repeats its
    bits, as torch's source says; else it adds with atomics.

    Args:
        query: bf16 or fp16 [1, H, N, d]; key, value: [1, H_kv, N, d], H a multiple of H_kv.
        offsets: int32 [S + 1] on their device, where each example starts, and N.
        longest: tokens of the longest example.
        window: tokens before a row's own, -1 for all, and after it, that it attends to.
        scaling: of the products.
    Returns:
        [1, N, H, d].
    """
    kernel = _kernel()
    assert kernel is not None  # `declined` has said so
    shared = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    q, k, v = (_by_token(x) for x in (query, key, value))
    ends = offsets, offsets, longest, longest
    return kernel(q, k, v, *ends, scale=scaling, window_size=window, **shared).unsqueeze(0)


def _by_token(x: Tensor) -> Tensor:
    """x [1, A, N, d] as [N, A, d], without a copy where the kernel can read it as it lies."""
    x = x[0].transpose(0, 1)
    steps = (x.storage_offset(), *x.stride()[:2])
    readable = x.stride(2) == 1 and all(step % _AT_ONCE == 0 for step in steps)
    return x if readable else x.clone(memory_format=torch.contiguous_format)


def _kernel() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


@cache
def _options() -> frozenset[str]:
    """The names of the kernel's arguments: torch has added to them from version to version."""
    kernel = _kernel()
    return frozenset() if kernel is None else frozenset(inspect.signature(kernel).parameters)
