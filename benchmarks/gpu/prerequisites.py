"""What the checks and measurements on a GPU need of this machine; nothing is installed for them.

    python3 benchmarks/gpu/prerequisites.py [accelerate] [pybind11] [cmake]

What is missing goes to stderr, one line each, and the status is 2; else one line says what is here.
The arguments are what some of the scripts need and others do not.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

VERSIONS = {"torch": (2, 11), "triton": (3, 6), "transformers": (5, 17)}
MODULES = ("pytest", "hypothesis")
PROGRAMS = ("cmake",)


def missing(extra: Sequence[str] = ()) -> list[str]:
    """A line for each thing that is not here.

    Args:
        extra: modules, or one of `PROGRAMS`, that are needed besides.
    """
    lines = [_too_old(name, least) for name, least in VERSIONS.items()]
    modules = (*MODULES, *(name for name in extra if name not in PROGRAMS))
    lines += [f"the Python package {name} is needed" for name in modules if not _is_installed(name)]
    lines += [
        f"the program {name} is needed, on the PATH or beside Python"
        for name in extra
        if name in PROGRAMS and not _is_program(name)
    ]
    return [line for line in (*lines, _no_compiler(), _no_headers(), _no_device()) if line]


def _too_old(name: str, least: tuple[int, int]) -> str:
    needed = f"{name} >= {'.'.join(map(str, least))} is needed"
    try:
        found = import_module(name).__version__
    except ImportError as error:
        return f"{needed}, and it cannot be imported: {error}"
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:2])
    return "" if numbers >= least else f"{needed}, got {found}"


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _is_program(name: str) -> bool:
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    return shutil.which(name, path=os.pathsep.join(folders)) is not None


def _no_compiler() -> str:
    names = [os.environ.get("CC") or "", "gcc", "clang"]
    if any(name and shutil.which(name) for name in names):
        return ""
    return "a C compiler is needed (gcc, clang or $CC): Triton builds its launchers with it"


def _no_headers() -> str:
    folder = Path(sysconfig.get_paths()["include"])
    if (folder / "Python.h").is_file():
        return ""
    return "the headers of Python are needed, got no Python.h: Triton and the extension include it"


def _no_device() -> str:
    try:
        import torch
    except ImportError:
        return ""  # named already
    return "" if torch.cuda.is_available() else "a CUDA device is needed, and torch sees none"


def found() -> str:
    """What results depend on: versions, and the device's name."""
    import torch

    versions = ", ".join(f"{name} {import_module(name).__version__}" for name in VERSIONS)
    return f"{versions}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}"


def main(extra: Sequence[str]) -> int:
    lines = missing(extra)
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    if lines:
        return 2
    print(found())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
