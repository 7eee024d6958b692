"""What tells one model from another, as digests: whoever goes on from kept results compares them.

The figures of a finished step are used again, so that they must be those of this model and not only
of its name. Digests are of what was loaded, and not of its files: a folder says nothing of dtype,
device and attention code, and a hub id has no files to read.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastdean.model_state import unwrap

# Of the configuration; they say where and with what it was written.
_PROVENANCE = ("_name_or_path", "transformers_version")
# Of a fast tokenizer's state: left there by whoever called it last, and given anew by each caller.
_OF_A_CALL = ("truncation", "padding")
# Where transformers keeps the code that came with a model.
_OWN_CODE = "transformers_modules"


def model_identity(model: nn.Module, tokenizer: Any) -> dict[str, str]:
    """By name of the part: SHA-256 of what a model's figures depend on.

    The parts are "model weights" (every bit of every parameter and stored buffer, head and
    embeddings too), "model configuration", "attention implementation", "model code" (what came with
    its files), "device" (its kind), "tokenizer" and "chat template".

    Reads each weight once, a tied one too, at the speed of SHA-256 (about 1 GB/s); an offloaded
    one is brought to the CPU.
    """
    model = unwrap(model)
    return {
        "model weights": weights_digest(model),
        "model configuration": json_digest(_configuration(model)),
        "attention implementation": json_digest(_implementations(model)),
        "model code": json_digest(_own_code(model)),
        "device": json_digest(sorted({p.device.type for p in model.parameters()} - {"meta"})),
        "tokenizer": json_digest(_rules(tokenizer)),
        "chat template": json_digest(getattr(tokenizer, "chat_template", None)),
    }


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of the names and bytes of a model's parameters and buffers.

    Buffers that no checkpoint holds follow from the configuration, and a forward pass may change
    them: they are left out.
    """
    digest = hashlib.sha256()
    for name, tensor in _tensors(model):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy())
    return digest.hexdigest()


def json_digest(value: Any) -> str:
    """SHA-256 of a value as JSON; what JSON does not know counts by its text."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=_as_json)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _as_json(value: Any) -> Any:
    # The order of a set is another in every process.
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def _configuration(model: nn.Module) -> dict[str, Any]:
    found = model.config.to_diff_dict()
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


def _own_code(model: nn.Module) -> list[str]:
    kinds = {type(module) for module in model.modules()}
    own = (kind for kind in kinds if kind.__module__.startswith(_OWN_CODE))
    return sorted({inspect.getsource(inspect.getmodule(kind)) for kind in own})


def _rules(tokenizer: Any) -> list[Any]:
    """What decides how a text becomes tokens."""
    if getattr(tokenizer, "is_fast", False):
        vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
        vocabulary = {key: part for key, part in vocabulary.items() if key not in _OF_A_CALL}
    else:
        vocabulary = tokenizer.get_vocab()
    return [type(tokenizer).__name__, vocabulary, tokenizer.special_tokens_map]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, each once."""
    # The tensors are kept too, as the number of one that is gone may be given to another.
    seen: dict[int, Tensor] = {}
    for name, module in model.named_modules():
        own = {**module._parameters, **module._buffers}
        own = {key: t for key, t in own.items() if key not in module._non_persistent_buffers_set}
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
