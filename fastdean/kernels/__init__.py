"""Triton kernels and their launchers, imported on first use, for tensors on a CUDA device.

With TRITON_INTERPRET=1 in the environment before Triton is imported, the same kernels run on CPU
tensors, slowly. Tests without a GPU use that.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch

_LOWEST_CAPABILITY = (8, 0)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python instead of compiling them."""
    # As Triton reads it. Asking Triton would import it.
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def refusal(device: torch.device, dtype: torch.dtype | None = None) -> str:
    """Why no kernel can run on tensors of `device` and `dtype`; "" if they can.

    Creates no CUDA context: asks for the compute capability only where torch has one already.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if dtype is not None and dtype not in _DTYPES:
        return f"the Triton kernels take fp32, bf16 and fp16, not {dtype}"
    if device.type == "cpu":
        return "" if interpreted() else "Triton runs on a CPU only with TRITON_INTERPRET=1"
    if device.type != "cuda":
        return f"the Triton kernels run on CUDA tensors, not on {device.type}"
    if interpreted():
        return "TRITON_INTERPRET=1 keeps Triton from compiling for the GPU"
    if torch.version.hip is not None:
        return "the Triton kernels are tested for NVIDIA GPUs only"
    if torch.cuda.is_initialized():
        capability = torch.cuda.get_device_capability(device)
        if capability < _LOWEST_CAPABILITY:
            found, needed = (".".join(map(str, c)) for c in (capability, _LOWEST_CAPABILITY))
            return f"the GPU has compute capability {found}, and the Triton kernels need {needed}"
    return ""


def on_device(device: torch.device) -> AbstractContextManager:
    """Makes `device` current, since Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
