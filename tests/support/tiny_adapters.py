"""Stand-ins of PEFT's structure, which is not installed for the tests."""

from __future__ import annotations

import torch
from tiny_models import llama
from torch import nn


class Lora(nn.Module):
    """`peft.tuners.lora.Linear`: W x + B A x, or W x where it is merged into W or off."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, base_layer, rank=2):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, rank, False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base_layer.out_features, False)})
        self.active_adapters = ["default"]
        self.merged = self.disable_adapters = False

    @property
    def weight(self):
        return self.base_layer.weight

    def merge(self):
        delta = self.lora_B["default"].weight @ self.lora_A["default"].weight
        self.base_layer.weight.data += delta
        self.merged = True

    def forward(self, x):
        if self.merged or self.disable_adapters:
            return self.base_layer(x)
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Tuner(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model


class Peft(nn.Module):
    """`peft.PeftModel`: the model two levels down, its attributes reached from outside."""

    def __init__(self, model):
        super().__init__()
        self.base_model = Tuner(model)

    def get_base_model(self):
        return self.base_model.model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model.model, name)

    def forward(self, *args, **kwargs):
        return self.base_model.model(*args, **kwargs)


def adapted(*, merged=False, off=False):
    torch.manual_seed(0)
    model = llama()
    for layer in model.model.layers:
        layer.mlp.up_proj = Lora(layer.mlp.up_proj)
        layer.self_attn.q_proj = Lora(layer.self_attn.q_proj)
    for module in model.modules():
        if isinstance(module, Lora):
            if merged:
                module.merge()
            module.disable_adapters = off
    return Peft(model).eval()
