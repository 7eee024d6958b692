"""`score` against one-example-at-a-time autograd in float64, on several architectures."""

from __future__ import annotations

import pytest
import torch
from oracle import norm_error, top_k, unit_importance, weight_importance
from tiny_data import batches, make_examples
from tiny_models import MODELS, VOCAB

import fastdean
from fastdean.coupling.targets.finding import find_targets


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
    scores = fastdean.score(model, batches(examples, 3), granularity="unit", progress=False)
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


def fnet():
    """Mixes tokens by a Fourier transform over the whole row, whatever the attention mask says."""
    from transformers import FNetConfig, FNetForMaskedLM

    torch.manual_seed(0)
    config = FNetConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        max_position_embeddings=64, tpu_short_seq_length=64,
    )  # fmt: skip
    return FNetForMaskedLM(config).eval()


def phi3_with_long_rope():
    """Its rotary frequencies change once a batch holds an example longer than 8 tokens."""
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "factor": 8.0,
        "original_max_position_embeddings": 8,
        "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
    }  # fmt: skip
    config = Phi3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
        original_max_position_embeddings=8, rope_parameters=rope, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return Phi3ForCausalLM(config).eval()


@pytest.mark.parametrize(("build", "shift"), [(fnet, 0), (phi3_with_long_rope, 1)])
def test_models_that_see_their_batch_are_batched_so_that_they_do_not(build, shift):
    model, examples = build(), make_examples(lengths=(3, 5, 20, 6, 5))
    scores = fastdean.score(model, batches(examples, 5), progress=False)
    expected = weight_importance(model, examples, list(scores), shift)
    for parameter, value in scores.items():
        assert norm_error(value, expected[parameter]) < 1e-5, parameter


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_made_for_target_rows_only(name):
    model, examples = MODELS[name](), make_examples()
    rows = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(
        lambda module, args, output: rows.append(output.flatten(0, -2).shape[0])
    )
    fastdean.score(model, batches(examples, 3), progress=False)  # what is probed once per model
    rows.clear()
    fastdean.score(model, batches(examples, 3), progress=False)
    handle.remove()
    shift = shift_of(name)
    # The first pass is the trial's.
    assert sum(rows[1:]) == sum(int((labels[shift:] != -100).sum()) for _, labels in examples)


def test_no_backward_pass_goes_below_the_lowest_target():
    model, carries = MODELS["llama"](), {}
    for index, layer in enumerate(model.model.layers):
        for name, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(
                    lambda module, args, output, key=(index, name): carries.update(
                        {key: args[0].requires_grad}
                    )
                )
    scores = fastdean.score(
        model, batches(make_examples(), 3), target_modules=r".*layers\.1\.mlp\..*", progress=False
    )
    assert len(scores) == 3
    # Of all inputs of Linears, one lies above a target: that of the down projection.
    assert [key for key, carried in carries.items() if carried] == [(1, "mlp.down_proj")]


def test_layers_that_share_one_weight_are_refused():
    model = MODELS["llama"]()
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match="shares its weight with model.layers.1.mlp.up_proj"):
        fastdean.score(model, batches(make_examples(), 4), progress=False)
