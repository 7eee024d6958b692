"""Models of a published shape with random weights: speed asks for nothing else.

Built from a configuration on the device itself, so that neither a hub nor a tokenizer is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

_SEED = 0


@dataclass(frozen=True)
class Shape:
    """A Qwen2 model; `tied`: the head shares the embedding's weight."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool


# As published, smallest first; "toy" is for trying a command out.
SHAPES: dict[str, Shape] = {
    "toy": Shape(32, 64, 2, 4, 2, 96, False),
    "qwen2-0.5b": Shape(896, 4864, 24, 14, 2, 151936, True),
    "qwen2-1.5b": Shape(1536, 8960, 28, 12, 2, 151936, True),
    "qwen2-7b": Shape(3584, 18944, 28, 28, 4, 152064, False),
}


@dataclass(frozen=True)
class EncoderShape:
    """A BERT model with a masked language modelling head tied to its embedding."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int


ENCODERS: dict[str, EncoderShape] = {
    "toy": EncoderShape(32, 64, 2, 4, 96),
    "bert-base": EncoderShape(768, 3072, 12, 12, 30522),
}


def random_model(name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A causal language model of one of `SHAPES`, in eval mode; the same weights every time."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    shape = SHAPES[name]
    config = Qwen2Config(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
    )
    return _built(lambda: AutoModelForCausalLM.from_config(config, dtype=dtype), device)


def random_encoder(shape: EncoderShape, device: torch.device) -> nn.Module:
    """A masked language model in fp32 and in eval mode; the same weights every time."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
    )
    return _built(lambda: BertForMaskedLM(config), device)


def _built(build: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(_SEED)
        model = build()
    return model.eval()


def display_name(name: str) -> str:
    return f"random weights in the shape of {name}"
