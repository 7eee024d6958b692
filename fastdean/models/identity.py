"""Digests that tell one model from another, so that results are resumed with the same one only.

They are of what was loaded: a folder says nothing of dtype, device and attention code, and a hub id
has no files to read.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from fastdean.files.inventory import file_digest, listed
from fastdean.models.layers.stacks import decoder_layers
from fastdean.models.layers.streaming import StreamedModel
from fastdean.models.model_state import unwrap
from fastdean.models.ranks.sharded import resharded
from fastdean.models.ranks.shards import whole

# Entries of the configuration that say where and with what it was written.
_PROVENANCE = ("_name_or_path", "transformers_version")
# State of a fast tokenizer that each call sets.
_OF_A_CALL = ("truncation", "padding")
# Options of a tokenizer that say where it lies, or that are a part of their own here.
_OF_A_PLACE = ("name_or_path", "is_local", "local_files_only", "tokenizer_file", "chat_template")
# Of a model's folder: weights, configuration, tokenizer, template and code.
_OF_A_MODEL = (".safetensors", ".bin", ".gguf", ".json", ".model", ".jinja", ".py", ".txt")
# Where transformers keeps the code that came with a model.
_OWN_CODE = "transformers_modules"


def model_identity(
    model: nn.Module,
    tokenizer: Any,
    *,
    weights: str | None = None,
    device: torch.device | None = None,
) -> dict[str, str]:
    """By name of the part: SHA-256 of what a model's figures depend on.

    The parts are "model weights" (every bit of every parameter and stored buffer, head and
    embeddings too), "model configuration", "attention implementation", "model code" (what came with
    its files and the tokenizer's), "device" (its kind), "tokenizer" and "chat template".

    Reads each weight once, a tied one too, at the speed of SHA-256 (about 1 GB/s); an offloaded
    one is brought to the CPU.

    Args:
        weights: the first part, of a model whose weights are not in memory.
        device: where they go then.
    """
    model = unwrap(model)
    devices = {p.device.type for p in model.parameters()} - {"meta"} if device is None else {device}
    return {
        "model weights": weights_digest(model) if weights is None else weights,
        **model_parts(model, tokenizer),
        "device": json_digest(sorted(getattr(each, "type", each) for each in devices)),
        **tokenizer_parts(tokenizer),
    }


def model_files_digest(model: str) -> str | None:
    """SHA-256 of a local model's files, without loading it; None of a hub id.

    For those who keep figures by a model's name, which two models can have. Read at the speed of
    SHA-256 (about 1 GB/s).
    """
    place = Path(model).expanduser()
    if place.is_file():
        return file_digest(place)
    if not place.is_dir():
        return None
    names = [f.name for f in place.iterdir() if f.suffix in _OF_A_MODEL and f.is_file()]
    return json_digest(listed(place, names))


def model_parts(model: nn.Module, tokenizer: Any = None) -> dict[str, str]:
    """The parts "model configuration", "attention implementation" and "model code" alone."""
    return {
        "model configuration": json_digest(_configuration(model)),
        "attention implementation": json_digest(_implementations(model)),
        "model code": json_digest(_own_code(model, tokenizer)),
    }


def tokenizer_parts(tokenizer: Any) -> dict[str, str]:
    """The parts "tokenizer" and "chat template" alone."""
    return {
        "tokenizer": json_digest(_rules(tokenizer)),
        "chat template": json_digest(getattr(tokenizer, "chat_template", None)),
    }


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of the names and bytes of a model's parameters and buffers.

    Buffers that no checkpoint holds follow from the configuration, and a forward pass may change
    them: they are left out. The digest is put together from those of the decoder layers and of what
    is outside of them, so that a model whose layers come in one at a time has the same. So has one
    that FSDP2 shards, on every rank: all ranks call it, and a parameter at a time is gathered.
    """
    resharded(model)
    layers = decoder_layers(model)
    inside = {module for layer in layers.values() for module in layer.modules()}
    parts = {name: _stored_digest(layer) for name, layer in layers.items()}
    outside = {name: _digest_of(tensor) for name, tensor in stored_tensors(model, inside)}
    return json_digest({**parts, "": outside})


class PassingWeights:
    """The digest of a streamed model's weights, taken as they come in one after the other.

    It is that of `weights_digest` of the model that is loaded.
    """

    def __init__(self, stream: StreamedModel) -> None:
        self._stream = stream
        self._inside = {module for layer in stream.layers.values() for module in layer.modules()}
        self._parts: dict[str, str] = {}
        self._outside: dict[str, str] = {}
        self._seen: set[str] = set()
        stream.came_in = self._take

    def _take(self, window: str) -> None:
        if window in self._seen:
            return
        self._seen.add(window)
        layer = self._stream.layers.get(window)
        if layer is None:
            for module, name, key in _stored_names(self._stream.model, self._inside):
                tensor = getattr(module, key)
                if name not in self._outside and not tensor.is_meta:
                    self._outside[name] = _digest_of(tensor)
        else:
            self._parts[window] = _stored_digest(layer)

    @property
    def digest(self) -> str | None:
        """None while some have not come in."""
        if not self._seen >= self._stream.windows:
            return None
        return json_digest({**self._parts, "": self._outside})

    def read(self) -> str:
        """Bring in what has not come in yet; the digest."""
        with self._stream.outside_layers():
            for name in self._stream.on_demand:
                self._stream.bring(name)
            for k, name in enumerate(self._stream.layers):
                if name not in self._parts:
                    with self._stream.layer(k, k + 1):
                        pass
        assert self.digest is not None
        return self.digest


def _stored_digest(module: nn.Module) -> str:
    found = {name: _digest_of(tensor) for name, tensor in stored_tensors(module)}
    return json_digest(found)


def _digest_of(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    plain = whole(tensor).cpu().contiguous().reshape(-1)
    digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def json_digest(value: Any) -> str:
    """SHA-256 of a value as JSON; what JSON does not know counts by its text."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=_as_json)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _as_json(value: Any) -> Any:
    # The order of a set is another in every process.
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def _configuration(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_diff_dict"):
        return {}
    found = config.to_diff_dict()
    return {key: value for key, value in found.items() if key not in _PROVENANCE}


def _implementations(model: nn.Module) -> list[str]:
    """Which attention and experts run; a configuration as it is saved does not say."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    return sorted(
        {
            f"{getattr(config, '_attn_implementation', None)} "
            f"{getattr(config, '_experts_implementation', None)}"
            for config in configs
            if config is not None
        }
    )


def _own_code(model: nn.Module, tokenizer: Any) -> list[str]:
    """The sources that came with the files of model and tokenizer.

    Also of modules that hold no class of theirs and are only imported by those that do.
    """
    kinds = {type(tokenizer), *(type(module) for module in model.modules())}
    rooms = {
        kind.__module__.rpartition(".")[0]
        for kind in kinds
        if kind.__module__.startswith(_OWN_CODE)
    }
    own = (
        getattr(module, "__file__", None)
        for name, module in list(sys.modules.items())
        if name.rpartition(".")[0] in rooms
    )
    return sorted({Path(file).read_text(encoding="utf-8") for file in own if file})


def _rules(tokenizer: Any) -> list[Any]:
    """What decides how a text becomes tokens."""
    if getattr(tokenizer, "is_fast", False):
        vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
        vocabulary = {key: part for key, part in vocabulary.items() if key not in _OF_A_CALL}
        options = {}
    else:
        vocabulary = [tokenizer.get_vocab(), _vocabulary_files(tokenizer)]
        options = {
            key: value
            for key, value in tokenizer.init_kwargs.items()
            if key not in (*_OF_A_PLACE, *tokenizer.vocab_files_names)
        }
    # Of the wrapper, which sets it anew in what it wraps with each call.
    options["split_special_tokens"] = getattr(tokenizer, "split_special_tokens", False)
    return [type(tokenizer).__name__, vocabulary, tokenizer.special_tokens_map, options]


def _vocabulary_files(tokenizer: Any) -> dict[str, str]:
    """Digests of what a tokenizer in Python writes of itself: merges and the like are in no dict.

    Empty of one that writes nothing, as one of bytes does.
    """
    with TemporaryDirectory() as folder:
        with suppress(NotImplementedError):
            tokenizer.save_vocabulary(folder)
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file()
        }


def stored_tensors(
    model: nn.Module, without: Collection[nn.Module] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that a checkpoint holds, by name, each once.

    Args:
        without: modules whose own ones are left out.
    """
    for module, names in groupby(_stored_names(model, without), key=lambda each: each[0]):
        with _in_memory(module):
            yield from ((name, getattr(module, key)) for _, name, key in names)


def _stored_names(
    model: nn.Module, without: Collection[nn.Module] = ()
) -> Iterator[tuple[nn.Module, str, str]]:
    """The module of each, its name in the model and in the module."""
    # The tensors are kept too, as the number of one that is gone may be given to another.
    seen: dict[int, Tensor] = {}
    for name, module in model.named_modules():
        if module in without:
            continue
        own = {**module._parameters, **module._buffers}
        own = {key: t for key, t in own.items() if key not in module._non_persistent_buffers_set}
        new = {key: t for key, t in own.items() if t is not None and id(t) not in seen}
        seen.update((id(tensor), tensor) for tensor in new.values())
        yield from ((module, f"{name}.{key}", key) for key in new)


def _in_memory(module: nn.Module) -> AbstractContextManager:
    """In which the module's own weights can be read, also when they are offloaded."""
    if not any(weight.is_meta for weight in module.parameters(recurse=False)):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module, execution_device=torch.device("cpu"))
