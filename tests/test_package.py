"""The package as installed: its version, its public names, what importing it costs, `info`."""

from __future__ import annotations

import ctypes
import importlib
import json
import platform
import re
import subprocess
import sys
import tomllib
from importlib import metadata, resources
from pathlib import Path

import pytest

import fastdean
from fastdean import info, native, ops
from fastdean.native import extension

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(fastdean.__file__).parent


def _in_a_new_process(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "tests"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


def test_version_has_one_source():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert fastdean.__version__ == declared == metadata.version("fastdean")
    sources = [*PACKAGE.rglob("*.py"), *(ROOT / "csrc").iterdir(), ROOT / "CMakeLists.txt"]
    version = re.compile(rf"(?<![\d.]){re.escape(declared)}(?![\d.])")
    assert [path.name for path in sources if version.search(path.read_text())] == []


def test_a_source_tree_that_is_not_installed_says_so(monkeypatch):
    def not_found(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", not_found)
    assert fastdean._installed_version() == "0+uninstalled"


@pytest.mark.parametrize("name", fastdean.__all__)
def test_public_names_resolve(name):
    assert getattr(fastdean, name) is not None
    assert name in dir(fastdean)


# Names that README.md has imported, below `fastdean`, and where the same names are.
DOCUMENTED = {
    "coupling.overlap": "coupling.sets",
    "data.encode": "data.examples",
    "loading.load_model": "models",
    "sources.load_rows": "data",
    "sources.sample_rows": "data",
}


def test_documented_names_keep_working():
    lines = []
    for documented, home in DOCUMENTED.items():
        module, _, name = f"fastdean.{documented}".rpartition(".")
        of_home = getattr(importlib.import_module(f"fastdean.{home}"), name)
        assert getattr(importlib.import_module(module), name) is of_home
        lines.append(f"from {module} import {name}; print({name}.__name__)")
    # Each in a process that has imported nothing else of ours, and torch once for all.
    code = f"""
import os, sys, torch
for line in {lines}:
    if os.fork() == 0:
        exec(line)
        sys.stdout.flush()
        os._exit(0)
    assert os.wait()[1] == 0, line
"""
    assert _in_a_new_process(code).split() == [name.split(".")[-1] for name in DOCUMENTED]


def test_an_unknown_name_is_an_attribute_error():
    wrong = "of_no_use"
    with pytest.raises(AttributeError, match="module 'fastdean' has no attribute 'of_no_use'"):
        getattr(fastdean, wrong)
    with pytest.raises(AttributeError, match="module 'fastdean.ops' has no attribute 'of_no_use'"):
        getattr(ops, wrong)


def test_importing_the_package_imports_nothing_heavy():
    loaded = _in_a_new_process("import fastdean, sys; dir(fastdean); print(*sys.modules)").split()
    heavy = {
        "torch",
        "triton",
        "transformers",
        "datasets",
        "huggingface_hub",
        "numpy",
        "matplotlib",
    }
    assert heavy & set(loaded) == set()
    assert "fastdean._C" not in loaded


def test_importing_the_operations_starts_neither_triton_nor_cuda():
    code = (
        "import sys, torch; before = set(sys.modules); "
        "from fastdean import ops; [getattr(ops, name) for name in ops.__all__]; "
        "new = set(sys.modules) - before; "
        "print([m for m in new if m.split('.')[0] in ('triton', 'transformers', 'datasets')], "
        "'fastdean._C' in new, torch.cuda.is_initialized())"
    )
    assert _in_a_new_process(code) == "[] False False"


def test_the_embedded_rows_are_part_of_the_package():
    folder = resources.files("fastdean.data") / "datasets"
    assert {"fairness.jsonl", "privacy.jsonl", "general.jsonl"} <= {
        p.name for p in folder.iterdir()
    }


def test_the_word_lists_are_part_of_the_package():
    folder = resources.files("fastdean.data") / "words"
    assert {"gender.json", "religion.json", "ethnicity.json", "gender_pairs.json"} <= {
        p.name for p in folder.iterdir()
    }


def test_the_record_of_checks_is_part_of_the_package():
    record = resources.files("fastdean") / "ops" / "checked_forms.json"
    assert json.loads(record.read_text("utf-8")).keys() == {"format", "forms"}


def test_the_command_is_installed():
    (entry,) = metadata.entry_points(group="console_scripts", name="fastdean")
    assert callable(entry.load())


def test_info_is_plain_data_and_names_what_runs():
    facts = info.collect()
    assert json.loads(json.dumps(facts)) == json.loads(json.dumps(info.collect()))
    assert facts["fastdean"] == fastdean.__version__
    assert facts["native"]["state"] == native.status().state
    assert facts["devices"][0] == "cpu"
    text = info.render(facts)
    for row in facts["dispatch"]["cpu"]:
        assert re.search(rf"^{row['op']} +{row['chosen']} ", text, flags=re.MULTILINE)


# What each instruction set asks of an x86-64 processor, as Linux calls it.
NEEDED = {
    "portable": set(),
    "AVX2": {"avx2", "fma"},
    "AVX512": {"avx512f"},
    "AVX512-BF16": {"avx512f", "avx512_bf16"},
    "AMX-BF16": {"avx512f", "avx512_bf16", "amx_tile", "amx_bf16"},
}


def _instructions_of_this_processor() -> set[str]:
    described = Path("/proc/cpuinfo").read_text()
    flags = re.search(r"^flags\s*:(.*)$", described, flags=re.MULTILINE)
    found = set(flags[1].split()) if flags else set()
    if "amx_tile" in found and not _matrix_unit_is_granted():
        found.remove("amx_tile")
    return found


def _matrix_unit_is_granted() -> bool:
    """Linux lends the matrix unit (arch_prctl, ARCH_REQ_XCOMP_PERM) to those who ask."""
    return ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0


def test_info_names_the_instruction_sets_of_the_extension_and_of_this_processor(extension_built):
    if not extension_built:
        pytest.skip("an install without the extension is under test")
    if sys.platform != "linux":
        pytest.skip("compares with what Linux says of the processor")
    facts = info.collect()
    found = {levels["op"]: levels for levels in facts["native"]["build"]["cpu_levels"]}
    every = tuple(NEEDED) if platform.machine() == "x86_64" else ("portable",)
    # GCC and Clang know the matrix unit since their versions 11.
    if int(re.search(r"\d+", facts["native"]["build"]["compiler"])[0]) < 11:
        every = every[:4]
    assert {op: levels["compiled"] for op, levels in found.items()} == {
        "accumulate_importance_": every,
        "select_top": every[:2],
        "collapse_alignment": every[:2],
    }
    assert found.keys() <= {row["op"] for row in facts["dispatch"]["cpu"]}
    instructions = _instructions_of_this_processor()
    for levels in found.values():
        able = [name for name in levels["compiled"] if NEEDED[name] <= instructions]
        assert levels["in_use"] == able[-1]


@pytest.mark.parametrize(
    ("cuda", "architectures", "words"),
    [("13.0", "80 90", "CUDA 13.0 for sm 80 90"), ("", "", "no CUDA")],
    ids=["cuda", "no_cuda"],
)
def test_info_says_how_the_extension_was_compiled(monkeypatch, cuda, architectures, words):
    levels = (
        native.CpuLevels("accumulate_importance_", ("portable", "AVX2", "AVX512"), "AVX2"),
        native.CpuLevels("collapse_alignment", ("portable",), "portable"),
    )
    build = native.BuildFacts("GNU 1.2", cuda, architectures, 7, levels, (("a.cu", "1f"),))
    status = native.NativeStatus("available", "", build)
    monkeypatch.delenv("FASTDEAN_IMPL", raising=False)
    monkeypatch.setattr(extension, "_load", lambda: (None, status))
    facts = info.collect()
    assert json.loads(json.dumps(facts["native"])) == {
        "state": "available",
        "reason": "",
        "build": {
            "compiler": "GNU 1.2",
            "cuda": cuda,
            "architectures": architectures,
            "abi": 7,
            "cpu_levels": [
                {
                    "op": "accumulate_importance_",
                    "compiled": ["portable", "AVX2", "AVX512"],
                    "in_use": "AVX2",
                },
                {"op": "collapse_alignment", "compiled": ["portable"], "in_use": "portable"},
            ],
            "cuda_sources": [["a.cu", "1f"]],
        },
    }
    lines = [re.sub("  +", " | ", line) for line in info.render(facts).splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("extension"))
    assert lines[start : start + 4] == [
        f"extension | available: GNU 1.2, {words}, ABI 7",
        "its CPU levels | accumulate_importance_: portable AVX2 AVX512 (in use: AVX2)",
        " | collapse_alignment: portable (in use: portable)",
        "FASTDEAN_IMPL | not set",
    ]


def test_info_reports_a_broken_extension(monkeypatch):
    monkeypatch.delenv("FASTDEAN_IMPL", raising=False)
    status = native.NativeStatus("broken", "importing fastdean._C failed: undefined symbol", None)
    monkeypatch.setattr(extension, "_load", lambda: (None, status))
    text = info.render(info.collect())
    assert "broken: importing fastdean._C failed: undefined symbol" in text
    assert "CPU levels" not in text
    assert re.search(r"^zero_at_ +raises +the compiled extension must be", text, re.MULTILINE)


def test_info_counts_devices_without_a_cuda_context():
    code = (
        "import torch; from fastdean import info; "
        "info.render(info.collect()); print(torch.cuda.is_initialized())"
    )
    assert _in_a_new_process(code) == "False"
