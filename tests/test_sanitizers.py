"""The compiled CPU operations under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
CHECKS = sorted((ROOT / "tests" / "csrc").glob("*_check.cpp"))
INSTRUCTIONS = {
    "importance_avx2.cpp": ["-mavx2", "-mfma"],
    "importance_avx512.cpp": ["-mavx512f"],
    "importance_avx512_bf16.cpp": ["-mavx512f", "-mavx512bf16"],
}


@pytest.fixture(scope="module")
def objects(tmp_path_factory, extension_built):
    """Every CPU source, compiled with the sanitizers."""
    if not extension_built:
        pytest.skip("an install without the extension is under test")
    if shutil.which("g++") is None or platform.machine() != "x86_64":
        pytest.skip("needs g++ on x86-64")
    folder = tmp_path_factory.mktemp("objects")
    sources = [path for path in sorted(CSRC.glob("*.cpp")) if path.name != "bindings.cpp"]
    running = []
    for source in sources:
        target = folder / f"{source.stem}.o"
        command = [*_compiler(), *INSTRUCTIONS.get(source.name, []), "-c", source, "-o", target]
        running.append((target, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
    for target, process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, f"{target.stem}: {errors}"
    return [target for target, _ in running]


def _compiler():
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-DFASTDEAN_X86_LEVELS"]
    return ["g++", *flags, "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{CSRC}"]


@pytest.mark.parametrize("check", CHECKS, ids=lambda path: path.stem)
def test_no_access_outside_memory_and_no_undefined_behaviour(check, objects, tmp_path):
    program = tmp_path / check.stem
    command = [*_compiler(), check, *objects, "-o", program, "-lpthread", "-ldl"]
    subprocess.run(command, check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
