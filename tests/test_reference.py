"""The API reference holds every public name, each once, and nothing else.

Public is what the `__all__` of a module in `PUBLIC` lists. docs/reference/ names it by the path
that users import it by, never by the module it happens to be written in.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs" / "reference").glob("*.md"))
PUBLIC = (
    "fastdean",
    "fastdean.masks.checkpoint",
    "fastdean.collapse",
    "fastdean.coupling",
    "fastdean.data",
    "fastdean.debias",
    "fastdean.evaluation",
    "fastdean.evaluation.bias",
    "fastdean.models",
    "fastdean.masks",
    "fastdean.ops",
)
SHOWN = [
    path
    for page in PAGES
    for path in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.MULTILINE)
]


def what(path: str) -> tuple[str, str]:
    """What a name stands for: the same of two modules that offer the same thing."""
    module, _, name = path.rpartition(".")
    value = getattr(importlib.import_module(module), name)
    if inspect.isclass(value) or inspect.isfunction(value):
        return value.__module__, value.__qualname__
    return module, name


def test_every_public_name_is_shown_once_and_nothing_else():
    public = {
        what(f"{module}.{name}")
        for module in PUBLIC
        for name in importlib.import_module(module).__all__
    }
    shown = Counter(what(path) for path in SHOWN)
    assert shown.keys() == public
    assert set(shown.values()) == {1}


@pytest.mark.parametrize("path", SHOWN)
def test_a_name_is_shown_as_it_is_imported_and_has_a_docstring(path):
    module, _, name = path.rpartition(".")
    assert module in PUBLIC and name in importlib.import_module(module).__all__
    value = getattr(importlib.import_module(module), name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__doc__ and not value.__doc__.startswith(f"{name}(")


def test_every_page_is_in_the_navigation():
    nav = str(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"])
    for page in (ROOT / "docs").rglob("*.md"):
        assert f"'{page.relative_to(ROOT / 'docs').as_posix()}'" in nav, page


TAUGHT = [
    ROOT / "README.md",
    *sorted((ROOT / "docs" / "guide").glob("*.md")),
    *sorted((ROOT / "examples").glob("*.py")),
    *sorted((ROOT / "examples").glob("*.ipynb")),
]


@pytest.mark.parametrize("page", TAUGHT, ids=lambda page: page.name)
def test_what_is_to_be_copied_imports_public_names_alone(page):
    """Others may move in any release, and the copies would break."""
    text = page.read_text("utf-8")
    for module, names in re.findall(r"from (fastdean[\w.]*) import ([\w, ]+)", text):
        for name in (each.split(" as ")[0].strip() for each in names.split(",")):
            public = importlib.import_module(module).__all__ if module in PUBLIC else ()
            assert name in public or f"{module}.{name}" in PUBLIC, f"{module}.{name}"
    for module in re.findall(r"`[^`\n]*` from `(fastdean[\w.]*)`", text):
        assert module in PUBLIC, module
