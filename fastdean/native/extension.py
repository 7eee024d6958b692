"""The compiled extension `fastdean._C`: whether it is there, how it was built, what it refuses.

It is in one of three states: *available*; *missing*, which is normal (installed with
FASTDEAN_NATIVE=OFF, or run from a source tree); *broken*, there but not usable. Then every use
raises, because falling back would hide a damaged install.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch

from fastdean.native import structs
from fastdean.wording.mendable import StateError

# The number in csrc/fastdean.h that this package was written for.
ABI_VERSION = 11

_DTYPE_CODES = {
    torch.float16: "DTYPE_FLOAT16",
    torch.bfloat16: "DTYPE_BFLOAT16",
    torch.float32: "DTYPE_FLOAT32",
    torch.float64: "DTYPE_FLOAT64",
}

_REINSTALL = "reinstall fastdean, or set FASTDEAN_IMPL=reference to do without the extension"


@dataclass(frozen=True)
class CpuLevels:
    """The instruction sets that an operation and its backward were compiled for, ascending.

    This processor runs `in_use`. With AVX512-BF16 or AMX-BF16 that is for bf16 alone; other dtypes
    run AVX512.
    """

    op: str
    compiled: tuple[str, ...]
    in_use: str


@dataclass(frozen=True)
class BuildFacts:
    """How the extension was compiled.

    Without CUDA, `cuda`, `architectures` and `cuda_sources` (file of csrc/, SHA-256) are empty.
    """

    compiler: str
    cuda: str
    architectures: str
    abi: int
    cpu_levels: tuple[CpuLevels, ...]
    cuda_sources: tuple[tuple[str, str], ...] = ()


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
    except Exception as error:  # a damaged binary may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            return None, NativeStatus("missing", "this install has no compiled extension", None)
        return None, _broken(f"importing {name} failed: {error}")

    abi = getattr(extension, "ABI_VERSION", None)
    if abi != ABI_VERSION:
        return None, _broken(f"{name} has ABI number {abi} and this fastdean needs {ABI_VERSION}")
    if difference := structs.difference(extension.STRUCTS):
        return None, _broken(f"{name} was compiled from another csrc/fastdean.h: {difference}")
    return extension, NativeStatus("available", "", _build_of(extension))


def _broken(reason: str) -> NativeStatus:
    return NativeStatus("broken", reason, None)


def _build_of(extension: ModuleType) -> BuildFacts:
    return BuildFacts(
        compiler=extension.COMPILER,
        cuda=extension.CUDA_VERSION,
        architectures=extension.CUDA_ARCHITECTURES,
        abi=extension.ABI_VERSION,
        cpu_levels=(
            CpuLevels(
                "accumulate_importance_", extension.IMPORTANCE_LEVELS, extension.IMPORTANCE_LEVEL
            ),
            CpuLevels("select_top", extension.SELECTION_LEVELS, extension.SELECTION_LEVEL),
            CpuLevels("collapse_alignment", extension.COLLAPSE_LEVELS, extension.COLLAPSE_LEVEL),
        ),
        cuda_sources=tuple(
            (name, digest)
            for name, digest in (each.split("=") for each in extension.CUDA_SOURCES.split())
        ),
    )


def status() -> NativeStatus:
    """The state of the extension. Imports it on the first call; never raises."""
    return _load()[1]


def _raise_if_broken() -> None:
    """Raises: RuntimeError if the extension is present and cannot be used."""
    found = status()
    if found.state == "broken":
        raise StateError(
            f"the compiled extension must be usable or absent, got {found.reason}; {_REINSTALL}"
        )


def refusal(device: torch.device) -> str:
    """Why the extension cannot run on `device`; "" if it can.

    Raises: RuntimeError if the extension is broken.
    """
    _raise_if_broken()
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
    return loaded().CPU_LEVEL


def loaded() -> ModuleType:
    """The extension itself.

    Raises: RuntimeError if it is missing or broken.
    """
    _raise_if_broken()
    extension, found = _load()
    if extension is None:
        raise StateError(f"impl='native' must have a compiled extension; {found.reason}")
    return extension


def has_dtype(dtype: torch.dtype) -> bool:
    """Whether the extension can be given tensors of `dtype`."""
    return dtype in _DTYPE_CODES


def dtype_code(dtype: torch.dtype) -> int:
    """The `DType` of csrc/fastdean.h."""
    return getattr(loaded(), _DTYPE_CODES[dtype])
