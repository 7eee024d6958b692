"""Where, when and with what something was measured."""

from __future__ import annotations

import hashlib
import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fastdean
from benchmarks.harness.store import ROOT
from fastdean.files import provenance
from fastdean.info import version_of
from fastdean.ops._dispatch import choose

# What stands for the device's name where the runs of a GPU are tried out without one.
REHEARSAL = "cpu, rehearsal"


def collect(device: torch.device, argv: Sequence[str]) -> dict[str, Any]:
    """Of this process. `accumulation`: the implementation that fastdean's accumulation takes;
    `driver`, `cuda`: None on a CPU; `commit`, `dirty`: None outside a git checkout, where `sources`
    still tells runs of the same code from others; `date`: the start of the run, in UTC, and shared
    by all of its records; `command`: without absolute paths."""
    on_gpu = device.type == "cuda"
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    # Results themselves do not make a checkout dirty.
    changed = _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_model(),
        "driver": driver.splitlines()[0].strip() if on_gpu and driver else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "accumulation": choose("accumulate_importance_", device).name,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "transformers": version_of("transformers"),
        "fastdean": fastdean.__version__,
        "commit": _output("git", "rev-parse", "HEAD"),
        "dirty": None if changed is None else bool(changed),
        "sources": sources_checksum(),
        "date": provenance.now(),
        "command": command_line(argv),
    }


def require_this_checkout() -> None:
    """What is recorded are commit and sources of this checkout: nothing else is measured."""
    found = Path(fastdean.__file__).resolve().parent
    if found != ROOT / "fastdean":
        raise RuntimeError(
            f"fastdean must be the package of this checkout, {ROOT / 'fastdean'}, got {found}; "
            "set PYTHONPATH to the checkout, or install it from there with `pip install -e .`"
        )


def command_line(argv: Sequence[str]) -> str:
    """The command as one would type it in a checkout; of paths only the last part."""
    return shlex.join(["python", *map(provenance.public_source, argv)])


def sources_checksum() -> str:
    """Of every file that a measurement runs."""
    return checksum("fastdean/**/*.py", "csrc/*", "benchmarks/**/*.py", "experiments/**/*.py")


def checksum(*patterns: str) -> str:
    digest = hashlib.sha256()
    for path in (path for pattern in patterns for path in sorted(ROOT.glob(pattern))):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
