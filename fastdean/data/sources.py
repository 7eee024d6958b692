"""From the name of a source to rows of text.

    SRC = preset | path | hub id, optionally followed by ::key=value,key=value

    beavertails:fairness
    data/pairs.jsonl
    answers.csv::prompt=question,response=reply
    org/name::split=train,config=en,revision=main,prompt=instruction,response=output

A row is a dictionary with `prompt` and `response`, or `messages`, or `text`, or an entailment pair
with `premise` and `hypothesis`; `unsafe`, where present, is an unsafe response to the same prompt.
Columns of other habits (instruction and output, prompt and completion) are read as `columns` says,
others are mapped as `row key=column`. Rows are counted from 1 in messages about errors.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fastdean.data.columns import has_lone_surrogate, usual_columns
from fastdean.data.prompts import prompt_row
from fastdean.data.skipped import Skipped
from fastdean.wording.nearest import nearest
from fastdean.wording.printable import first_line

__all__ = ["load_rows", "load_table", "sample_rows"]

# With or without its number.
AnyRow = TypeVar("AnyRow")

ROW_KEYS = ("prompt", "response", "unsafe", "messages", "text", "premise", "hypothesis")
_TEXT_KEYS = tuple(key for key in ROW_KEYS if key != "messages")
_PAIRS = ({"prompt", "response"}, {"premise", "hypothesis"})
_HUB_KEYS = ("split", "config", "revision")
_BEAVERTAILS = {
    "fairness": "discrimination,stereotype,injustice",
    "privacy": "privacy_violation",
}
# Bytes that are no UTF-8 become lone surrogates: one bad row is not the whole file.
_KEEPING = "surrogateescape"


class BadRow(ValueError):
    """A row that cannot be read or used; others of the source perhaps can."""


@dataclass(frozen=True)
class _Unread:
    """Stands for a row that could not be read."""

    reason: str


_Rows = Iterable[dict[str, Any] | _Unread]


def load_rows(source: str | Path, *, skip_bad_rows: bool = False) -> list[dict[str, Any]]:
    """Read every row of a source, columns mapped to the row keys.

    Args:
        source: see the module's docstring. Files end in .csv, .tsv, .json, .jsonl or
            .parquet; a .json file may hold JSON Lines, and a .jsonl file one list. A hub id
            is read with `datasets.load_dataset`, split "train" unless given; HF_HUB_OFFLINE and
            HF_TOKEN are honoured.
        skip_bad_rows: leave out rows that cannot be read, with a warning that counts them, rather
            than refuse the first.
    Returns:
        At least one row, in the source's order.
    Raises:
        ValueError: the source does not exist, cannot be parsed, is empty, or lacks its columns.
    """
    skipped = Skipped() if skip_bad_rows else None
    rows = numbered_rows(source, None if skipped is None else skipped.rows)
    if skipped is not None:
        skipped.warn(str(source))
    return [row for _, row in rows]


def numbered_rows(
    source: str | Path, skipped: dict[int, str] | None = None, *, prompts: bool = False
) -> list[tuple[int, dict[str, Any]]]:
    """The rows of `load_rows`, each with its number from 1.

    Args:
        skipped: gets the number of each row that cannot be read, and the reason; None: the first of
            them is an error.
        prompts: a row need not have an answer, and comes as `prompts.prompt_row` gives it.
    Raises:
        ValueError: as `load_rows`; also where no row is left.
    """
    name, options = _parse(str(source))
    columns = {key: value for key, value in options.items() if key in ROW_KEYS}
    if name in PRESETS:
        if options:
            raise ValueError(
                f"source {name!r} is a preset and takes no options, got {sorted(options)}"
            )
        rows: _Rows = PRESETS[name]()
    else:
        rows = _read(name, options, also=f" or one of {', '.join(PRESETS)}")
    found = []
    for number, row in enumerate(rows, start=1):
        try:
            mapped = (_map_prompt if prompts else _map_columns)(row, columns, name, number)
            found.append((number, mapped))
        except BadRow as error:
            if skipped is None:
                raise
            skipped[number] = str(error)
    _require_rows(found, name, skipped)
    return found


def _require_rows(found: Sequence[Any], name: str, skipped: Mapping[int, str] | None) -> None:
    if not found:
        reason = f" that can be read: {next(iter(skipped.values()))}" if skipped else ""
        raise ValueError(f"source {name!r} must hold at least one row, got none{reason}")


def load_table(
    source: str | Path, *, skip_bad_rows: bool = False, **hub_defaults: str
) -> list[dict[str, Any]]:
    """Read every row of a file or a hub data set with the columns that it has.

    Args:
        source: as in `load_rows`, without presets and without column mappings.
        skip_bad_rows: as in `load_rows`.
        hub_defaults: `split`, `config` or `revision` of a hub data set where the source names none.
    Returns:
        At least one row, in the source's order.
    Raises:
        ValueError: as in `load_rows`, and for a column mapping.
    """
    name, options = _parse(str(source))
    mapped = [key for key in options if key in ROW_KEYS]
    if mapped:
        raise ValueError(
            f"source {name!r} must keep its own columns here, got the mapping of {mapped[0]!r}; "
            "leave it out"
        )
    skipped, rows = Skipped(), []
    for number, row in enumerate(_read(name, options, hub_defaults), start=1):
        if not isinstance(row, _Unread):
            rows.append(row)
            continue
        skipped.rows[number] = _malformed_message(Path(name), row.reason)
        if not skip_bad_rows:
            raise BadRow(skipped.rows[number])
    _require_rows(rows, name, skipped.rows)
    skipped.warn(name)
    return rows


def asks_the_hub(source: str | Path) -> bool:
    """Whether the rows of a source come from the hub, or its cache."""
    name, _ = _parse(str(source))
    if name in PRESETS:
        return not name.startswith("embedded:")
    return not _is_file(name) and _is_hub_id(name)


def sample_rows(
    rows: list[AnyRow], count: int | None, seed: int
) -> tuple[list[AnyRow], list[AnyRow]]:
    """Shuffle and split into (the first `count` rows, the others).

    The order is that of `datasets.Dataset.shuffle(seed=seed)`, so that `count` rows here are those
    of `.shuffle(seed=seed).select(range(count))` in the published procedure.

    Raises:
        ValueError: `count` is not positive or exceeds the rows there are.
    """
    count = len(rows) if count is None else count
    if not 0 < count <= len(rows):
        raise ValueError(
            f"examples must be between 1 and the source's {len(rows)} rows, got {count}"
        )
    shuffled = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    return shuffled[:count], shuffled[count:]


def _read(
    name: str, options: Mapping[str, str], hub_defaults: Mapping[str, str] = {}, also: str = ""
) -> _Rows:
    """The rows of a file or a hub data set as they are; `also` names what else a source may be."""
    if _is_file(name):
        for key in _HUB_KEYS:
            if key in options:
                raise ValueError(
                    f"source {name!r} is a file and takes columns only, got the option {key!r}; "
                    "leave it out"
                )
        return _read_file(Path(name))
    if _is_hub_id(name):
        chosen = {**hub_defaults, **options}
        return _load_hub(name, **{key: chosen[key] for key in _HUB_KEYS if key in chosen})
    comma = "," if also else " or"
    raise ValueError(
        f"source must be a file ending in {', '.join(_READERS)}{comma} a hub id owner/name{also}, "
        f"got {name!r}{nearest(name)}"
    )


def _is_file(name: str) -> bool:
    return bool(name) and (
        Path(name).suffix.lower() in _READERS or Path(name).expanduser().exists()
    )


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _parse(source: str) -> tuple[str, dict[str, str]]:
    name, _, tail = source.partition("::")
    options: dict[str, str] = {}
    for part in filter(None, tail.split(",")):
        key, equals, value = part.partition("=")
        if not equals or key not in (*ROW_KEYS, *_HUB_KEYS):
            raise ValueError(
                "source options must be key=value with the keys "
                f"{', '.join((*ROW_KEYS, *_HUB_KEYS))}, got {part!r} in {source!r}"
            )
        if key in options:
            raise ValueError(
                f"source options must be given once each, got {key!r} twice in {source!r}"
            )
        options[key] = value
    return name, options


def _map_columns(
    row: Mapping[str, Any] | _Unread, columns: Mapping[str, str], name: str, number: int
) -> dict[str, Any]:
    row, mapped_over = _mapped_over(row, columns, name, number)
    # An empty cell of a table is a missing value, except where a prompt or answer stands.
    row = usual_columns({**row, **mapped_over})
    mapped = {
        key: row[key]
        for key in ROW_KEYS
        if row.get(key) is not None and (row[key] != "" or key in ("prompt", "response"))
    }
    mapped |= mapped_over
    _require_text(row, mapped, columns, name, number)
    if not (_has_pair(mapped) or {"messages", "text"} & mapped.keys()):
        raise BadRow(
            f"source {name!r} must have the columns 'prompt' and 'response', or 'messages', or "
            f"'text', or 'premise' and 'hypothesis', got {sorted(map(str, row))} in row {number}; "
            "map them with ::prompt=COLUMN,response=COLUMN"
        )
    return mapped


def _map_prompt(
    row: Mapping[str, Any] | _Unread, columns: Mapping[str, str], name: str, number: int
) -> dict[str, Any]:
    row, mapped_over = _mapped_over(row, columns, name, number)
    try:
        return prompt_row({**row, **mapped_over}, asked=mapped_over)
    except ValueError as error:
        raise BadRow(f"row {number} of {name!r} {error}") from None


def _mapped_over(
    row: Mapping[str, Any] | _Unread, columns: Mapping[str, str], name: str, number: int
) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """The row as it was read, and the row keys that a mapping gives it."""
    if isinstance(row, _Unread):
        raise BadRow(_malformed_message(Path(name), row.reason))
    if not isinstance(row, Mapping):
        raise BadRow(f"row {number} of {name!r} must be an object, got {type(row).__name__}")
    missing = [column for column in columns.values() if column not in row]
    if missing:
        raise BadRow(
            f"source {name!r} must have the column {missing[0]!r}, got {sorted(map(str, row))} in "
            f"row {number}; correct the mapping after ::"
        )
    return row, {key: row[column] for key, column in columns.items()}


def _has_pair(mapped: Mapping[str, Any]) -> bool:
    return any(pair <= mapped.keys() for pair in _PAIRS)


def _require_text(
    row: Mapping[str, Any],
    mapped: Mapping[str, Any],
    columns: Mapping[str, str],
    name: str,
    number: int,
) -> None:
    """Raise BadRow for a row key whose value is no text, or text that UTF-8 cannot hold.

    Messages take the place of the other keys, which then may hold anything.
    """
    if mapped.get("messages") is not None:
        return
    for key in _TEXT_KEYS:
        column = columns.get(key, key)
        value = mapped.get(key, row.get(column))
        # A null is a missing value where the row has another text to read, or needs none.
        absent = key == "unsafe" or (key not in columns and ("text" in mapped or _has_pair(mapped)))
        if column not in row or (value is None and absent):
            continue
        if not isinstance(value, str):
            found = "null" if value is None else type(value).__name__
        elif has_lone_surrogate(value):
            found = "a lone surrogate, which is no character"
        else:
            continue
        raise BadRow(
            f"row {number} of {name!r} must be text in the column {column!r}, got {found}; correct "
            "the row or leave it out"
        )


def _read_file(path: Path) -> _Rows:
    path = path.expanduser()
    reader = _READERS.get(path.suffix.lower())
    if reader is None or path.is_dir():
        raise ValueError(
            f"source must be a file ending in {', '.join(_READERS)}, got {str(path)!r}"
        )
    if not path.is_file():
        raise ValueError(
            f"source must be an existing file, got {str(path)!r}; check the path{nearest(path)}"
        )
    if path.stat().st_size == 0:
        raise ValueError(f"source must hold at least one row, got the empty file {str(path)!r}")
    try:
        return list(reader(path))
    except (ValueError, OSError, csv.Error, RecursionError) as error:
        raise ValueError(_malformed_message(path, first_line(error))) from None


def _malformed_message(path: Path, reason: str) -> str:
    return (
        f"source {str(path)!r} must be a well-formed {path.suffix} file, got: {reason}; repair or "
        "export it again"
    )


def _read_csv(path: Path, delimiter: str = ",") -> _Rows:
    # The limit is of the whole process, and a field is no longer than its file.
    limit = csv.field_size_limit()
    csv.field_size_limit(max(limit, path.stat().st_size))
    try:
        with path.open(newline="", encoding="utf-8-sig", errors=_KEEPING) as file:
            return _csv_rows(csv.DictReader(_without_nul(file), strict=True, delimiter=delimiter))
    finally:
        csv.field_size_limit(limit)


def _csv_rows(reader: csv.DictReader) -> _Rows:
    header = [column for column in reader.fieldnames or () if column]
    if has_lone_surrogate("".join(header)):
        raise ValueError("the header is not UTF-8")
    repeated = [column for n, column in enumerate(header) if column in header[:n]]
    if repeated:
        raise ValueError(f"the header has the column {repeated[0]!r} more than once")
    rows: list[dict[str, Any] | _Unread] = []
    for row in reader:
        if None in row or None in row.values():
            reason = "has another number of columns than the header"
        elif has_lone_surrogate("".join(row.values())):
            reason = "is not UTF-8"
        else:
            rows.append(row)
            continue
        rows.append(_Unread(f"line {reader.line_num} {reason}"))
    return rows


def _without_nul(lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if "\0" in line:
            raise ValueError(f"line {number} holds a NUL character")
        yield line


def _read_json(path: Path) -> _Rows:
    text = path.read_text(encoding="utf-8-sig")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        # JSON Lines are often called .json too: then the first line is a whole object.
        if not _is_object(text.lstrip().partition("\n")[0]):
            raise error
        return _json_lines(text.split("\n"))
    if isinstance(content, dict) and (_has_pair(content) or {"messages", "text"} & content.keys()):
        return [content]
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else content
    if not isinstance(content, list):
        raise ValueError("no list of rows; use a JSON list, an object with one list, or .jsonl")
    return content


def _read_jsonl(path: Path) -> _Rows:
    with path.open(encoding="utf-8-sig", errors=_KEEPING) as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        if start == "[":
            return _read_json(path)
        file.seek(0)
        return list(_json_lines(file))


def _json_lines(lines: Iterable[str]) -> _Rows:
    for number, line in enumerate(lines, start=1):
        if has_lone_surrogate(line):
            yield _Unread(f"line {number} is not UTF-8")
        elif line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                yield _Unread(f"line {number}: {first_line(error)}")


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _read_parquet(path: Path) -> _Rows:
    from pyarrow import ArrowException, parquet

    try:
        return parquet.read_table(path).to_pylist()
    except ArrowException as error:
        raise ValueError(first_line(error)) from None


_READERS: dict[str, Callable[[Path], _Rows]] = {
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _load_hub(
    name: str, split: str = "train", config: str | None = None, revision: str | None = None
) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset

    # No release that this package installs with runs a script of a data set.
    try:
        return load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise ValueError(
            f"source {name!r} must be a file or a reachable data set of the hub, got: "
            f"{first_line(error)}; "
            f"check the id, the split and the network, or pass a local file{nearest(name)}"
        ) from None


def _embedded(name: str) -> list[dict[str, Any]]:
    file = resources.files("fastdean.data.datasets") / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _beavertails(topic: str, unsafe: bool) -> list[dict[str, Any]]:
    """Answers to the prompts that drew at least one answer labelled with the topic's category.

    A safe answer carries no category label of its own, so its topic is that of its prompt.
    """
    rows = list(_load_hub("PKU-Alignment/BeaverTails", split="330k_train"))
    category = _BEAVERTAILS[topic]
    harmful = [row for row in rows if row["category"][category] and not row["is_safe"]]
    if unsafe:
        return [{"prompt": row["prompt"], "response": row["response"]} for row in harmful]
    labelled: dict[str, str] = {}
    for row in harmful:
        labelled.setdefault(row["prompt"], row["response"])
    return [
        {"prompt": row["prompt"], "response": row["response"], "unsafe": labelled[row["prompt"]]}
        for row in rows
        if row["is_safe"] and row["prompt"] in labelled
    ]


def _alpaca_cleaned() -> list[dict[str, Any]]:
    rows = [row for row in _load_hub("yahma/alpaca-cleaned") if row["output"]]
    prompts = ("\n".join(filter(None, (row["instruction"], row["input"]))) for row in rows)
    return [
        {"prompt": prompt, "response": row["output"]}
        for prompt, row in zip(prompts, rows, strict=True)
    ]


PRESETS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "beavertails:fairness": lambda: _beavertails("fairness", unsafe=False),
    "beavertails:fairness:unsafe": lambda: _beavertails("fairness", unsafe=True),
    "beavertails:privacy": lambda: _beavertails("privacy", unsafe=False),
    "beavertails:privacy:unsafe": lambda: _beavertails("privacy", unsafe=True),
    "alpaca-cleaned": _alpaca_cleaned,
    "embedded:fairness": lambda: _embedded("fairness"),
    "embedded:privacy": lambda: _embedded("privacy"),
    "embedded:general": lambda: _embedded("general"),
    # Prompts alone, as all they ask is whether they are answered.
    "embedded:benign": lambda: [*_embedded("benign_fairness"), *_embedded("benign_privacy")],
    "embedded:benign:fairness": lambda: _embedded("benign_fairness"),
    "embedded:benign:privacy": lambda: _embedded("benign_privacy"),
    "embedded:gender_facts": lambda: _embedded("gender_facts"),
    "embedded:debias": lambda: [row for row in _embedded("debias") if "text" in row],
    "embedded:debias:pairs": lambda: [row for row in _embedded("debias") if "premise" in row],
}
