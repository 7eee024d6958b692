"""Who may know whom: the table of docs/architecture.md as data, held against every import."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastdean

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(fastdean.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Room -> the rooms it may import besides itself. "fastdean" is the package's own top: its version.
MAY_IMPORT: dict[str, set[str]] = {
    "_logging": {"printable"},
    "digits": set(),
    "doing": set(),
    "provenance": set(),
    "declared": set(),
    "printable": set(),
    "distributed": {"_logging"},
    "native": set(),
    "kernels": set(),
    "ops": {"atomic", "kernels", "native"},
    "segments": set(),
    "columns": set(),
    "data": {"columns", "segments"},
    "rendering": {"data"},
    "nearest": set(),
    "sources": {"columns", "nearest"},
    "loading": {"hub", "nearest"},
    "segment_products": set(),
    "attention": {"segment_products"},
    "batching": {"attention", "data"},
    "model_state": set(),
    "calling": set(),
    "probes": {"attention", "batching", "calling", "data", "model_state"},
    "forward": {
        "adapters",
        "attention",
        "batching",
        "calling",
        "data",
        "hooks",
        "model_state",
        "probes",
    },
    "adapters": set(),
    "stacks": {"adapters"},
    "blocks": set(),
    "targets": {"adapters", "blocks", "model_state", "stacks"},
    "atomic": set(),
    "folders": {"atomic"},
    "inventory": set(),
    "layout": {"declared", "inventory"},
    "markdown": {"printable"},
    "hub": {"layout", "nearest"},
    "storage": {"atomic", "fastdean", "folders", "hub", "inventory", "layout"},
    "safetensors_files": {"declared"},
    "scores": {"declared", "ops", "storage", "_logging"},
    "accumulators": {"ops", "scores", "targets"},
    "hooks": set(),
    "loss_scale": set(),
    "capture": {"accumulators", "hooks", "targets"},
    "trial": {"capture", "hooks", "loss_scale", "model_state", "targets", "workloads"},
    "workloads": {
        "_logging",
        "batching",
        "data",
        "distributed",
        "forward",
        "model_state",
        "rendering",
        "scores",
        "segments",
    },
    "scoring": {
        "_logging",
        "accumulators",
        "adapters",
        "batching",
        "capture",
        "distributed",
        "doing",
        "loss_scale",
        "model_state",
        "printable",
        "provenance",
        "scores",
        "targets",
        "trial",
        "workloads",
    },
    "masks": {
        "_logging",
        "adapters",
        "declared",
        "fastdean",
        "markdown",
        "model_state",
        "ops",
        "storage",
    },
    "checkpoint": {"declared", "masks", "safetensors_files", "storage"},
    "units": {"adapters", "model_state", "targets"},
    "coupling": {
        "adapters",
        "scores",
        "masks",
        "ops",
        "model_state",
        "rendering",
        "units",
        "_logging",
    },
    "dependence": set(),
    "verdicts": set(),
    "evaluation": {
        "adapters",
        "batching",
        "calling",
        "data",
        "dependence",
        "digits",
        "doing",
        "forward",
        "model_state",
        "sources",
        "verdicts",
    },
    "report": {"atomic", "declared", "printable", "verdicts"},
    "info": {"fastdean", "native", "ops"},
    "collapse": {
        "_logging",
        "adapters",
        "batching",
        "calling",
        "data",
        "declared",
        "distributed",
        "doing",
        "forward",
        "model_state",
        "ops",
        "storage",
    },
    "identity": {"model_state"},
    "debias": {
        "_logging",
        "collapse",
        "data",
        "declared",
        "doing",
        "forward",
        "identity",
        "layout",
        "markdown",
        "model_state",
        "provenance",
        "safetensors_files",
        "storage",
        "verdicts",
    },
    "fastdean": {
        "checkpoint",
        "collapse",
        "coupling",
        "dependence",
        "masks",
        "pipeline",
        "scores",
        "scoring",
    },
}
# Two that may import whatever stands above them.
MAY_IMPORT["pipeline"] = set(MAY_IMPORT)
MAY_IMPORT["cli"] = set(MAY_IMPORT)
MAY_IMPORT["__main__"] = {"cli"}

# Imported inside functions only: a user who needs none of them pays for none of them.
HEAVY = {
    "accelerate",
    "datasets",
    "huggingface_hub",
    "matplotlib",
    "scipy",
    "transformers",
    "triton",
}
# A kernel is decorated where it is defined; its file is itself imported inside a function.
MAY_IMPORT_TRITON = {"kernels"}

MAY_HOOK = {
    "coupling/capture.py",
    "collapse/regularizer.py",
    "collapse/representations.py",
    "models/hooks.py",
}
HOOKS = r"\bregister_(\w+_)?hook\b"

DRAWERS = {"utils", "util", "common", "helpers", "helper", "misc", "tools"}


def _name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def _room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "fastdean" if parts == ("__init__",) else parts[0]


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def _room_of(module: str) -> str:
    """ "fastdean.ops.mask" -> "ops"; "fastdean" itself -> "fastdean"."""
    return (module.split(".") + ["fastdean"])[1]


def _room_of_name(name: str) -> str:
    """The room of what `from fastdean import name` gives: a public name's home, or a module."""
    if name in fastdean._HOME:
        return _room_of(fastdean._HOME[name])
    return "fastdean" if name == "__version__" else name


def _imported_modules(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides its direction"
            yield node, node.module


def _imported_rooms(tree: ast.Module) -> set[str]:
    rooms = set()
    for node, module in _imported_modules(tree):
        if module == "fastdean" and isinstance(node, ast.ImportFrom):
            rooms |= {_room_of_name(alias.name) for alias in node.names}
        elif module.partition(".")[0] == "fastdean":
            rooms.add(_room_of(module))
    return rooms


def _at_import_time(tree: ast.Module) -> ast.Module:
    """The file without its functions and without what only a type checker sees."""

    class Outside(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None

        visit_AsyncFunctionDef = visit_FunctionDef

        def visit_If(self, node):
            return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)

    return Outside().visit(tree)


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_every_file_has_a_room_and_imports_in_its_direction(path):
    room = _room(path)
    assert room in MAY_IMPORT, f"{_name(path)} is in no room of docs/architecture.md"
    assert _imported_rooms(_tree(path)) - {room} - MAY_IMPORT[room] == set()


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_heavy_libraries_are_imported_inside_functions(path):
    modules = {name for _, name in _imported_modules(_at_import_time(_tree(path)))}
    heavy = HEAVY - {"triton"} if _room(path) in MAY_IMPORT_TRITON else HEAVY
    assert {name.partition(".")[0] for name in modules} & heavy == set()


def test_rooms_do_not_import_each_other_in_circles():
    remaining = {_room(path): set() for path in SOURCES}
    for path in SOURCES:
        # The package's top loads its public names on use, and everyone may ask it its version.
        remaining[_room(path)] |= _imported_rooms(_tree(path)) - {_room(path), "fastdean"}
    while free := {room for room, needs in remaining.items() if not needs & remaining.keys()}:
        remaining = {room: needs for room, needs in remaining.items() if room not in free}
    assert remaining == {}


def test_no_file_is_a_drawer():
    named = {
        part.strip("_") for path in SOURCES for part in Path(_name(path)).with_suffix("").parts
    }
    assert named & DRAWERS == set()


def _files_that_match(pattern: str, files: list[Path]) -> set[str]:
    return {path.name for path in files if re.search(pattern, path.read_text("utf-8"))}


def test_one_file_imports_the_extension_and_one_room_takes_pointers():
    gate = sorted((PACKAGE / "native").rglob("*.py"))
    others = [path for path in SOURCES if path not in gate]
    # Not torch's own, which is called the same.
    assert _files_that_match(r"(?<!torch\.)\b_C\b", gate) == {"extension.py"}
    assert _files_that_match(r"(?<!torch\.)\b_C\b", others) == set()
    # Which only asks whether there is memory at an address.
    assert _files_that_match("data_ptr", others) == {"memory.py"}


def test_few_files_hook_a_module():
    # By path: the evaluation has a representations.py too, which asks the model and hooks nothing.
    found = {_name(path) for path in SOURCES if re.search(HOOKS, path.read_text("utf-8"))}
    assert found and found <= MAY_HOOK


def test_compiled_code_knows_neither_torch_nor_python():
    files = sorted((ROOT / "csrc").iterdir())
    assert {path.suffix for path in files} == {".h", ".cpp", ".cu"}
    assert _files_that_match(r"#\s*include\s*[<\"](torch|ATen|c10)/", files) == set()
    knows_python = r"#\s*include\s*[<\"](pybind11/|Python\.h)"
    assert _files_that_match(knows_python, files) == {"bindings.cpp"}
