"""Tensors to pointers: the one gate to the compiled extension `fastdean._C`.

The extension is in one of three states. *available*; *missing*, which is normal (installed with
FASTDEAN_NATIVE=OFF, or run from a source tree); *broken*, when it is there and cannot be used:
then every use raises, because falling back would hide a damaged install.

Pointers go stale without a word (`.to()`, `p.data =`, offload), so pointer, shape, strides, dtype
and device are read anew on every call; what is kept of them is only ever compared with.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch

# The number in csrc/fastdean.h that this file was written for.
ABI_VERSION = 4

# What torch calls DLPack's table of C functions.
_DLPACK = "__dlpack_c_exchange_api__"

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


def gather_at(
    tensors: Sequence[torch.Tensor], indices: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """`ops.gather_at` in compiled code; arguments and errors as for `zero_at_`."""
    if not tensors:
        return []
    counts = [index.numel() for index in indices]
    offsets, size = _layout(counts, [tensor.element_size() for tensor in tensors])
    out = torch.empty(size, dtype=torch.uint8, device=tensors[0].device)
    values = [out.data_ptr() + offset for offset in offsets]
    _run_on_places("gather_at", _Places(tensors, indices, addresses=[values]))
    return [
        out[offset : offset + count * tensor.element_size()].view(tensor.dtype)
        for tensor, offset, count in zip(tensors, offsets, counts, strict=True)
    ]


def write_at_(
    tensors: Sequence[torch.Tensor],
    indices: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
) -> None:
    """`ops.write_at_` in compiled code; arguments and errors as for `zero_at_`."""
    if tensors:
        _run_on_places("write_at", _Places(tensors, indices, values))
        _increment_versions(tensors)


def zero_at_(tensors: Sequence[torch.Tensor], indices: Sequence[torch.Tensor]) -> None:
    """`ops.zero_at_` in compiled code: one call, and on CUDA one launch, per device.

    The arguments have passed the checks of `ops.zero_at_`; all tensors lie on one device.
    Raises: RuntimeError if the extension cannot run there or CUDA reports an error.
    """
    if tensors:
        _run_on_places("zero_at", _Places(tensors, indices))
        _increment_versions(tensors)


def can_replace() -> bool:
    """Whether this torch describes its tensors through DLPack's C functions."""
    api = getattr(torch.Tensor, _DLPACK, None)
    return api is not None and _extension().describes_tensors(api=api)


class Replacement:
    """Two states of the same places, either of which is put over the other: any number of times.

    On CUDA a call is two launches, a comparison and a write that looks at its outcome, and reads
    one number back: the host waits for what the current stream was given before.

    Args:
        tensors, indices: as for `zero_at_`; no tensor is kept.
        before, after: per tensor one value per index, in its dtype, on the CPU.
    Raises: RuntimeError as `zero_at_`.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        indices: Sequence[torch.Tensor],
        before: Sequence[torch.Tensor],
        after: Sequence[torch.Tensor],
    ) -> None:
        self._extension = _extension()
        self._api = getattr(torch.Tensor, _DLPACK)
        self._facts = torch.empty(len(tensors), self._extension.FACT_FIELDS, dtype=torch.int64)
        self._facts_at = self._facts.data_ptr()
        self._extension.read_facts(api=self._api, tensors=list(tensors), facts=self._facts_at)
        self._places = _Places(tensors, indices, after, before)
        self._on_cpu = self._places.device.type == "cpu"
        if not self._on_cpu:
            # Later calls may come from another stream than the one that copied the tables.
            torch.cuda.current_stream(self._places.device).synchronize()

    def replace_(
        self, tensors: Sequence[torch.Tensor], *, back: bool = False, write: bool = True
    ) -> bool:
        """Put `after` over `before`, or `before` over `after` where `back`; False: nothing written.

        Args:
            tensors: a list of what is to be edited, now.
            write: False only compares.
        Returns: False if a tensor is not the type, address, shape, strides, dtype and device that
            it was, or if any place holds another value than the one to be written over, by bits.
        """
        extension = self._extension
        if not extension.same_facts(api=self._api, tensors=tensors, facts=self._facts_at):
            return False
        first_other = self._on_places(reverse=back, write=write)
        if first_other != len(tensors):
            return False
        if write:
            _increment_versions(tensors)
        return True

    def _on_places(self, *, reverse: bool, write: bool) -> int:
        places = self._places
        if self._on_cpu:
            return self._extension.replace_at_cpu(
                rows=places.rows_at,
                num_rows=places.num_rows,
                num_workers=torch.get_num_threads(),
                reverse=reverse,
                write=write,
            )
        with torch.cuda.device(places.device):
            first_other = torch.empty(1, dtype=torch.int64, device=places.device)
            self._extension.replace_at_cuda(
                rows=places.rows_at,
                num_rows=places.num_rows,
                max_count=places.max_count,
                reverse=reverse,
                write=write,
                first_other=first_other.data_ptr(),
                stream=torch.cuda.current_stream(places.device).cuda_stream,
            )
            found = int(first_other)
        return places.num_rows if found == -1 else found


class _Places:
    """The rows of one call, `PlacesRow` of csrc/fastdean.h, and the memory that they point into.

    Args:
        tensors, indices: as for `zero_at_`.
        arrays: up to two, `values` and `expected`: each one tensor [M] per tensor, copied.
        addresses: the same given by address, where there are no arrays.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        indices: Sequence[torch.Tensor],
        *arrays: Sequence[torch.Tensor],
        addresses: Sequence[Sequence[int]] = (),
    ) -> None:
        extension = _extension()
        self.device = tensors[0].device
        self.num_rows = len(tensors)
        self.max_count = max(index.numel() for index in indices)
        packed = [*indices, *itertools.chain.from_iterable(arrays)]
        self._buffer, where = _packed(packed, self.device)
        count = len(tensors)
        given = [where[start : start + count] for start in range(0, len(where), count)]
        given += addresses
        unused = [[0] * len(tensors)] * (3 - len(given))
        rows = [
            _places_row(extension, tensor, index.numel(), pointers)
            for tensor, index, *pointers in zip(tensors, indices, *given, *unused, strict=True)
        ]
        # Freed while a kernel may still run: safe, the allocator reuses memory in the order of this
        # stream.
        self._rows = torch.tensor(rows, dtype=torch.int64).to(self.device)
        self.rows_at = self._rows.data_ptr()


def _places_row(
    extension: ModuleType, tensor: torch.Tensor, count: int, pointers: Sequence[int]
) -> list[int]:
    """One `PlacesRow`, field by field; `pointers` to indices, values and expected."""
    contiguous = tensor.is_contiguous()
    rank = 0 if contiguous else tensor.dim()
    padding = [0] * (extension.MAX_RANK - rank)
    return [
        tensor.data_ptr(),
        *pointers,
        count,
        tensor.numel(),
        _dtype_code(extension, tensor.dtype),
        rank,
        *([] if contiguous else tensor.shape),
        *padding,
        *([] if contiguous else tensor.stride()),
        *padding,
    ]


def _run_on_places(op: str, places: _Places) -> None:
    extension = _extension()
    rows = {"rows": places.rows_at, "num_rows": places.num_rows}
    if places.device.type == "cpu":
        getattr(extension, f"{op}_cpu")(**rows, num_workers=torch.get_num_threads())
        return
    with torch.cuda.device(places.device):
        stream = torch.cuda.current_stream(places.device).cuda_stream
        getattr(extension, f"{op}_cuda")(**rows, max_count=places.max_count, stream=stream)


def _layout(counts: Sequence[int], widths: Sequence[int]) -> tuple[list[int], int]:
    """Where arrays begin in one buffer, and its size; in bytes.

    The widest elements come first, so that every array is aligned to its own.
    """
    offsets, end = [0] * len(counts), 0
    for i in sorted(range(len(counts)), key=lambda i: -widths[i]):
        offsets[i] = end
        end += counts[i] * widths[i]
    return offsets, end


def _dense(array: torch.Tensor) -> torch.Tensor:
    """Of stride 1 also where there is one element, which torch calls contiguous at any stride."""
    if array.stride(0) == 1:
        return array
    return array.clone(memory_format=torch.contiguous_format)


def _packed(arrays: Sequence[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, list[int]]:
    """Copies of 1-D tensors in one buffer on `device`, and the address of each."""
    offsets, _ = _layout([a.numel() for a in arrays], [a.element_size() for a in arrays])
    # On the CPU where they all are, so that one transfer carries them.
    home = device if any(a.device.type != "cpu" for a in arrays) else torch.device("cpu")
    order = sorted(range(len(arrays)), key=lambda i: -arrays[i].element_size())
    with torch.no_grad():
        pieces = [_dense(arrays[i].to(home)).view(torch.uint8) for i in order]
    buffer = torch.cat(pieces)
    buffer = buffer.to(device)
    return buffer, [buffer.data_ptr() + offset for offset in offsets]


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
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:
        # Inference tensors carry no version counter; no harm in telling the others twice.
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])
