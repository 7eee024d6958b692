"""The extension in this source tree, where PYTHONPATH finds it, with CUDA: taken or compiled.

    python3 -m benchmarks.gpu.build_extension BUILD_FOLDER

FASTDEAN_PREBUILT, or what lies in fastdean/ already, is taken where it was compiled from these
sources and loads here with CUDA; else it is compiled with what is installed, without a network.
Beside the extension lies `_C.sources`, a checksum of what it was compiled from.
"""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAME = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
EXTENSION = ROOT / "fastdean" / NAME
SOURCES = "_C.sources"
_LOADS = """
from fastdean import native

found = native.status()
print(f"extension: {found.state}, {found}")
raise SystemExit(found.state != "available" or not found.build.cuda)
"""


def main(build: Path) -> int:
    prebuilt = Path(os.environ.get("FASTDEAN_PREBUILT") or EXTENSION)
    if not _is_of_these_sources(prebuilt):
        print(f"passed over: {prebuilt}, not there or without {SOURCES} that names these sources")
    elif prebuilt.resolve() != EXTENSION:
        _put(prebuilt, checksum())
    if _is_of_these_sources(EXTENSION) and _loads():
        print(f"taken: {EXTENSION.relative_to(ROOT)}, compiled from these sources")
        return 0
    print("compiled, since none of these sources is here that loads with CUDA", flush=True)
    # Meanwhile others start, and must not load what these sources do not fit.
    EXTENSION.unlink(missing_ok=True)
    if not _compile(build):
        print("error: the extension did not build", file=sys.stderr)
        return 1
    return 0 if _loads() else 1


def checksum() -> str:
    """Of everything that the extension is compiled from."""
    digest = hashlib.sha256(NAME.encode())
    for path in [ROOT / "CMakeLists.txt", *sorted((ROOT / "csrc").iterdir())]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _is_of_these_sources(extension: Path) -> bool:
    sources = extension.with_name(SOURCES)
    is_there = extension.is_file() and sources.is_file()
    return is_there and sources.read_text("utf-8").strip() == checksum()


def _put(extension: Path, sources: str) -> None:
    """Whole or not at all: other processes may be loading it."""
    arriving = EXTENSION.with_name(f".{NAME}")
    shutil.copyfile(extension, arriving)
    EXTENSION.with_name(SOURCES).unlink(missing_ok=True)
    os.replace(arriving, EXTENSION)
    EXTENSION.with_name(SOURCES).write_text(sources + "\n", "utf-8")


def _loads() -> bool:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", _LOADS], env=environment).returncode == 0


def _compile(build: Path) -> bool:
    from pybind11 import get_cmake_dir

    before, made = checksum(), build / "made"
    # A virtual environment's own CMake and ninja before the system's.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path}
    nvcc = find_nvcc(path)
    if nvcc:
        environment["CUDACXX"] = nvcc
    # FASTDEAN_CUDA, whatever the environment says: without CUDA there would be nothing to check.
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": made,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": get_cmake_dir(),
        "FASTDEAN_CUDA": "ON",
    }
    configure = ["cmake", "-S", str(ROOT), "-B", str(build)]
    configure += ["-G", "Ninja"] if shutil.which("ninja", path=path) else []
    configure += [f"-D{name}={value}" for name, value in settings.items()]
    for command in (configure, ["cmake", "--build", str(build), "--parallel"]):
        if subprocess.run(command, env=environment).returncode:
            return False
    _put(made / NAME, before)
    return True


def find_nvcc(path: str) -> str:
    """$CUDACXX, on the PATH, or where CUDA's installers put it; "" if it is nowhere."""
    folders = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    folders += ["/usr/local/cuda", *sorted(glob.glob("/usr/local/cuda-*"), reverse=True)]
    places = [path, *(os.path.join(folder, "bin") for folder in folders if folder)]
    return os.environ.get("CUDACXX") or shutil.which("nvcc", path=os.pathsep.join(places)) or ""


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python3 -m benchmarks.gpu.build_extension BUILD_FOLDER")
    sys.exit(main(Path(sys.argv[1]).resolve()))
