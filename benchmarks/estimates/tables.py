"""The tables of docs/guide/large-jobs.md: what jobs on three shapes need, on 1, 8 and 64 GPUs.

Computed by `fastdean.estimate` from the configurations beside this file; nothing is measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fastdean
from benchmarks.harness.tables import markdown
from fastdean.jobs.estimate.found import Estimate, OrderEstimate

MARKER = "estimates"
# Folder of the configuration -> what the table calls it.
SHAPES = {
    "qwen2-7b": "7B (Qwen2)",
    "llama-3-70b": "70B (Llama 3)",
    "deepseek-v3": "671B mixture (DeepSeek-V3)",
}
GPUS = (1, 8, 64)
JOB = {"sets": 3, "examples": 128, "tokens_per_example": 76, "keep_top": 1e-3, "dtype": "bf16"}
GPU_MEMORY = "80GB"
# Folder, GPUs, and over how many of them tensor parallel splits a model; of the mixture its ranks
# own whole experts.
SPLIT = (
    ("qwen2-7b", 8, 2),
    ("llama-3-70b", 8, 8),
    ("llama-3-70b", 64, 8),
    ("deepseek-v3", 64, 64),
)
ORDERS = ("batches", "layers", "layers, streamed", "layers, sharded")


def tables() -> str:
    """Both, in Markdown, with the sentence above them."""
    found = {(name, gpus): _estimated(name, gpus) for name in SHAPES for gpus in GPUS}
    whole = [list(_whole(SHAPES[name], found[name, 1])) for name in SHAPES]
    of_a_rank = [list(_of_a_rank(SHAPES[name], each)) for (name, _), each in found.items()]
    return "\n".join(
        [
            "**Computed, not measured**: 3 sets of 128 examples of 76 tokens, MLPs, `keep_top` "
            "1e-3, bf16. Of the whole",
            "job:",
            "",
            *markdown(("shape", "weights", "sums, dense", "states", *_FLOP), whole),
            "",
            "Of each GPU the peak, bold where it fits into 80 GB, and what it receives from the "
            "others:",
            "",
            *markdown(("shape", "GPUs", *map(_named, ORDERS), *_RECEIVED), of_a_rank),
            "",
            "Where tensor parallel splits the model over ranks (of the mixture with whole experts "
            "on each), and what is",
            "added up in its layers:",
            "",
            *markdown(
                ("shape", "GPUs", "of a model", *map(_named, ORDERS[:2]), *_RECEIVED_SPLIT),
                [list(_of_a_split_rank(*each)) for each in SPLIT],
            ),
        ]
    )


_FLOP = ('FLOP "batches"', '"layers"')
_RECEIVED = ("sums", "candidates", "weights, sharded")
_RECEIVED_SPLIT = ("sums", "candidates", 'activations, "batches"', '"layers"')


def _estimated(name: str, gpus: int, **split: int) -> Estimate:
    folder = Path(__file__).resolve().parent / name
    return fastdean.estimate(str(folder), **JOB, gpus=gpus, gpu_memory=GPU_MEMORY, **split)


def _whole(shape: str, found: Estimate) -> Iterator[str]:
    yield shape
    for name in ("weights", "sums", "states"):
        yield _gigabytes(found.memory[name])
    for order in ("batches", "layers"):
        yield f"{sum(found.orders[order].operations.values()):.1e}".replace("e+", "e")


def _of_a_rank(shape: str, found: Estimate) -> Iterator[str]:
    yield shape
    yield str(found.machine["ranks"])
    for name in ORDERS:
        each = found.orders.get(name)
        yield "-" if each is None else _peak(each)
    received = found.orders.get("layers, sharded", found.orders["layers"]).received
    for kind in ("sums", "candidates", "weights"):
        yield _gigabytes(received[kind]) if kind in received else "-"


def _of_a_split_rank(name: str, gpus: int, of_a_model: int) -> Iterator[str]:
    experts = of_a_model if name == "deepseek-v3" else 1
    found = _estimated(name, gpus, tensor_parallel=of_a_model, expert_parallel=experts)
    yield from (SHAPES[name], str(gpus), str(of_a_model))
    orders = [found.orders[order] for order in ORDERS[:2]]
    yield from (_peak(each) for each in orders)
    for kind in ("sums", "candidates"):
        yield _gigabytes(orders[0].received[kind]) if kind in orders[0].received else "-"
    yield from (_gigabytes(each.received["activations"]) for each in orders)


def _peak(found: OrderEstimate) -> str:
    size = _gigabytes(found.peak_bytes)
    return f"**{size}**" if found.fits else size


def _named(order: str) -> str:
    name, _, weights = order.partition(", ")
    return f'"{name}"{f", {weights}" if weights else ""}'


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
