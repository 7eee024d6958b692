"""What the checks and measurements on a GPU need of this machine; nothing is installed for them.

    python3 -m benchmarks.gpu.prerequisites [--rehearsal]

What is missing goes to stderr, one line each, and the status is 2; else one line of JSON holds what
results depend on. In a rehearsal no GPU is asked for, and the device is called that.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from importlib import import_module, metadata
from pathlib import Path

NEEDED = {
    "torch": (2, 11),
    "triton": (3, 6),
    "transformers": (5, 17),
    **dict.fromkeys(("pytest", "hypothesis", "accelerate", "pybind11"), (0,)),
}


def missing(rehearsal: bool = False) -> list[str]:
    """A line for each thing that is not here; in a rehearsal no GPU is missed."""
    lines = [line for name, least in NEEDED.items() if (line := _too_old(name, least))]
    if not _is_program("cmake"):
        lines.append("the program cmake is needed, on the PATH or beside Python")
    if not any(map(_is_program, [os.environ.get("CC") or "gcc", "gcc", "clang"])):
        lines.append("a C compiler is needed (gcc, clang or $CC): Triton builds launchers with it")
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        lines.append("Python.h is needed, got none: Triton and the extension include it")
    if not (lines or rehearsal or import_module("torch").cuda.is_available()):
        lines.append("a CUDA device is needed, and torch sees none")
    return lines


def _too_old(name: str, least: tuple[int, ...]) -> str:
    """That a Python package is, or is not there; "" if it will do."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        version = "none"
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    needed = f"{name} >= {'.'.join(map(str, least))} is needed, got {version}"
    return "" if numbers >= least else needed


def _is_program(name: str) -> bool:
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    return shutil.which(name, path=os.pathsep.join(folders)) is not None


def facts(rehearsal: bool) -> dict[str, str]:
    """What results depend on: the fields of `store.SAME_CODE`, and a checksum of the tests."""
    import torch

    from benchmarks.harness import environment

    # Not `environment.collect`, which asks the extension, while it may be compiled just now.
    return {
        "device": environment.REHEARSAL if rehearsal else torch.cuda.get_device_name(),
        "sources": environment.sources_checksum(),
        "torch": torch.__version__,
        "triton": metadata.version("triton"),
        "transformers": metadata.version("transformers"),
        "cuda": "none" if rehearsal else torch.version.cuda,
        "tests_checksum": environment.checksum(
            "CMakeLists.txt", "pyproject.toml", "tests/**/*.py", "tests/**/*.cpp"
        ),
    }


def main(arguments: Sequence[str]) -> int:
    rehearsal = "--rehearsal" in arguments
    lines = missing(rehearsal)
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    if not lines:
        print(json.dumps(facts(rehearsal)))
    return 2 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
