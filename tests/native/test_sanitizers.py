"""The compiled CPU operations under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CHECKS = sorted((ROOT / "tests" / "csrc").glob("*_check.cpp"))
COMPILE = ["g++", "-c", "-std=c++17", "-g1", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# The checks are not what is checked: compiled like the sources they would take longest of all.
CHECK_FLAGS = ["-O0", "-fsanitize=address"]
SOURCE_FLAGS = ["-O1", "-DFASTDEAN_X86_LEVELS", *SANITIZERS]


def _instruction_sets():
    """The options with which CMakeLists.txt compiles a file for an instruction set, by its name."""
    options_of = re.compile(
        r'set_source_files_properties\(([^)]*?)\s+PROPERTIES\s+COMPILE_OPTIONS "([^"]*)"'
    )
    found = options_of.findall((ROOT / "CMakeLists.txt").read_text())
    return {
        Path(file).name: options.split(";") for files, options in found for file in files.split()
    }


@pytest.fixture(scope="module")
def objects(tmp_path_factory, extension_built):
    """Folder of an object file for every CPU source and every check."""
    if not extension_built:
        pytest.skip("an install without the extension is under test")
    if shutil.which("g++") is None or platform.machine() != "x86_64":
        pytest.skip("needs g++ on x86-64")
    folder = tmp_path_factory.mktemp("objects")
    sources = [path for path in sorted(CSRC.glob("*.cpp")) if path.name != "bindings.cpp"]
    instructions = _instruction_sets()
    amx = instructions["importance_amx_bf16.cpp"]
    command = ["g++", *amx, "-E", "-x", "c++", "/dev/null"]
    if subprocess.run(command, capture_output=True).returncode == 0:
        common = [*SOURCE_FLAGS, "-DFASTDEAN_AMX_LEVEL"]
    else:
        common = SOURCE_FLAGS
        sources = [source for source in sources if instructions.get(source.name) != amx]
    flags = {source: [*common, *instructions.get(source.name, [])] for source in sources}
    flags |= dict.fromkeys(CHECKS, CHECK_FLAGS)
    running = {}
    for path, options in flags.items():
        command = [*COMPILE, *options, path, "-o", folder / f"{path.stem}.o"]
        running[path.name] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    failed = {name: errors for name, process in running.items() if (errors := _errors(process))}
    assert failed == {}
    return folder


def _errors(process):
    _, errors = process.communicate()
    return errors if process.returncode != 0 else ""


def test_every_file_for_an_instruction_set_is_compiled_for_it():
    assert set(_instruction_sets()) == {
        path.name for pattern in ("*_avx*.cpp", "*_amx*.cpp") for path in CSRC.glob(pattern)
    }


def _require_clean(check, objects, tmp_path, *arguments):
    program = tmp_path / check.stem
    others = {path.stem for path in CHECKS} - {check.stem}
    linked = [path for path in sorted(objects.glob("*.o")) if path.stem not in others]
    command = ["g++", *SANITIZERS, *linked, "-o", program, "-lpthread", "-ldl"]
    subprocess.run(command, check=True)
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("check", CHECKS, ids=lambda path: path.stem)
def test_no_access_outside_memory_and_no_undefined_behaviour(check, objects, tmp_path):
    # Every size and dtype of the loss, each with one of the statistics.
    arguments = ["few"] if check.stem == "collapse_check" else []
    _require_clean(check, objects, tmp_path, *arguments)


@pytest.mark.slow
def test_the_loss_is_clean_with_every_statistic(objects, tmp_path):
    [check] = [path for path in CHECKS if path.stem == "collapse_check"]
    _require_clean(check, objects, tmp_path)
