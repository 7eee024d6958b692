"""`score` against one-example-at-a-time autograd in float64, on several architectures."""

from __future__ import annotations

import pytest
import torch
from oracle import norm_error, top_k, unit_importance, weight_importance
from tiny_data import batches, make_examples
from tiny_models import MODELS

import fastdean
from fastdean.targets import find_targets


def shift_of(name):
    return 0 if name == "bert" else 1


@pytest.mark.parametrize("target_modules", ["mlp", "self_attn"])
@pytest.mark.parametrize("name", MODELS)
def test_weight_scores_equal_the_autograd_loop(name, target_modules):
    model, examples = MODELS[name](), make_examples()
    scores = fastdean.score(
        model, batches(examples, 4), target_modules=target_modules, progress=False
    )
    expected = weight_importance(model, examples, list(scores), shift_of(name))
    assert len(scores) == len(find_targets(model, target_modules))
    for parameter, value in scores.items():
        assert norm_error(value, expected[parameter]) < 1e-5, parameter
        assert scores.select(parameter, 20).tolist() == top_k(expected[parameter], 20)


@pytest.mark.parametrize("name", MODELS)
def test_unit_scores_equal_the_autograd_loop(name):
    model, examples = MODELS[name](), make_examples()
    scores = fastdean.score(model, batches(examples, 3), granularity="neuron", progress=False)
    modules = [parameter.removesuffix(".weight") for parameter in scores]
    expected = unit_importance(model, examples, modules, shift_of(name))
    assert len(scores) == 2
    for parameter, value in scores.items():
        assert norm_error(value, expected[parameter.removesuffix(".weight")]) < 1e-5


@pytest.mark.parametrize("tokens_per_batch", [1, 20, 10_000])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [1, 4])
def test_batching_does_not_change_the_scores(size, side, tokens_per_batch):
    model, examples = MODELS["llama"](), make_examples()
    expected = weight_importance(model, examples, [t.parameter for t in find_targets(model)])
    for order in (examples, examples[::-1]):
        scores = fastdean.score(
            model, batches(order, size, side), tokens_per_batch=tokens_per_batch, progress=False
        )
        for parameter, value in scores.items():
            assert norm_error(value, expected[parameter]) < 1e-5


def test_one_example_needs_no_position_ids():
    from transformers import LlamaForCausalLM

    class WithoutPositions(LlamaForCausalLM):
        def forward(self, input_ids, attention_mask=None):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask)

    model, examples = MODELS["llama"](), make_examples(lengths=(9,))
    expected = weight_importance(model, examples, [t.parameter for t in find_targets(model)])
    model.__class__ = WithoutPositions
    scores = fastdean.score(model, batches(examples, 1), progress=False)
    assert scores.manifest["batching"]["packed"] is False
    for parameter, value in scores.items():
        assert norm_error(value, expected[parameter]) < 1e-5


def test_memory_budget_gives_the_same_bits_over_several_passes():
    model, examples = MODELS["qwen2"](), make_examples()
    whole = fastdean.score(model, batches(examples, 4), progress=False)
    largest = max(4 * entry.numel for entry in whole.entries.values())
    split = fastdean.score(model, batches(examples, 4), memory_budget=largest, progress=False)
    assert list(whole) == list(split)
    for parameter in whole:
        assert torch.equal(whole[parameter], split[parameter])


def test_loss_fn_scores_any_model_per_example():
    model, examples = MODELS["llama"](), make_examples()

    def loss_fn(outputs, batch):
        losses = []
        for logits, labels in zip(outputs.logits, batch["labels"], strict=True):
            kept = labels[1:] != -100
            losses.append(torch.nn.functional.cross_entropy(logits[:-1][kept], labels[1:][kept]))
        return torch.stack(losses)

    own = fastdean.score(model, batches(examples, 2), loss_fn=loss_fn, progress=False)
    built_in = fastdean.score(model, batches(examples, 2), progress=False)
    for parameter in built_in:
        assert norm_error(own[parameter], built_in[parameter]) < 1e-5
