"""`orders`: three data sets batch by batch, and layer by layer with states in memory and in files,
the last also with the weights left in the files of a checkpoint (`stream_model`).

Each turn is a process of its own, so that no memory of one is another's. All read the model from
one checkpoint, written before; the time of reading it is counted of the streamed model alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.harness import command, gate, tables
from benchmarks.harness.cases import Case
from benchmarks.harness.clock import elapsed
from benchmarks.harness.memory import Held
from benchmarks.harness.processes import apart
from benchmarks.harness.rates import copy_bandwidth, matrix_rate
from benchmarks.harness.session import Sample, Session, take_turns
from benchmarks.harness.store import Record
from benchmarks.score import subject
from benchmarks.score.work import score_case
from fastdean.coupling.scoring import score_sets
from fastdean.coupling.targets.finding import find_targets
from fastdean.data.examples import Example
from fastdean.models.loading import stream_model

_SETS, KEEP_TOP = 3, 1e-3
_WARM_UP = 2


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
        with session.scratch("orders") as folder:
            case, again, weight_bytes = _write(options, folder)
            given = (options.device, options.targets)
            turns = {name: partial(turn, folder, way, *given) for name, way in WAYS.items()}
            taken = list(take_turns(turns, options.repeats))
        rates = {
            "matrix_rate": matrix_rate(case.products, torch.float32, session.device),
            "copy_bandwidth": copy_bandwidth(session.device),
        }
        setup |= {"tokens": case.settings["tokens"], "weight_bytes": weight_bytes}
        rows = []
        for name, samples, _ in taken:
            # The floor is the way's own; by layers every weight of a layer is read twice.
            twice = again if WAYS[name].order == "layers" else 0
            metrics = {
                "operations": case.operations + 2 * twice * setup["tokens"],
                "bytes": case.bytes + torch.float32.itemsize * twice,
                **rates,
            }
            by_operations = metrics["operations"] / rates["matrix_rate"]
            metrics["floor_s"] = max(by_operations, metrics["bytes"] / rates["copy_bandwidth"])
            rows.append(session.append_turns("orders", case.name, name, samples, setup, metrics))
        print(tables.rendered(TABLE, rows))
    return 0


def _write(options: argparse.Namespace, folder: Path) -> tuple[Case, int, int]:
    """The model and three sets of examples, one row of each in turn.

    Returns:
        The work that going batch by batch cannot avoid; the weights that the order of the layers
        takes through one forward pass more; the bytes of all weights.
    """
    model, name, examples_of = subject.load_subject(options, "fp32")
    examples = examples_of(_SETS * options.examples)
    write(folder, model, {str(i): examples[i::_SETS] for i in range(_SETS)})
    targets, name = options.targets, f"{name}, {options.targets}"
    return (
        score_case(model, examples, target_modules=targets, contenders=(), op="orders", name=name),
        sum(target.module.weight.numel() for target in find_targets(model, "all")),
        sum(each.nbytes for each in model.parameters()),
    )


def write(folder: Path, model: nn.Module, sets: Mapping[str, Sequence[Example]]) -> None:
    """What `turn` reads."""
    pairs = {
        name: [[each.input_ids.tolist(), each.labels.tolist()] for each in examples]
        for name, examples in sets.items()
    }
    (folder / "sets.json").write_text(json.dumps(pairs), encoding="utf-8")
    model.save_pretrained(folder / "checkpoint")


def turn(folder: Path, way: Way, device: str, targets: str = "mlp") -> Sample:
    """One scoring of what lies in the folder, in a process of its own."""
    options = {
        "order": way.order,
        "states": str(folder / "states") if way.files else "device",
        "keep_top": KEEP_TOP,
        "target_modules": targets,
    }
    return Sample(**apart(scored, str(folder), way.streamed, device, options))


def scored(folder: str, streamed: bool, device_name: str, options: dict[str, Any]) -> dict:
    """In a process of its own: the fields of a `Sample` of `score_sets`, with these options.

    Nothing is timed but the call of it. Its peak memory is above the loaded model; of a streamed
    one above what was held before the checkpoint was opened.
    """
    from transformers import AutoModelForCausalLM

    device, checkpoint = torch.device(device_name), str(Path(folder) / "checkpoint")
    sets = {
        name: [Example(*map(torch.tensor, example)) for example in each]
        for name, each in json.loads((Path(folder) / "sets.json").read_text("utf-8")).items()
    }

    def opened() -> Any:
        """In the dtype of the checkpoint."""
        if streamed:
            return stream_model(checkpoint, device=str(device))
        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").to(device).eval()

    def run(chosen: Mapping[str, Sequence[Example]]) -> None:
        score_sets(model, chosen, **options, progress=False)

    model = opened()
    # What is asked of a model once, and what torch loads on first use.
    first = next(iter(sets))
    run({first: sets[first][:_WARM_UP]})
    if streamed:
        model = None
    held = Held(device)
    if streamed:
        model = opened()
    seconds = elapsed(lambda: run(sets), device)
    return {"seconds": seconds, "peak_bytes": held.added_bytes()}


def _columns(rows: Sequence[Record]) -> tables.Columns:
    batches, layers = ({r.contender: r for r in rows}[name] for name in (BATCHES, LAYERS))

    def of_batches_memory(row: Record) -> str:
        peak = batches["peak_bytes"]
        if row.contender == STREAMED and peak is not None:
            peak += row["weight_bytes"]
        return tables.share(row["peak_bytes"], peak)

    return {
        "order": "{contender}",
        "seconds (p20 to p80)": tables.SPREAD,
        "of batches' time": lambda row: tables.share(row["median_s"], batches["median_s"]),
        "of layers' time": lambda row: tables.share(row["median_s"], layers["median_s"]),
        **tables.PEAK,
        "of batches' memory": of_batches_memory,
        "own floor / time": "{share_of_floor:.0%}",
    }


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
TABLE = tables.Table("python -m benchmarks orders", _columns, _notes, _KEYS, tables.RUNS)
