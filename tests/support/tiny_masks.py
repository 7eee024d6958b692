"""A model of two matrices, masks on it by hand, and its weights bit for bit."""

from __future__ import annotations

import torch
from torch import nn

from fastdean.masks import MaskEntry, NeuronMask

FIRST, SECOND = "layers.0.weight", "layers.1.weight"


class Stack(nn.Module):
    """Two square linear layers under one name, for masks by hand."""

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(2))
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = torch.randn(6, 6, generator=generator).to(dtype)
        self.layers[0].weight.data[0, 0] = -0.0

    def forward(self, x):
        return self.layers[1](self.layers[0](x))


def mask_of(model, places, **options):
    """A mask on the given flat indices, with the model's values there."""
    named = dict(model.named_parameters(remove_duplicate=False))
    entries = {}
    for name, index in places.items():
        weight = named[name].detach()
        entries[name] = MaskEntry(
            torch.tensor(index), weight.reshape(-1)[index].clone(), tuple(weight.shape)
        )
    return NeuronMask(entries, **options)


def bits(model):
    return {
        name: parameter.detach().clone().contiguous().view(torch.uint8)
        for name, parameter in model.named_parameters()
    }


def assert_bits(model, expected):
    for name, found in bits(model).items():
        assert torch.equal(found, expected[name]), name


def flat(model, name):
    return model.get_parameter(name).detach().reshape(-1)
