"""The instruction sets that compiled code on the CPU is tried with, and random operands for it."""

from __future__ import annotations

import torch

LEVELS = {0: "portable", 1: "avx2", 2: "avx512", 3: "avx512_bf16", 4: "amx_bf16"}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
