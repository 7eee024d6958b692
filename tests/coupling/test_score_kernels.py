"""`score` and `couple` through the kernels: the sums and the masks of the reference."""

from __future__ import annotations

import pytest
import torch
from machine import DEVICE
from oracle import norm_error, weight_importance
from tiny_data import batches, make_examples
from tiny_models import MODELS

import fastdean


def scored(model, examples, impl, **options):
    return fastdean.score(model, batches(examples, 4), impl=impl, progress=False, **options)


@pytest.mark.parametrize("granularity", ["weight", "unit"])
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_the_reference(name, granularity):
    model, examples = MODELS[name]().to(DEVICE), make_examples()
    ours = scored(model, examples, "triton", granularity=granularity)
    reference = scored(model, examples, "reference", granularity=granularity)
    assert list(ours) == list(reference)
    for parameter, value in ours.items():
        assert norm_error(value, reference[parameter]) < 1e-5, parameter


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models(dtype):
    model, examples = MODELS["llama"]().to(DEVICE, dtype), make_examples()
    ours, reference = (scored(model, examples, impl) for impl in ("triton", "reference"))
    for parameter, value in ours.items():
        # Same inputs and gradients on both sides: only the order of fp32 additions differs.
        assert norm_error(value, reference[parameter]) < 1e-5, parameter


def test_scores_are_those_of_the_autograd_loop():
    model, examples = MODELS["llama"](), make_examples()
    expected = weight_importance(model, examples, list(scored(model, examples, "reference")))
    for parameter, value in scored(model.to(DEVICE), examples, "triton").items():
        assert norm_error(value.cpu(), expected[parameter]) < 1e-5, parameter


def test_the_whole_method_selects_the_same_weights(monkeypatch):
    model, examples = MODELS["llama"]().to(DEVICE), make_examples()
    masks = []
    for impl in ("triton", "reference"):
        # For every operation that has such an implementation, the selection among them.
        monkeypatch.setenv("FASTDEAN_IMPL", impl)
        fair, priv, gen = (
            scored(model, part, None, keep_top=0.2)
            for part in (examples[0::3], examples[1::3], examples[2::3])
        )
        masks.append(fastdean.couple(fair, priv, general=gen, ratio=0.1))
    ours, reference = masks
    assert list(ours.entries) == list(reference.entries)
    for name, entry in ours.entries.items():
        assert torch.equal(entry.index, reference.entries[name].index)
