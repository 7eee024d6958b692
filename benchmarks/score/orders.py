"""`orders`: three data sets batch by batch, and layer by layer with states in memory and in files.

Each turn is a process of its own, so that no memory of one is another's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.harness import gate, store, tables
from benchmarks.harness.command import positive
from benchmarks.harness.rates import Floor, MatrixShape, copy_bandwidth, matrix_rate
from benchmarks.harness.session import Sample, Session, most, seconds_of, take_turns
from benchmarks.harness.store import Record
from benchmarks.harness.tables import Cells, Table
from benchmarks.score import subject

_KEEP_TOP = 1e-3
_BATCHES = "batches"
# Contender -> the order, and whether states lie in files.
_WAYS = {
    _BATCHES: ("batches", False),
    "layers": ("layers", False),
    "layers, files": ("layers", True),
}
# What the order of the layers is built to: times the batches' time and, in files, their memory.
_AIMS = "Aims: at most 1.35x the time of batches, and with states in files 0.4x their memory"


def add_options(parser: argparse.ArgumentParser) -> None:
    subject.add_options(parser)
    parser.set_defaults(examples=32)
    add = parser.add_argument
    add("--repeats", type=positive, default=3)
    said = "where states in files lie: it chooses the disk"
    add("--folder", type=Path, default=Path(tempfile.gettempdir()), help=said)


def tests(options: argparse.Namespace, on_gpu: bool) -> Sequence[str]:
    return gate.test_files("by_layers")


def run(session: Session) -> int:
    """Append one record per order, in fp32; `--examples` are those of each of the three sets."""
    options = session.options
    setup = {"dtype": "fp32", "examples": options.examples, "keep_top": _KEEP_TOP}
    done = session.earlier("orders", set(_WAYS), setup, same_command=True)
    for _ in session.due([] if done else [setup], "comparisons"):
        found: dict[str, list[dict]] = {name: [] for name in _WAYS}
        turns = {name: partial(_turn, options, name, found[name]) for name in _WAYS}
        ended = {name: samples for name, samples, _ in take_turns(turns, options.repeats)}
        shapes = [MatrixShape(**shape) for shape in found[_BATCHES][0]["shapes"]]
        rates = {
            "matrix_rate": matrix_rate(shapes, torch.float32, session.device),
            "copy_bandwidth": copy_bandwidth(session.device),
        }
        rows = []
        for name, samples in ended.items():
            work = found[name][0]
            floor = Floor(work["operations"], work["bytes"], **rates)
            rows.append(_record(session, setup, name, samples, work, floor))
        print(tables.rendered(TABLE, rows))
    return 0


def _turn(options: argparse.Namespace, name: str, found: list[dict]) -> Sample:
    order, files = _WAYS[name]
    given = {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items()}
    given = {key: v for key, v in given.items() if isinstance(v, str | int | float | None)}
    given |= {"order": order, "files": files, "keep_top": _KEEP_TOP}
    command = [sys.executable, "-m", "benchmarks.score.order_once", json.dumps(given)]
    paths = [str(store.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    if done.returncode != 0:
        said = (done.stderr.strip() or "nothing").splitlines()[-1]
        raise RuntimeError(
            f"{name} must end well to be timed, got exit code {done.returncode} and {said!r}; "
            "nothing was recorded"
        )
    found.append(json.loads(done.stdout.splitlines()[-1]))
    return Sample(found[-1]["seconds"], found[-1]["peak_bytes"])


def _record(
    session: Session,
    setup: dict,
    name: str,
    samples: Sequence[Sample],
    work: dict,
    floor: Floor,
) -> Record:
    seconds = seconds_of(samples)
    metrics = {
        "peak_bytes": most([sample.peak_bytes for sample in samples]),
        "tokens_per_s": work["tokens"] / seconds["median_s"],
        **vars(floor),
        "floor_s": floor.seconds,
        "share_of_floor": floor.seconds / seconds["median_s"],
    }
    ran = {"repeats": len(samples), "tokens": work["tokens"]}
    case = f"{work['name']}, {session.options.targets}"
    parts = {"setup": setup | ran, "seconds": seconds, "metrics": metrics}
    return session.append("orders", case, name, **parts)


def _lines(rows: Sequence[Record]) -> tuple[Cells, list[Cells]]:
    batches = next((row for row in rows if row.contender == _BATCHES), None)
    header = ["order", "seconds (p20 to p80)", "of batches' time", "peak memory above the model"]
    lines = [
        [
            row.contender,
            tables.spread(row),
            _share(row, batches, "median_s"),
            tables.megabytes(row["peak_bytes"]),
            _share(row, batches, "peak_bytes"),
            f"{row['share_of_floor']:.0%}",
        ]
        for row in rows
    ]
    return [*header, "of batches' memory", "own floor / time"], lines


def _share(row: Record, batches: Record | None, what: str) -> str:
    if batches is None or row[what] is None or not batches[what]:
        return tables.NOT_MEASURED
    return f"{row[what] / batches[what]:.2f}x"


def _notes(rows: Sequence[Record]) -> list[str]:
    row = rows[0]
    size = f"3 data sets of {row['examples']} examples, {row['tokens']} tokens in all"
    kept = f"fp32, keep_top {row['keep_top']:g}, {row['repeats']} rounds, each a process of its own"
    return [f"{row.case}. {size}, {kept}. {_AIMS}. {tables.provenance_line(row)}"]


_KEYS = ("device", "case", "examples")
TABLE = Table("python -m benchmarks orders", _KEYS, ("device", "case", "date"), _lines, _notes)
