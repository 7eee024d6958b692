"""The CUDA sources compile for the chips that wheels are made for, without a warning or a spill."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
SOURCES = sorted(CSRC.glob("*.cu"))
BUILD = (ROOT / "CMakeLists.txt").read_text("utf-8")
CHIPS = re.search(r"set\(CMAKE_CUDA_ARCHITECTURES ([\d ]+)\)", BUILD)[1].split()
# What CMake makes of a release build, of the standard, and of a list of chips.
OPTIONS = ["-O3", "-DNDEBUG", "-std=c++17", "-Xcompiler=-fPIC"]
OPTIONS += [f"--generate-code=arch=compute_{n},code=[compute_{n},sm_{n}]" for n in CHIPS]


def _warnings_as_errors():
    """The options for CUDA in CMakeLists.txt: which warnings, and that they are errors."""
    groups = re.findall(r"\$<\$<COMPILE_LANGUAGE:CUDA>:([^>]*)>", BUILD)
    return [option for group in groups for option in group.split()]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Source -> what nvcc and ptxas say of it, all compiled at once.

    FASTDEAN_CUDA=ON, the switch of the build, says that nvcc has to be here.
    """
    if shutil.which("nvcc") is None:
        if os.environ.get("FASTDEAN_CUDA") == "ON":
            pytest.fail("FASTDEAN_CUDA=ON and there is no nvcc on the PATH", pytrace=False)
        pytest.skip("needs nvcc on the PATH")
    folder = tmp_path_factory.mktemp("cuda")
    command = ["nvcc", "-c", *OPTIONS, *_warnings_as_errors(), "-Xptxas=-v", f"-I{CSRC}"]
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
def test_every_kernel_fits_into_its_registers(reports, source):
    compiled = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", reports[source])
    of_chip = {chip: {name for name, found in compiled if found == chip} for chip in CHIPS}
    assert of_chip[CHIPS[0]] and of_chip[CHIPS[0]] == of_chip[CHIPS[1]]
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", reports[source])
    # One line for each kernel, and for each function that was not inlined.
    assert len(spilled) >= len(compiled)
    assert set(spilled) == {("0", "0")}, reports[source]
