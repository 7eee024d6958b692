"""`orders`: three data sets batch by batch, and layer by layer with states in memory and in files,
the last also with the weights left in the files of a checkpoint (`stream_model`).

Each turn is a process of its own, so that no memory of one is another's. All read the model from
one checkpoint, written before; the time of reading it is counted of the streamed model alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.harness import command, gate, tables
from benchmarks.harness.cases import Case
from benchmarks.harness.processes import finished
from benchmarks.harness.rates import copy_bandwidth, matrix_rate
from benchmarks.harness.session import Sample, Session, most, seconds_of, take_turns
from benchmarks.harness.store import Record
from benchmarks.harness.tables import Cells, Table
from benchmarks.score import subject
from benchmarks.score.work import score_case
from fastdean.coupling.targets.finding import find_targets
from fastdean.data.examples import Example

_SETS, KEEP_TOP = 3, 1e-3


class Way(NamedTuple):
    """The order, whether states lie in files, and whether the weights stay in theirs."""

    order: str
    files: bool = False
    streamed: bool = False


BATCHES, LAYERS, STREAMED = "batches", "layers", "layers, streamed"
WAYS = {
    BATCHES: Way("batches"),
    LAYERS: Way("layers"),
    "layers, files": Way("layers", files=True),
    STREAMED: Way("layers", files=True, streamed=True),
}
# What the order of the layers is built to.
_AIMS = (
    "Aims: layers at most 1.35x the time of batches, with states in files 0.4x their memory; "
    "streamed, with states in files, 1.1x the time of layers"
)


class Written(NamedTuple):
    """What a model's checkpoint and its examples were written for.

    Attributes:
        case: the work that going batch by batch cannot avoid.
        again: weights that the order of the layers takes through one forward pass more.
        weight_bytes: of the loaded model.
    """

    case: Case
    again: int
    weight_bytes: int


def add_options(parser: argparse.ArgumentParser) -> None:
    subject.add_options(parser)
    said = "where checkpoint and states are written, and removed again: it chooses the disk"
    command.scratch_folder(parser, said)
    command.repeats(parser, 3)


def tests(options: argparse.Namespace, on_gpu: bool) -> Sequence[str]:
    return gate.test_files("by_layers", "streaming")


def run(session: Session) -> int:
    """Append one record per way, in fp32; `--examples` are those of each of the three sets."""
    options = session.options
    setup = {"dtype": "fp32", "examples": options.examples, "keep_top": KEEP_TOP}
    done = session.earlier("orders", set(WAYS), setup, same_command=True)
    for _ in session.due([] if done else [setup], "comparisons"):
        with tempfile.TemporaryDirectory(prefix="fastdean-orders-", dir=options.folder) as folder:
            written = _write(options, Path(folder))
            given = {"device": options.device, "targets": options.targets}
            turns = {name: partial(turn, Path(folder), way, **given) for name, way in WAYS.items()}
            taken = list(take_turns(turns, options.repeats))
        rates = {
            "matrix_rate": matrix_rate(written.case.products, torch.float32, session.device),
            "copy_bandwidth": copy_bandwidth(session.device),
        }
        rows = [_record(session, setup, name, each, written, rates) for name, each, _ in taken]
        print(tables.rendered(TABLE, rows))
    return 0


def _write(options: argparse.Namespace, folder: Path) -> Written:
    """The model and three sets of examples, one row of each in turn."""
    model, name, examples_of = subject.load_subject(options, "fp32")
    examples = examples_of(_SETS * options.examples)
    write(folder, model, {str(i): examples[i::_SETS] for i in range(_SETS)})
    targets, name = options.targets, f"{name}, {options.targets}"
    return Written(
        score_case(model, examples, target_modules=targets, contenders=(), op="orders", name=name),
        sum(target.module.weight.numel() for target in find_targets(model, "all")),
        sum(each.numel() * each.element_size() for each in model.parameters()),
    )


def write(folder: Path, model: nn.Module, sets: Mapping[str, Sequence[Example]]) -> None:
    """What `turn` reads."""
    pairs = {
        name: [[each.input_ids.tolist(), each.labels.tolist()] for each in examples]
        for name, examples in sets.items()
    }
    _sets_in(folder).write_text(json.dumps(pairs), encoding="utf-8")
    model.save_pretrained(_checkpoint_in(folder))


def _checkpoint_in(folder: Path) -> Path:
    return folder / "checkpoint"


def _sets_in(folder: Path) -> Path:
    return folder / "sets.json"


def turn(folder: Path, way: Way, device: str, targets: str = "mlp") -> Sample:
    """One scoring of what lies in the folder, in a process of its own."""
    asked = {
        "checkpoint": str(_checkpoint_in(folder)),
        "sets": str(_sets_in(folder)),
        "device": device,
        "streamed": way.streamed,
        "options": {
            "order": way.order,
            "states": str(folder / "states") if way.files else "device",
            "keep_top": KEEP_TOP,
            "target_modules": targets,
        },
    }
    once = [sys.executable, "-m", "benchmarks.score.order_once", json.dumps(asked)]
    return Sample(**json.loads(finished(once).splitlines()[-1]))


def _record(
    session: Session,
    setup: dict[str, Any],
    name: str,
    samples: Sequence[Sample],
    written: Written,
    rates: dict[str, float],
) -> Record:
    """The floor is the way's own; by layers every weight of a layer is read twice."""
    case, seconds = written.case, seconds_of(samples)
    tokens, operations, read = case.settings["tokens"], case.operations, case.bytes
    if WAYS[name].order == "layers":
        operations += 2 * written.again * tokens
        read += torch.float32.itemsize * written.again
    floor_s = max(operations / rates["matrix_rate"], read / rates["copy_bandwidth"])
    metrics = {
        "peak_bytes": most([sample.peak_bytes for sample in samples]),
        "tokens_per_s": tokens / seconds["median_s"],
        "operations": operations,
        "bytes": read,
        **rates,
        "floor_s": floor_s,
        "share_of_floor": floor_s / seconds["median_s"],
    }
    ran = {"repeats": len(samples), "tokens": tokens, "weight_bytes": written.weight_bytes}
    parts = {"setup": setup | ran, "seconds": seconds, "metrics": metrics}
    return session.append(case.op, case.name, name, **parts)


def _lines(rows: Sequence[Record]) -> tuple[Cells, list[Cells]]:
    of = {row.contender: row for row in rows}
    header = ["order", "seconds (p20 to p80)", "of batches' time", "of layers' time"]
    lines = [
        [
            row.contender,
            tables.spread(row),
            *(_share(row["median_s"], of[name]["median_s"]) for name in (BATCHES, LAYERS)),
            *tables.memory_and_floor(row),
        ]
        for row in rows
    ]
    for row, line in zip(rows, lines, strict=True):
        batches, model = of[BATCHES]["peak_bytes"], row["weight_bytes"]
        if row.contender == STREAMED and batches is not None:
            batches += model
        line.insert(-1, _share(row["peak_bytes"], batches))
    return [*header, "peak memory", "of batches' memory", "own floor / time"], lines


def _share(part: float | None, whole: float | None) -> str:
    return tables.NOT_MEASURED if part is None or not whole else f"{part / whole:.2f}x"


def _notes(rows: Sequence[Record]) -> list[str]:
    row = rows[0]
    size = f"{_SETS} data sets of {row['examples']} examples, {row['tokens']} tokens in all"
    kept = f"fp32, keep_top {row['keep_top']:g}, {row['repeats']} rounds, each a process of its own"
    memory = (
        f"Memory is above the loaded model ({tables.megabytes(row['weight_bytes'])}); streamed it "
        "is above the process before it opened the checkpoint, mapped pages of weights included, "
        "and of batches' with the model. The checkpoint was written just before"
    )
    return [f"{row.case}. {size}, {kept}. {memory}. {_AIMS}. {tables.provenance_line(row)}"]


_KEYS = ("device", "case", "examples")
TABLE = Table("python -m benchmarks orders", _KEYS, ("device", "case", "date"), _lines, _notes)
