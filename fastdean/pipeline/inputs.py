"""What a job reads beside its rows, as digests that tell whether it has changed.

The figures of a finished step are used again, so that they must be those of this model, these words
and these benchmarks, and not only of the same names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdean.debias.resuming import add_tensor, json_digest
from fastdean.model_state import unwrap

_CHUNK_BYTES = 1 << 20
# Of the configuration; they say where and with what it was written.
_PROVENANCE = ("_name_or_path", "transformers_version")


def model_digest(model: nn.Module, tokenizer: Any) -> str:
    """SHA-256 of a loaded model's configuration and tokenizer, and of every bit of its weights.

    Reads each weight once, a tied one too; an offloaded one is brought to the CPU.
    """
    model = unwrap(model)
    digest = hashlib.sha256(json_digest([_configuration(model), _rules(tokenizer)]).encode())
    for name, tensor in _tensors(model):
        add_tensor(digest, name, tensor)
    return digest.hexdigest()


def benchmark_digests(asked: Sequence[str]) -> dict[str, str | None]:
    """By "bias NAME=SRC": SHA-256 of the file, or of the files of the folder, that SRC names.

    None for what is no file, such as a hub id, whose content costs a download to know.

    Args:
        asked: as `bias.check` takes them.
    """
    sources = {entry: entry.partition("=")[2].partition("::")[0] for entry in asked}
    return {f"bias {entry}": _path_digest(source) for entry, source in sources.items() if source}


def _configuration(model: nn.Module) -> dict[str, Any]:
    found = model.config.to_diff_dict()
    return {key: value for key, value in found.items() if key not in _PROVENANCE}


def _rules(tokenizer: Any) -> list[Any]:
    """What decides how a text becomes tokens."""
    fast = getattr(tokenizer, "is_fast", False)
    return [
        tokenizer.backend_tokenizer.to_str() if fast else tokenizer.get_vocab(),
        tokenizer.special_tokens_map,
    ]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, each once."""
    # The tensors are kept too, as the number of one that is gone may be given to another.
    seen: dict[int, Tensor] = {}
    for name, module in model.named_modules():
        own = {**module._parameters, **module._buffers}
        new = {key: t for key, t in own.items() if t is not None and id(t) not in seen}
        seen.update((id(tensor), tensor) for tensor in new.values())
        with _in_memory(module):
            yield from ((f"{name}.{key}", getattr(module, key)) for key in new)


def _in_memory(module: nn.Module) -> AbstractContextManager:
    """In which the module's own weights can be read, also when they are offloaded."""
    if not any(weight.is_meta for weight in module.parameters(recurse=False)):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module, execution_device=torch.device("cpu"))


def _path_digest(source: str) -> str | None:
    place = Path(source).expanduser()
    if not place.exists():
        return None
    files = [place] if place.is_file() else sorted(p for p in place.iterdir() if p.is_file())
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()
