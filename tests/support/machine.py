"""Where kernels are tested: on the GPU where there is one, else interpreted on the CPU."""

from __future__ import annotations

import os

import torch

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

if DEVICE.type == "cuda":
    # Torch reads this with its first product of matrices, and refuses strict determinism ever after
    # if it was not set then.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if DEVICE.type == "cpu":
    assert os.environ.get("FASTDEAN_REQUIRE_GPU") != "1", "torch sees no CUDA device"
    # Triton reads this once, when the kernels are imported.
    os.environ["TRITON_INTERPRET"] = "1"
