"""Tensors to pointers: the one gate to the compiled extension `fastdean._C`.

The extension is in one of three states. *available*; *missing*, which is normal (installed with
FASTDEAN_NATIVE=OFF, or run from a source tree); *broken*, when it is there and cannot be used:
then every use raises, because falling back would hide a damaged install.

Pointers go stale without a word (`.to()`, `p.data =`, offload), so pointer, shape, strides, dtype
and device are read anew on every call and nothing about a tensor is kept between calls.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch

# The number in csrc/fastdean.h that this file was written for.
ABI_VERSION = 3

_REINSTALL = "reinstall fastdean, or set FASTDEAN_IMPL=reference to do without the extension"


@dataclass(frozen=True)
class BuildFacts:
    """How the extension was compiled; `cuda` and `architectures` are empty without CUDA."""

    compiler: str
    cuda: str
    architectures: str
    abi: int


@dataclass(frozen=True)
class NativeStatus:
    """State of the extension, why it is not available ("" when it is), and its build."""

    state: Literal["available", "missing", "broken"]
    reason: str
    build: BuildFacts | None


@functools.cache
def _load() -> tuple[ModuleType | None, NativeStatus]:
    name = "fastdean._C"
    try:
        extension = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            reason = "this install has no compiled extension"
            return None, NativeStatus("missing", reason, None)
        return None, NativeStatus("broken", f"importing {name} failed: {error}", None)
    except Exception as error:  # whatever a damaged binary raises is the reason we report
        return None, NativeStatus("broken", f"importing {name} failed: {error}", None)

    abi = getattr(extension, "ABI_VERSION", None)
    if abi != ABI_VERSION:
        reason = f"{name} has ABI number {abi} and this fastdean needs {ABI_VERSION}"
        return None, NativeStatus("broken", reason, None)
    build = BuildFacts(
        compiler=extension.COMPILER,
        cuda=extension.CUDA_VERSION,
        architectures=extension.CUDA_ARCHITECTURES,
        abi=abi,
    )
    return extension, NativeStatus("available", "", build)


def status() -> NativeStatus:
    """The state of the extension. Imports it on the first call; never raises."""
    return _load()[1]


def raise_if_broken() -> None:
    """Raises: RuntimeError if the extension is present and cannot be used."""
    found = status()
    if found.state == "broken":
        raise RuntimeError(
            f"the compiled extension must be usable or absent, got {found.reason}; {_REINSTALL}"
        )


def refusal(device: torch.device) -> str:
    """Why the extension cannot run on `device`; "" if it can.

    Raises: RuntimeError if the extension is broken.
    """
    raise_if_broken()
    found = status()
    if found.build is None:
        return found.reason
    if device.type == "cpu":
        return ""
    if device.type != "cuda":
        return f"the extension runs on CPU and CUDA tensors, not on {device.type}"
    if not found.build.cuda:
        return "the extension was compiled without CUDA"
    return ""


def cpu_level() -> int:
    """Number of the highest instruction set that the extension and this processor both have."""
    return _extension().CPU_LEVEL


def _extension() -> ModuleType:
    raise_if_broken()
    extension, found = _load()
    if extension is None:
        raise RuntimeError(f"impl='native' must have a compiled extension; {found.reason}")
    return extension


def _dtype_code(extension: ModuleType, dtype: torch.dtype) -> int:
    return {
        torch.float16: extension.DTYPE_FLOAT16,
        torch.bfloat16: extension.DTYPE_BFLOAT16,
        torch.float32: extension.DTYPE_FLOAT32,
        torch.float64: extension.DTYPE_FLOAT64,
    }[dtype]


def _zero_at_row(extension: ModuleType, tensor: torch.Tensor, index: torch.Tensor) -> list[int]:
    """One `ZeroAtRow` of csrc/fastdean.h, field by field."""
    contiguous = tensor.is_contiguous()
    rank = 0 if contiguous else tensor.dim()
    padding = [0] * (extension.MAX_RANK - rank)
    return [
        tensor.data_ptr(),
        index.data_ptr(),
        index.numel(),
        tensor.numel(),
        _dtype_code(extension, tensor.dtype),
        rank,
        *([] if contiguous else tensor.shape),
        *padding,
        *([] if contiguous else tensor.stride()),
        *padding,
    ]


def zero_at_(tensors: Sequence[torch.Tensor], indices: Sequence[torch.Tensor]) -> None:
    """`ops.zero_at_` in compiled code: one call, and on CUDA one launch, per device.

    The arguments have passed the checks of `ops.zero_at_`; all tensors lie on one device.
    Raises: RuntimeError if the extension cannot run there or CUDA reports an error.
    """
    if not tensors:
        return
    extension = _extension()
    device = tensors[0].device
    # Contiguous copies where needed, held until the call returns: the rows point into them.
    placed = [index.to(device).contiguous() for index in indices]
    rows = [_zero_at_row(extension, t, i) for t, i in zip(tensors, placed, strict=True)]
    table = torch.tensor(rows, dtype=torch.int64)
    max_count = max(index.numel() for index in placed)

    if device.type == "cpu":
        extension.zero_at_cpu(rows=table.data_ptr(), num_rows=len(rows), max_count=max_count)
    else:
        with torch.cuda.device(device):
            # Freed while the kernel may still run: safe, the allocator reuses memory in the order
            # of this stream.
            workspace = table.to(device)
            extension.zero_at_cuda(
                rows=workspace.data_ptr(),
                num_rows=len(rows),
                max_count=max_count,
                stream=torch.cuda.current_stream(device).cuda_stream,
            )
    _increment_versions(tensors)


def accumulate_importance_(
    acc: torch.Tensor, x: torch.Tensor, g: torch.Tensor, segments: torch.Tensor
) -> None:
    """`ops.accumulate_importance_` in compiled code, for fp32, bf16 and fp16 on the CPU.

    The arguments have passed the checks of `ops.accumulate_importance_`.
    """
    if acc.numel() == 0 or len(segments) == 0:
        return
    _accumulate_importance_(acc, x, g, segments, level=cpu_level())


def _accumulate_importance_(
    acc: torch.Tensor, x: torch.Tensor, g: torch.Tensor, segments: torch.Tensor, *, level: int
) -> None:
    """With the instruction set of this number; RuntimeError if the processor lacks it."""
    extension = _extension()
    segments = segments.contiguous()
    # One `ImportanceParams` of csrc/fastdean.h, field by field; the workspace comes last.
    params = torch.tensor(
        [
            acc.data_ptr(),
            *acc.stride(),
            x.data_ptr(),
            *x.stride(),
            g.data_ptr(),
            *g.stride(),
            _dtype_code(extension, x.dtype),
            *acc.shape,
            x.shape[0],
            segments.data_ptr(),
            len(segments),
            level,
            torch.get_num_threads(),
            0,
        ],
        dtype=torch.int64,
    )
    size = extension.accumulate_importance_workspace_bytes(params=params.data_ptr())
    workspace = torch.empty(size, dtype=torch.uint8)
    params[-1] = workspace.data_ptr()
    extension.accumulate_importance_cpu(params=params.data_ptr())
    _increment_versions([acc])


# In the order of `CollapseStatistic` of csrc/fastdean.h.
_COLLAPSE_STATISTICS = ("std", "cv", "mean")

# `CollapseParams` of csrc/fastdean.h.
_COLLAPSE_FIELDS = (
    "features",
    "features_stride",
    "features_dtype",
    "labels",
    "weight",
    "weight_stride",
    "weight_dtype",
    "old_sums",
    "old_counts",
    "decay",
    "statistic",
    "sums",
    "counts",
    "centre",
    "factors",
    "loss",
    "sums_dtype",
    "grad_loss",
    "grad_weight",
    "grad_features",
    "rows",
    "columns",
    "classes",
    "level",
    "num_workers",
    "workspace",
)


def collapse_alignment(
    features: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    sums: torch.Tensor,
    counts: torch.Tensor,
    decay: float,
    statistic: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`ops.collapse_alignment` in compiled code, with the centre and factors for its backward.

    The arguments have passed the checks of `ops.collapse_alignment`.
    """
    features, weight = _with_contiguous_rows(features), _with_contiguous_rows(weight)
    labels, sums, counts = labels.contiguous(), sums.contiguous(), counts.contiguous()
    loss = sums.new_empty(())
    centre, factors = sums.new_empty(sums.shape[1]), sums.new_empty(3, len(sums))
    new_sums, new_counts = torch.empty_like(sums), torch.empty_like(counts)
    decay_cell = torch.tensor(decay, dtype=torch.float64)
    _run_collapse(
        "collapse_alignment",
        weight.device,
        features=features.data_ptr(),
        features_stride=features.stride(0),
        features_dtype=features.dtype,
        labels=labels.data_ptr(),
        weight=weight.data_ptr(),
        weight_stride=weight.stride(0),
        weight_dtype=weight.dtype,
        old_sums=sums.data_ptr(),
        old_counts=counts.data_ptr(),
        decay=decay_cell.data_ptr(),
        statistic=_COLLAPSE_STATISTICS.index(statistic),
        sums=new_sums.data_ptr(),
        counts=new_counts.data_ptr(),
        centre=centre.data_ptr(),
        factors=factors.data_ptr(),
        loss=loss.data_ptr(),
        sums_dtype=sums.dtype,
        rows=len(labels),
        columns=sums.shape[1],
        classes=len(sums),
    )
    return loss, new_sums, new_counts, centre, factors


def collapse_alignment_backward(
    grad_loss: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    sums: torch.Tensor,
    counts: torch.Tensor,
    centre: torch.Tensor,
    factors: torch.Tensor,
    features_dtype: torch.dtype,
    needs_weight: bool,
    needs_features: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
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
            features_dtype=features_dtype,
            labels=labels.data_ptr(),
            weight=weight.data_ptr(),
            weight_stride=weight.stride(0),
            weight_dtype=weight.dtype,
            sums=sums.data_ptr(),
            counts=counts.data_ptr(),
            centre=centre.data_ptr(),
            factors=factors.data_ptr(),
            sums_dtype=sums.dtype,
            grad_loss=grad_loss.data_ptr(),
            grad_weight=grad_weight.data_ptr() if needs_weight else 0,
            # No rows have no address either, and nothing to compute.
            grad_features=grad_features.data_ptr() if needs_features else 0,
            rows=len(labels),
            columns=sums.shape[1],
            classes=len(sums),
        )
    return grad_weight, grad_features


def _with_contiguous_rows(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix, or a copy of it where the elements of a row do not lie side by side."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _run_collapse(op: str, device: torch.device, **fields: int | torch.dtype) -> None:
    """Calls the compiled `op`; a field that it does not read may be left out."""
    extension = _extension()
    fields.update(level=cpu_level(), num_workers=torch.get_num_threads())
    values = [fields.get(name, 0) for name in _COLLAPSE_FIELDS]
    codes = [
        _dtype_code(extension, value) if isinstance(value, torch.dtype) else value
        for value in values
    ]
    params = torch.tensor(codes, dtype=torch.int64)
    if device.type == "cpu":
        size = extension.collapse_workspace_bytes(params=params.data_ptr())
        workspace = torch.empty(size, dtype=torch.uint8)
        params[-1] = workspace.data_ptr()
        getattr(extension, f"{op}_cpu")(params=params.data_ptr())
        return
    with torch.cuda.device(device):
        size = extension.collapse_cuda_workspace_bytes(params=params.data_ptr())
        # Freed while the kernels may still run: safe, the allocator reuses memory in the order of
        # this stream.
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        params[-1] = workspace.data_ptr()
        stream = torch.cuda.current_stream(device).cuda_stream
        getattr(extension, f"{op}_cuda")(params=params.data_ptr(), stream=stream)


def _increment_versions(tensors: Sequence[torch.Tensor]) -> None:
    """Tells autograd of writes that it could not see."""
    # Inference tensors carry no version counter.
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])
