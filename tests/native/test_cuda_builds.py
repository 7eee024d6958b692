"""The CUDA sources compile without a warning or a spill, for a build's own chips and for others."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
SOURCES = sorted(CSRC.glob("*.cu"))
BUILD = (ROOT / "CMakeLists.txt").read_text("utf-8")
CHIPS = re.search(r"set\(CMAKE_CUDA_ARCHITECTURES ([\d ]+)\)", BUILD)[1].split()
# What a user may build for who has one.
OTHER_CHIPS = ["86", "89", "100", "120"]
# What CMake makes of a release build and of the standard.
OPTIONS = ["-O3", "-DNDEBUG", "-std=c++17", "-Xcompiler=-fPIC"]

# Registers that the threads of a block share, on all of these chips alike.
REGISTERS_OF_A_BLOCK = 64 * 1024
MOST_REGISTERS = 255  # of a thread


def _warnings_as_errors():
    """The options for CUDA in CMakeLists.txt: which warnings, and that they are errors."""
    groups = re.findall(r"\$<\$<COMPILE_LANGUAGE:CUDA>:([^>]*)>", BUILD)
    return [option for group in groups for option in group.split()]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(CHIPS, id="a build's own"),
        pytest.param(OTHER_CHIPS, id="others", marks=pytest.mark.slow),
    ],
)
def chips(request):
    """What is compiled for, as far as nvcc knows it.

    FASTDEAN_CUDA=ON, the switch of the build, says that nvcc has to be here.
    """
    if shutil.which("nvcc") is None:
        if os.environ.get("FASTDEAN_CUDA") == "ON":
            pytest.fail("FASTDEAN_CUDA=ON and there is no nvcc on the PATH", pytrace=False)
        pytest.skip("needs nvcc on the PATH")
    said = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True)
    known = [chip for chip in request.param if f"sm_{chip}" in said.stdout.split()]
    assert known == CHIPS or request.param is OTHER_CHIPS
    return known


@pytest.fixture(scope="module")
def folder(tmp_path_factory, chips):
    """Where nvcc leaves what it made, the PTX of every chip included."""
    return tmp_path_factory.mktemp("cuda")


@pytest.fixture(scope="module")
def reports(folder, chips):
    """Source -> what nvcc and ptxas say of it, all compiled at once."""
    command = ["nvcc", "-c", *OPTIONS, *_warnings_as_errors(), "-Xptxas=-v", f"-I{CSRC}"]
    command += [f"--generate-code=arch=compute_{n},code=[compute_{n},sm_{n}]" for n in chips]
    command += ["--keep", f"--keep-dir={folder}"]
    running = {
        source: subprocess.Popen(
            [*command, source, "-o", folder / f"{source.stem}.o"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for source in SOURCES
    }
    said = {source: process.communicate()[0] for source, process in running.items()}
    failed = {source.name: said[source] for source in SOURCES if running[source].returncode}
    assert failed == {}
    return said


def test_warnings_are_errors_here_as_in_the_strict_build():
    assert {"--Werror=all-warnings", "-Xcompiler=-Werror"} <= set(_warnings_as_errors())
    assert CHIPS == ["80", "90"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_every_kernel_fits_into_its_registers(reports, chips, source):
    compiled = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", reports[source])
    of_chip = {chip: {name for name, found in compiled if found == chip} for chip in chips}
    assert of_chip[chips[0]] and all(names == of_chip[chips[0]] for names in of_chip.values())
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", reports[source])
    # One line for each kernel, and for each function that was not inlined.
    assert len(spilled) >= len(compiled)
    assert set(spilled) == {("0", "0")}, reports[source]


def _threads_of_launches(source):
    """Kernel -> threads of the blocks that it is launched with."""
    text = source.read_text("utf-8")
    sizes = {}
    for name, value in re.findall(r"constexpr int (k\w+) = ([\w *]+);", text):
        sizes[name] = eval(value, {}, sizes)
    for name, factors in re.findall(r"const dim3 (\w+)\((k\w+, k\w+)\);", text):
        sizes[name] = math.prod(sizes[factor] for factor in factors.split(", "))
    launches = re.findall(r"(\w+)(?:<[\w, ]+>)?<<<.*?, (\w+), 0, stream>>>", text)
    assert len(launches) == text.count("<<<")
    threads = {kernel: sizes[block] for kernel, block in launches}
    assert len(threads) == text.count("__global__ void ")
    return threads


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_every_block_finds_registers_for_all_its_threads(reports, folder, chips, source):
    pattern = r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?Used (\d+) registers"
    compiled = re.findall(pattern, reports[source], flags=re.DOTALL)
    for kernel, threads in _threads_of_launches(source).items():
        found = [each for each in compiled if f"{len(kernel)}{kernel}" in each[0]]
        assert {chip for _, chip, _ in found} == set(chips)
        for name, chip, registers in found:
            assert int(registers) * threads <= REGISTERS_OF_A_BLOCK, name
            # A build for a debugger takes what it may: up to 255, unless the kernel says how many
            # threads there are.
            ptx = (folder / f"{source.stem}.compute_{chip}.ptx").read_text("utf-8")
            bound = re.search(rf"\.entry {name}\([^)]*\)\s*(?:\.maxntid (\d+)(?:, 1, 1)?\s)?", ptx)[
                1
            ]
            assert threads * MOST_REGISTERS <= REGISTERS_OF_A_BLOCK or int(bound or 0) == threads
