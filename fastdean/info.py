"""What this machine and this install can do: the facts behind `fastdean info`.

Light on purpose: it asks for versions and counts devices, and creates no CUDA context.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any

_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "huggingface_hub",
    "safetensors",
    "datasets",
    "accelerate",
    "gguf",
    "numpy",
    "matplotlib",
    "lm-eval",
)


def collect() -> dict[str, Any]:
    """Plain dictionaries, lists, strings and numbers; ready for `json.dumps`.

    Never raises for the state of the machine: a broken extension is one of the facts.
    """
    import torch

    import fastdean
    from fastdean import native
    from fastdean.ops import _dispatch, checked

    cuda_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kinds = ["cpu"] + (["cuda"] if cuda_devices else [])
    return {
        "fastdean": fastdean.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version_of(name) for name in _PACKAGES},
        "devices": ["cpu", *(f"cuda:{index}" for index in range(cuda_devices))],
        "torch_cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "native": dataclasses.asdict(native.status()),
        "default_impl": os.environ.get(_dispatch.ENVIRONMENT_VARIABLE),
        "dispatch": {
            kind: [dataclasses.asdict(row) for row in _dispatch.explain(kind)] for kind in kinds
        },
        "cuda_forms": [
            {"op": op, "impl": impl, "record": checked.described(op, impl)}
            for op, impl in checked.SOURCES
        ],
    }


def render(info: dict[str, Any]) -> str:
    """The result of `collect` as plain text tables, for people."""
    packages = info["packages"].items()
    sections = [
        _table(_facts(info)),
        _table((name, version or "not installed") for name, version in packages),
    ]
    for kind, rows in info["dispatch"].items():
        lines = [("operation", f"on {kind}", "why"), *_dispatch_lines(rows)]
        sections.append(_table(lines))
    forms = [(row["op"], row["impl"], row["record"]) for row in info["cuda_forms"]]
    sections.append(_table([("operation", "CUDA kernel", "its check on a GPU"), *forms]))
    return "\n\n".join(sections)


def version_of(package: str) -> str | None:
    """Of an installed package; None where it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _facts(info: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("fastdean", info["fastdean"]),
        ("python", info["python"]),
        ("platform", info["platform"]),
        ("devices", ", ".join(info["devices"])),
        ("CUDA of torch", info["torch_cuda"] or "none"),
        ("CPU threads", str(info["threads"])),
        ("CPU instructions", info["cpu_capability"]),
        ("extension", _describe_native(info["native"])),
        *_cpu_levels(info["native"]),
        ("FASTDEAN_IMPL", info["default_impl"] or "not set"),
    ]


def _describe_native(native: dict[str, Any]) -> str:
    build = native["build"]
    if build is None:
        return f"{native['state']}: {native['reason']}"
    cuda = f"CUDA {build['cuda']} for sm {build['architectures']}" if build["cuda"] else "no CUDA"
    return f"{native['state']}: {build['compiler']}, {cuda}, ABI {build['abi']}"


def _cpu_levels(native: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """Lines on the instruction sets of the extension, one for each operation that has several."""
    label = "its CPU levels"
    for levels in native["build"]["cpu_levels"] if native["build"] else ():
        yield label, f"{levels['op']}: {' '.join(levels['compiled'])} (in use: {levels['in_use']})"
        label = ""


def _dispatch_lines(rows: Iterable[dict[str, Any]]) -> Iterable[tuple[str, str, str]]:
    for row in rows:
        yield row["op"], row["chosen"] or "raises", row["reason"]
        for impl, why_not in row["others"]:
            # Said once, where it is the reason for what was chosen.
            if f"not {impl}: {why_not}" not in row["reason"]:
                yield "", f"not {impl}", why_not


def _table(lines: Iterable[Sequence[str]]) -> str:
    lines = list(lines)
    # The last column is free text and is not padded.
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(line[:-1], widths, strict=True)), line[-1]])
        for line in lines
    )
