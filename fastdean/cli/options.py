"""From declared options to what typer reads, and the options that only the command line has."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from fastdean.files.atomic import real_place
from fastdean.jobs.options import Help, with_fields


def out_option(text: str) -> Help:
    """The `--out` of a command, with its help."""
    return Help(text, typed=str, read=_out, metavar="PATH")


def _out(text: str | Path | None) -> Path | None:
    if text is None:
        return None
    path = Path(text)
    # `new/../other` is `other`, also while there is no `new`.
    return real_place(path, "out") if ".." in path.parts else path


RunOut = Annotated[Path, out_option("Run folder, new or empty, or of the same job to resume it.")]
Preview = Annotated[
    bool,
    typer.Option(
        "--preview", help="Show one example of each source as the model would read it, and end."
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a folder that FastDEAN wrote earlier.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars or lines.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result to stdout as JSON.")]


class Options:
    """The options of a command, as its function declares them.

    A parameter `job` whose type is a dataclass stands for an option for each of its fields.

    Attributes:
        signature: for typer; `as_json` is its last parameter.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        own = inspect.signature(function, eval_str=True)
        self._job = own.parameters["job"].annotation if "job" in own.parameters else None
        declared = own if self._job is None else with_fields(own, self._job, with_help=True)
        self._declared = declared.parameters
        as_json = inspect.Parameter(
            "as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json
        )
        for_typer = [each.replace(annotation=_for_typer(each)) for each in self._declared.values()]
        self.signature = declared.replace(parameters=[*for_typer, as_json])

    def read(self, typed: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the command's function from what was typed; ValueError for ""."""
        for name, value in typed.items():
            # As a shell gives it for a variable that is not set; it would be the current folder.
            if value == "" or (isinstance(value, list | tuple) and "" in value):
                raise ValueError(f"{name} must be a value, got ''; give one, or leave it out")
        given = {name: _read(self._declared[name], value) for name, value in typed.items()}
        if self._job is not None:
            asked = {field.name: given.pop(field.name) for field in fields(self._job)}
            given["job"] = self._job(**asked)
        return given


def _help(parameter: inspect.Parameter) -> Help | None:
    extras = get_args(parameter.annotation)[1:]
    return next((extra for extra in extras if isinstance(extra, Help)), None)


def _for_typer(parameter: inspect.Parameter) -> Any:
    said = _help(parameter)
    if said is None:
        return parameter.annotation
    kind = said.typed or get_args(parameter.annotation)[0]
    # A flag is there or not: none of them needs its opposite.
    flags = [f"--{parameter.name.replace('_', '-')}"] if kind is bool else []
    flags = flags if said.flag is None else [said.flag]
    shown = not isinstance(parameter.default, tuple)
    option = typer.Option(*flags, help=said.text, metavar=said.metavar, show_default=shown)
    return Annotated[kind, option]


def _read(parameter: inspect.Parameter, typed: Any) -> Any:
    said = _help(parameter)
    return typed if said is None or said.read is None else said.read(typed)
