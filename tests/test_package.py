"""The package as installed: its version, its public names, what importing it costs, `info`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata, resources
from pathlib import Path

import pytest

import fastdean
from fastdean import info, native, ops

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
    folder = resources.files("fastdean") / "datasets"
    assert {"fairness.jsonl", "privacy.jsonl", "general.jsonl"} <= {
        p.name for p in folder.iterdir()
    }


def test_the_word_lists_are_part_of_the_package():
    folder = resources.files("fastdean") / "words"
    assert {"gender.json", "religion.json", "ethnicity.json", "gender_pairs.json"} <= {
        p.name for p in folder.iterdir()
    }


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


def test_info_reports_a_broken_extension(monkeypatch):
    monkeypatch.delenv("FASTDEAN_IMPL", raising=False)
    status = native.NativeStatus("broken", "importing fastdean._C failed: undefined symbol", None)
    monkeypatch.setattr(native, "_load", lambda: (None, status))
    text = info.render(info.collect())
    assert "broken: importing fastdean._C failed: undefined symbol" in text
    assert re.search(r"^zero_at_ +raises +the compiled extension must be", text, re.MULTILINE)


def test_info_counts_devices_without_a_cuda_context():
    code = (
        "import torch; from fastdean import info; "
        "info.render(info.collect()); print(torch.cuda.is_initialized())"
    )
    assert _in_a_new_process(code) == "False"
