"""Rows of text to score: of a CSV file, or those embedded in fastdean."""

from __future__ import annotations

import csv
import itertools
import json
from importlib import resources
from pathlib import Path

_EMBEDDED = ("fairness", "privacy", "general")


def load_rows(path: Path | None, count: int) -> list[dict[str, str]]:
    """The first `count` rows of `prompt` and `response`.

    Args:
        path: a CSV file with these two columns; None: the embedded data sets, one row of each in
        turn.
    Raises:
        ValueError: a column is missing, or there are fewer rows.
    """
    rows = _embedded_rows() if path is None else _csv_rows(path)
    if not 1 <= count <= len(rows):
        source = "the embedded data sets" if path is None else path.name
        raise ValueError(
            f"examples must be between 1 and {len(rows)}, the rows of {source}, got {count}; "
            "give more rows with --rows"
        )
    return rows[:count]


def _embedded_rows() -> list[dict[str, str]]:
    folder = resources.files("fastdean") / "datasets"
    sets = [
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]
        for name in _EMBEDDED
    ]
    turns = itertools.chain.from_iterable(zip(*sets, strict=False))
    return [{"prompt": row["prompt"], "response": row["response"]} for row in turns]


def _csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        if not {"prompt", "response"} <= set(columns):
            raise ValueError(
                f"{path.name} must have the columns prompt and response, "
                f"got {', '.join(columns) or 'none'}; rename them"
            )
        return [{"prompt": row["prompt"], "response": row["response"]} for row in reader]
