"""Who may know whom: the table of docs/architecture.md, held against every import."""

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

# A room, what it is for, and the rooms it may import besides itself.
ROW = re.compile(r"^\| `fastdean/(\w+)(?:/|\.py)` \| .* \| (.*) \|$", re.MULTILINE)


def _may_import() -> dict[str, set[str]]:
    """Room -> the rooms it may import, from the table of docs/architecture.md; only lower ones."""
    rows = ROW.findall((ROOT / "docs" / "architecture.md").read_text("utf-8"))
    rooms = [room for room, _ in rows]
    found = {}
    for position, (room, named) in enumerate(rows):
        below = set(rooms[position + 1 :])
        found[room] = below if named == "every room below" else set(re.findall(r"`(\w+)`", named))
        assert found[room] <= below, f"{room} may import what stands above it"
    # The package's top: its version, and public names that are loaded on use.
    found["fastdean"] = {home.split(".")[1] for home in fastdean._HOME.values()}
    found["__main__"] = {"cli"}
    return found


MAY_IMPORT = _may_import()

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
    "coupling/passes/capture.py",
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


def _files_imported(tree: ast.AST) -> set[str]:
    """Which files of the package a file imports, but for the package's own top."""
    found = set()
    for node, module in _imported_modules(tree):
        below = module.replace(".", "/").partition("/")[2]
        if module.partition(".")[0] != "fastdean":
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        modules = {name for name in names if _is_file(Path(below, f"{name}.py"))}
        found |= {Path(below, f"{name}.py") for name in modules}
        if not names or set(names) - modules:
            found |= {Path(f"{below}.py"), Path(below, "__init__.py")}
    return {path.as_posix() for path in found if _is_file(path)} - {"__init__.py"}


def _is_file(path: Path) -> bool:
    return (PACKAGE / path).is_file()


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
    # Everyone may ask the package its version; what else stands at its top has a room.
    assert _imported_rooms(_tree(path)) - {room, "fastdean"} - MAY_IMPORT[room] == set()


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_heavy_libraries_are_imported_inside_functions(path):
    modules = {name for _, name in _imported_modules(_at_import_time(_tree(path)))}
    heavy = HEAVY - {"triton"} if _room(path) in MAY_IMPORT_TRITON else HEAVY
    assert {name.partition(".")[0] for name in modules} & heavy == set()


def test_rooms_stand_on_few_floors_without_a_circle():
    remaining = {_room(path): set() for path in SOURCES}
    for path in SOURCES:
        # The package's top loads its public names on use, and everyone may ask it its version.
        remaining[_room(path)] |= _imported_rooms(_tree(path)) - {_room(path), "fastdean"}
    del remaining["__main__"]
    floors = 0
    while free := {room for room, needs in remaining.items() if not needs & remaining.keys()}:
        remaining = {room: needs for room, needs in remaining.items() if room not in free}
        floors += 1
    assert remaining == {}
    assert floors == 7


def test_files_do_not_import_each_other_in_circles():
    remaining = {
        _name(path): _files_imported(_at_import_time(_tree(path))) - {_name(path)}
        for path in SOURCES
    }
    while free := {file for file, needs in remaining.items() if not needs & remaining.keys()}:
        remaining = {file: needs for file, needs in remaining.items() if file not in free}
    assert remaining == {}


def _inner(file: str) -> str:
    """The room within a room that a file lies in: coupling/sums; "" for one that lies in none."""
    folder = Path(file).parent.as_posix()
    return folder if "/" in folder else ""


def test_rooms_within_a_room_do_not_import_each_other_in_circles():
    remaining: dict[str, set[str]] = {}
    for path in SOURCES:
        needed = {_inner(file) for file in _files_imported(_tree(path))}
        room = remaining.setdefault(_inner(_name(path)), set())
        room |= needed - {"", _inner(_name(path))}
    del remaining[""]
    while free := {room for room, needs in remaining.items() if not needs & remaining.keys()}:
        remaining = {room: needs for room, needs in remaining.items() if room not in free}
    assert remaining == {}


# A file's name, with the folders that stand before it, and not a pattern such as `*_cuda.cu`.
FILE_NAME = re.compile(r"(?<![\w./*-])[\w/]+\.(?:py|cpp|cu|h)\b")


@pytest.mark.parametrize("page", sorted(PACKAGE.glob("*/README.md")), ids=_name)
def test_the_files_that_a_room_s_readme_names_are_there(page):
    named = set(FILE_NAME.findall(page.read_text("utf-8")))
    absent = {
        name
        for name in named
        if not any((place / name).is_file() for place in (PACKAGE, ROOT, ROOT / "csrc"))
        and not any(page.parent.rglob(name))
    }
    assert named and absent == set()


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
    found = {_name(path) for path in SOURCES if re.search(HOOKS, path.read_text("utf-8"))}
    assert found and found <= MAY_HOOK


def test_compiled_code_knows_neither_torch_nor_python():
    files = sorted((ROOT / "csrc").iterdir())
    assert {path.suffix for path in files} == {".h", ".cpp", ".cu"}
    assert _files_that_match(r"#\s*include\s*[<\"](torch|ATen|c10)/", files) == set()
    knows_python = r"#\s*include\s*[<\"](pybind11/|Python\.h)"
    assert _files_that_match(knows_python, files) == {"bindings.cpp"}
