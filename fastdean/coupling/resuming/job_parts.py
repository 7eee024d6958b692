"""What must be the same for a job to go on in another process: by name, as text or digest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdean.coupling.results.score_entry import fingerprint
from fastdean.coupling.targets.target import Target
from fastdean.coupling.workloads.scorable import Scorable
from fastdean.coupling.workloads.workload import Workload
from fastdean.data.examples import TOKENS
from fastdean.files.provenance import versions
from fastdean.models.identity import json_digest, model_parts, stored_tensors, tokenizer_parts
from fastdean.models.ranks.distributed import Ranks
from fastdean.models.ranks.shards import OwnBlock, is_sharded
from fastdean.models.trees import tensors
from fastdean.ops._dispatch import ENVIRONMENT_VARIABLE
from fastdean.precision import reduced_products

# Of which another version may round, or define, otherwise.
_PACKAGES = ("fastdean", "torch", "transformers")
# Parts that another number of ranks has otherwise.
OF_RANKS = frozenset(
    {"number of ranks", "ranks that hold a model together", "batches", "matrices that are held"}
)


def job_parts(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    targets: Sequence[Target],
    sets: Mapping[str, Scorable],
    options: Mapping[str, Any],
    ranks: Ranks,
    device: torch.device,
) -> dict[str, str]:
    """Name of a part -> text that another job has otherwise.

    The layers' own weights are not in it: they are compared when they are in memory.

    Args:
        targets: those that were matched.
        sets: by their names in quotes, with what else tells them apart behind.
        options: arguments of the job, plain values.
        device: where weights compute that lie nowhere now.
    """
    installed = versions()
    inside = {module for layer in layers.values() for module in layer.modules()}
    works = {name: scorable.work for name, scorable in sets.items()}
    return {
        **{f"the version of {name}": installed.get(name, "none") for name in _PACKAGES},
        **{name: str(value) for name, value in options.items()},
        **model_parts(model),
        "dtype": " ".join(sorted({str(parameter.dtype) for parameter in model.parameters()})),
        "device": " ".join(sorted({_device(p) for p in model.parameters() if not p.is_meta})),
        "precision of products": " ".join(sorted(reduced_products(model.parameters(), device))),
        "layers": " ".join(layers),
        "weights outside the layers": weights_digest(model, inside),
        "names of the data sets": " ".join(sets),
        **{f"data set {name}": _data(work) for name, work in works.items()},
        "tokens_per_batch": " ".join(str(_tokens_per_batch(work)) for work in works.values()),
        "batches": json_digest([_batches(work) for work in works.values()]),
        "loss_fn": " ".join(sorted({_name(getattr(w, "loss_fn", None)) for w in works.values()})),
        "targets": json_digest(
            [
                [target.parameter for target in targets],
                *(
                    [[t.parameter for t in each.targets], sorted(each.sequence_first)]
                    for each in sets.values()
                ),
            ]
        ),
        ENVIRONMENT_VARIABLE: os.environ.get(ENVIRONMENT_VARIABLE, ""),
        "deterministic": str(torch.are_deterministic_algorithms_enabled()),
        "number of ranks": str(ranks.size),
        **_split(model, ranks),
        **_tokenizers(works.values()),
    }


def circumstances() -> dict[str, str]:
    """What may round otherwise on another machine, and does not keep a job from going on there."""
    return {
        "threads": str(torch.get_num_threads()),
        "processor": torch.backends.cpu.get_cpu_capability(),
    }


def weights_digest(module: nn.Module, without: Collection[nn.Module] = ()) -> str:
    """Of the names and checksums (`score_entry.fingerprint`) of what a module stores.

    Where the weights lie, at the speed of memory. An offloaded one is brought to the CPU. Of one
    that is split over ranks this rank's block counts.

    Args:
        without: submodules that do not count.
    """
    found = []
    for name, tensor in stored_tensors(module, without):
        # Of a weight that nobody can bring in there is nothing to compare.
        bits = 0 if tensor.is_meta else _bits(tensor)
        found.append([name, str(tensor.dtype), list(tensor.shape), bits])
    return json_digest(found)


def _bits(tensor: Tensor) -> int:
    block = OwnBlock.of(tensor)
    return fingerprint(block.tensor, None if block.is_whole else block)


def _split(model: nn.Module, ranks: Ranks) -> dict[str, str]:
    """How tensor parallel splits a model: which ranks hold one, and which axes lie on several."""
    if not ranks.teams:
        return {}
    placed: list[Any] = [[n, p] for n, p in model.named_parameters() if is_sharded(p)]
    return {
        "ranks that hold a model together": str([list(team) for team in ranks.teams]),
        "how tensor parallel splits it": json_digest([[n, str(p.placements)] for n, p in placed]),
    }


def _device(parameter: nn.Parameter) -> str:
    device = parameter.device
    if device.type != "cuda":
        return str(device)
    return f"{device} {torch.cuda.get_device_name(device)}"


def _data(work: Workload) -> str:
    return work.describe()["data"]["sha256"]


def _tokenizers(works: Iterable[Workload]) -> dict[str, str]:
    """Of those that texts became tokens with, which names the reason of other tokens."""
    found: dict[str, str] = {}
    for work in works:
        tokenizer = getattr(work, "tokenizer", None)
        if tokenizer is not None and set(work.describe()["data"]["rendered"]) != {TOKENS}:
            found |= tokenizer_parts(tokenizer)
    return found


def _tokens_per_batch(work: Workload) -> Any:
    return work.describe().get("batching", {}).get("tokens_per_batch")


def _batches(work: Workload) -> list[str]:
    """Of each batch of this rank, in order: which examples are in it, and how they lie in it."""
    digests = []
    for batch in work.batches:
        content = hashlib.sha256()
        parts = batch if isinstance(batch, Mapping) else vars(batch)
        for path, tensor in tensors(parts):
            content.update(f"{path} {tensor.dtype} {list(tensor.shape)}".encode())
            plain = tensor.detach().cpu().contiguous().flatten()
            content.update(plain.view(torch.uint8).numpy().data)
        digests.append(content.hexdigest())
    return digests


def _name(function: Callable[..., Any] | None) -> str:
    if function is None:
        return "own"
    kind = function if hasattr(function, "__qualname__") else type(function)
    return f"{kind.__module__}.{kind.__qualname__}"
