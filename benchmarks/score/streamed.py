"""`streamed`: a checkpoint larger than the memory that it is scored in.

Random bf16 weights of a published shape are written in a file per layer, and scored by
`fastdean.score(folder)` in a process of its own. What is recorded is the most memory that this
process held: all of it (VmHWM, mapped pages of files included), and without files (RssAnon).
"""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import fastdean
from benchmarks.harness import command, gate, lengths, models, tables
from benchmarks.harness.clock import elapsed
from benchmarks.harness.memory import peak_bytes
from benchmarks.harness.processes import apart
from benchmarks.harness.session import Sample, Session, seconds_of
from fastdean.models.available_memory import anonymous_memory

_BETWEEN_LOOKS_S = 0.02
# Repeated through the weights: as random as a product needs, and made in no time.
_RANDOM = 1 << 26
_SCALE = 0.02


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(device="cpu")
    add = parser.add_argument
    said = f"the model's shape: {', '.join(models.SHAPES)}"
    add("--shape", choices=list(models.SHAPES), default="qwen2-7b", metavar="SHAPE", help=said)
    add(
        "--examples", type=command.positive, default=12, metavar="N", help="of BeaverTails' lengths"
    )
    add("--keep-top", type=float, default=1e-5, metavar="X", help="share of each matrix")
    said = "where the checkpoint is written, and removed again: it chooses the disk"
    command.scratch_folder(parser, said)


def tests(options: argparse.Namespace, on_gpu: bool) -> Sequence[str]:
    return gate.test_files("streaming")


def run(session: Session) -> int:
    """Append one record."""
    options = session.options
    setup = {"shape": options.shape, "examples": options.examples, "keep_top": options.keep_top}
    done = session.earlier("streamed", {"streamed"}, setup, same_command=True)
    for _ in session.due([] if done else [setup], "models"):
        with session.scratch("streamed") as folder:
            size = _write(options.shape, folder)
            found = apart(scored, str(folder), *setup.values())
        ran = {"checkpoint_bytes": size, "tokens": found["tokens"]}
        metrics = {
            name: found[name] for name in ("peak_bytes", "peak_anonymous_bytes", "bytes_read")
        }
        row = session.append(
            "streamed",
            f"{models.display_name(options.shape)}, mlp",
            "streamed",
            setup=setup | ran,
            seconds=seconds_of([Sample(found["seconds"], found["peak_bytes"])]),
            metrics=metrics | {"tokens_per_s": found["tokens"] / found["seconds"]},
        )
        print(tables.rendered(TABLE, [row]))
    return 0


def _write(shape: str, folder: Path) -> int:
    """The checkpoint as save_pretrained would write it; its bytes. One layer at a time is held."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    from fastdean.models.layers.streaming import parameters_on_meta

    config = Qwen2Config(**models.SHAPES[shape]._asdict(), dtype="bfloat16")
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(folder)
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    values = _values()
    files: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        layer = next((part for part in name.split(".") if part.isdigit()), name.partition(".")[2])
        files.setdefault(f"model-{layer}.safetensors", {})[name] = parameter
    weight_map, size = {}, 0
    for file, parameters in files.items():
        content = {name: _filled(parameter.shape, values) for name, parameter in parameters.items()}
        save_file(content, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(content, file)
        size += sum(tensor.nbytes for tensor in content.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return size


def _values() -> Iterator[Tensor]:
    """Random numbers in bf16, from another place each time."""
    generator = torch.Generator().manual_seed(0)
    numbers = (torch.randn(_RANDOM, generator=generator) * _SCALE).bfloat16()
    while True:
        yield numbers.roll(int(torch.randint(_RANDOM, (1,), generator=generator)))


def _filled(shape: torch.Size, values: Iterator[Tensor]) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    numbers, count = next(values), shape.numel()
    return numbers.repeat(-(-count // len(numbers)))[:count].view(shape).clone()


def scored(folder: str, shape: str, count: int, keep_top: float) -> dict[str, Any]:
    """In a process of its own: a scoring of the folder, with what `run` records of it."""
    examples = lengths.random_examples(count, None, models.SHAPES[shape].vocab_size)
    found: list[fastdean.Scores] = []
    # Of anonymous memory, which the kernel keeps no peak of.
    looks, is_over = [0], threading.Event()

    def run() -> None:
        options = {"keep_top": keep_top, "progress": False, "order": "layers"}
        found.append(fastdean.score(Path(folder), examples, **options))

    def watch() -> None:
        while not is_over.wait(_BETWEEN_LOOKS_S):
            looks[0] = max(looks[0], anonymous_memory() or 0)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    seconds = elapsed(run, torch.device("cpu"))
    is_over.set()
    watching.join()
    return {
        "seconds": seconds,
        "peak_bytes": peak_bytes(),
        "peak_anonymous_bytes": looks[0],
        "bytes_read": found[0].manifest["order"]["bytes_of_weights_read"],
        "tokens": sum(map(len, examples)),
    }


_COLUMNS: tables.Columns = {
    "model": lambda row: f"{row.case}, {row['checkpoint_bytes'] / 1e9:.1f} GB",
    "examples": "{examples}, {tokens} tokens",
    "seconds": "{median_s:.1f}",
    "memory in all": tables.megabytes_of("peak_bytes"),
    "without files": tables.megabytes_of("peak_anonymous_bytes"),
    "weights read": lambda row: tables.share(row["bytes_read"], row["checkpoint_bytes"]),
}
_NOTE = (
    "bf16, keep_top {keep_top:g}, one round. The most that the process held, torch itself "
    "included; `in all` counts mapped pages of files. The checkpoint was written just before, so "
    "that much of it was in the page cache. Aim: at most 4 GB in all."
)
_KEYS = ("device", "case", "examples")
TABLE = tables.Table("python -m benchmarks streamed", _COLUMNS, _NOTE, _KEYS, tables.RUNS)
