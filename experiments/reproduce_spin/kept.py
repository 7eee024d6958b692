"""What earlier calls of a study left, looked at before it counts as done.

A finished run of another judge, a file that lost lines, or one of another model would otherwise
stand in the table without a word.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdean.evaluation.judging.verdicts import KEY, RECORD
from fastdean.files.declared import Lists, Maybe, Real, Record, Text, read_json
from fastdean.files.lines import Lines
from fastdean.jobs.answers.judging import AskedJudge
from fastdean.jobs.folder import VERDICTS_FILE, run_state

_ADVICE = "delete it, and it is made again"
_PRICE = Lists(
    Record(
        {"name": Text(longest=1000), "unit": Text(longest=100), "values": Lists(Maybe(Real()))},
        optional={"tokens": Lists(Real(above=0))},
    ),
    least=1,
)


def is_finished(folder: Path) -> bool:
    """Whether a job was done in the folder; ValueError for one that does not say."""
    state = run_state(folder)
    return state is not None and state["finished"]


def require_judge(folder: Path, judge: AskedJudge, asked: str) -> None:
    """Raise ValueError unless finished verdicts are those of this judge.

    Args:
        asked: the judge as it is typed, without a port.
    """
    state = run_state(folder)
    if state is None or not state["finished"]:
        # Of a job that goes on its own folder says.
        return
    typed = state["job"].get("judge")
    template = state["inputs"].get(f"template of judge {judge.name}")
    before = [_place(each) for each in typed] if isinstance(typed, list) else None
    # Where the template's file lies does not matter, what it holds does.
    if before != [_place(asked)] or template != judge.digest:
        raise ValueError(
            f"judge {judge.name!r} must be the one that gave the verdicts in {str(folder)!r}, got "
            f"{asked!r} with its template, where those are of {typed} with theirs; delete the "
            "folder to judge again, or pass another --out"
        )


def verdicts(folder: Path, keys: Container[tuple[Any, ...]], number: int) -> list[dict[str, Any]]:
    """A judge's verdicts; ValueError unless they are one of each answer.

    Args:
        keys: (judge, variant, id) of all; number: how many they are.
    """
    file = folder / VERDICTS_FILE
    found = Lines(file, RECORD, KEY).read(keys)
    if len(found) != number:
        raise ValueError(
            f"{str(file)!r} must hold a verdict of each of {number} answers, got {len(found)}; "
            f"delete its folder, and they are judged again"
        )
    return found


def prices(files: Mapping[str, Path]) -> dict[str, list[dict[str, Any]]]:
    """By model, each metric of a text or a task; ValueError unless all have the same items."""
    found = {name: read_json(file, _PRICE, advice=_ADVICE) for name, file in files.items()}
    first = next(iter(found))
    for name, metrics in found.items():
        if _form(metrics) != _form(found[first]):
            raise ValueError(
                f"{str(files[name])!r} must hold figures of the items of {files[first].name!r}, "
                f"got others; {_ADVICE}"
            )
    return found


def _place(typed: str) -> str:
    """The model that a judge was typed with, a folder by where it really is."""
    model = typed.rpartition("=")[2] if "=" in typed else ""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def _form(metrics: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [(m["name"], m["unit"], len(m["values"]), m.get("tokens")) for m in metrics]
