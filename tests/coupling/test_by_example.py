"""Parameters that no hook scores: from their own gradient, one backward pass for each example."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from oracle import norm_error, weight_importance
from tiny_adapters import adapted
from tiny_data import batches, make_examples
from tiny_experts import experts_model
from tiny_models import HIDDEN, INTERMEDIATE, VOCAB, bert, gpt2, llama, qwen2
from torch import nn

import fastdean
from fastdean.coupling.resuming import resumable
from fastdean.coupling.scoring import score_sets
from fastdean.coupling.targets.coverage import coverage
from fastdean.coupling.targets.finding import find_targets
from fastdean.models.loading import stream_model

LENGTHS = (3, 9, 5)
SMALL = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2, "pad_token_id": 0}
NORMS = ["input_layernorm.weight", "model.norm.weight"]


def examples():
    return make_examples(lengths=LENGTHS)


def score(model, target_modules="every", **options):
    options = {"progress": False, "tokens_per_batch": 40, **options}
    return fastdean.score(model, batches(examples(), 4), target_modules=target_modules, **options)


def built(kind, config):
    torch.manual_seed(0)
    model = kind(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def mamba2():
    config = transformers.Mamba2Config(
        **SMALL, num_heads=4, head_dim=16, state_size=8, n_groups=1, chunk_size=8
    )
    return built(transformers.Mamba2ForCausalLM, config)


def albert():
    """One layer, called several times."""
    config = transformers.AlbertConfig(
        **SMALL, embedding_size=HIDDEN, num_attention_heads=4, intermediate_size=INTERMEDIATE
    )
    return built(transformers.AlbertForMaskedLM, config)


MODELS = {
    "llama": llama,
    "gpt2": gpt2,
    "qwen2, tied": qwen2,
    "bert": bert,
    "albert": albert,
    "Mixtral": lambda: experts_model("Mixtral"),
    "GptOss": lambda: experts_model("GptOss"),
    "Jamba": lambda: experts_model("Jamba"),
    "mamba2": mamba2,
}


def expected_of(model, names, shift=1):
    model = copy.deepcopy(model)
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation_internal"):
            # The grouped product of the default implementation has no float64 form.
            config._experts_implementation_internal = "eager"
    return weight_importance(model, examples(), names, shift)


def assert_exact(found, model, shift=1, within=1e-5):
    expected = expected_of(model, list(found), shift)
    for name in found:
        # The bias of keys changes no attention, and has a gradient of rounding alone.
        off = (found[name].double() - expected[name]).norm()
        assert off <= within * expected[name].norm() + 1e-8 * off.new_tensor(HIDDEN).sqrt(), name


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_equals_autograd(name):
    model = MODELS[name]()
    found = score(model)
    left_out = found.manifest["coverage"]["left_out"]
    unscored = {parameter for parameter, _ in model.named_parameters()} - set(found)
    assert unscored == {n if n in unscored else f"{n}.weight" for n in left_out}
    assert_exact(found, model, 0 if name in ("bert", "albert") else 1)
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_longest_examples_do_not_share_a_row_of_the_models_positions():
    config = transformers.LlamaConfig(
        **SMALL, num_attention_heads=4, intermediate_size=INTERMEDIATE, max_position_embeddings=10
    )
    model = built(transformers.LlamaForCausalLM, config)
    assert_exact(score(model, NORMS), model)


def test_examples_with_positions_of_their_own():
    model = llama()
    loader = [
        {"input_ids": ids, "labels": labels, "position_ids": torch.arange(len(ids)) + 2}
        for ids, labels in examples()
    ]
    found = fastdean.score(model, loader, target_modules=NORMS, progress=False)
    assert "model.norm.weight" in found and len(found) == 3


def test_losses_in_bf16_may_round_with_what_shares_their_batch():
    model = llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 8
    assert len(score(model.bfloat16(), NORMS)) == 3


@pytest.mark.parametrize(
    "name, options",
    [
        ("llama", {"signs": True}),
        ("llama", {"keep_top": 0.1, "memory_budget": 200_000}),
        ("GptOss", {"keep_top": 0.3}),
        ("Jamba", {}),
    ],
)
def test_by_layers_is_the_same(name, options):
    model = MODELS[name]()
    expected = score(model, order="batches", **options)
    found = score(model, order="layers", **options)
    assert found.manifest["order"]["by"] == "layers"
    assert list(found) == list(expected)
    for parameter in found:
        assert norm_error(found[parameter], expected[parameter]) < 1e-5, parameter
        if found.is_sparse:
            assert torch.equal(found.index(parameter), expected.index(parameter))
        if found.has_signs:
            assert torch.equal(found.signs(parameter), expected.signs(parameter))


@pytest.mark.parametrize("order", ["auto", "batches", "layers"])
def test_a_budget_splits_parameters_of_any_shape(order):
    model = llama()
    options = {"target_modules": "mlp,input_layernorm.weight", "keep_top": 0.1}
    expected = score(model, **options)
    found = score(model, **options, order=order, memory_budget=150_000)
    assert list(found) == list(expected)
    for parameter in found:
        assert norm_error(found[parameter], expected[parameter]) < 1e-5, parameter
    with pytest.raises(ValueError, match="memory_budget must"):
        score(model, **options, order=order, memory_budget=100)


def token_losses(outputs, batch):
    logits = outputs.logits.transpose(1, 2)
    return nn.functional.cross_entropy(logits, batch["labels"], reduction="none").mean(1)


def summed_by_hand(model, loader, loss_fn):
    """|W| * mean over examples of |dL/dW| in float64, each example given alone."""
    model = copy.deepcopy(model).double()
    names, weights = zip(*model.named_parameters(), strict=True)
    sums, number = [torch.zeros_like(weight) for weight in weights], 0
    for batch in loader:
        for row in range(len(batch["input_ids"])):
            one = {key: value[row : row + 1] for key, value in batch.items()}
            given = {key: value for key, value in one.items() if key != "labels"}
            loss = loss_fn(model(**given), one).sum()
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=True):
                total += 0 if gradient is None else gradient.to_dense().abs()
            number += 1
    scored = (weight.abs() * total / number for weight, total in zip(weights, sums, strict=True))
    return {name: value.detach() for name, value in zip(names, scored, strict=True)}


def test_an_encoder_and_a_decoder_that_share_their_embedding():
    config = transformers.T5Config(
        vocab_size=96, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    model = built(transformers.T5ForConditionalGeneration, config)
    generator = torch.Generator().manual_seed(0)
    loader = [
        {
            name: torch.randint(3, 96, (3, width), generator=generator)
            for name, width in (("input_ids", 6), ("decoder_input_ids", 5), ("labels", 5))
        }
    ]
    options = {"loss_fn": token_losses, "progress": False}
    found = fastdean.score(model, loader, target_modules="every", **options)
    expected = summed_by_hand(model, loader, token_losses)
    assert set(found) == set(expected)
    for name in found:
        assert norm_error(found[name], expected[name]) < 1e-5, name
    wanted = "relative_attention_bias.weight,layer_norm.weight,decoder.final_layer_norm.weight"
    by_layers = fastdean.score(model, loader, target_modules=wanted, order="layers", **options)
    assert len(by_layers) == 2 + 10 + 1
    for name in by_layers:
        assert norm_error(by_layers[name], expected[name]) < 1e-5, name
    with pytest.raises(RuntimeError, match=r"got shared\.weight, which is encoder\.embed_tokens\."):
        fastdean.score(model, loader, target_modules="shared.weight", order="layers", **options)
    # Every layer of the decoder is given what it makes.
    with pytest.raises(RuntimeError, match="parts of that of encoder.final_layer_norm.weight in s"):
        wanted = ["encoder.final_layer_norm.weight"]
        fastdean.score(model, loader, target_modules=wanted, order="layers", **options)


class Odd(nn.Module):
    """Parameters of every number of dimensions, one that is used twice, and one that is not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 8, sparse=True)
        self.along, self.image = nn.Conv1d(8, 8, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1)
        self.gate = nn.Parameter(torch.tensor(0.5))
        self.twice = nn.Parameter(torch.randn(8))
        self.unused = nn.Parameter(torch.randn(3))
        self.numbers = nn.Parameter(torch.arange(3), requires_grad=False)
        self.register_buffer("kept", torch.zeros(2))
        self.head = nn.Linear(8, VOCAB)

    def forward(self, input_ids):
        x = self.embed(input_ids) * self.twice
        x = x + self.gate * self.along(x.mT).mT
        x = self.image(x.unsqueeze(1)).squeeze(1)
        return SimpleNamespace(logits=self.head(torch.tanh(x) + self.twice))


def odd_loader():
    generator = torch.Generator().manual_seed(0)
    return [
        {
            name: torch.randint(3, VOCAB, (3, 5), generator=generator)
            for name in ("input_ids", "labels")
        }
    ]


ODD = "embed.weight,along.weight,image.weight,gate,twice,along.bias"


def score_odd(model, target_modules=ODD, loss_fn=token_losses, **options):
    options = {"loss_fn": loss_fn, "target_modules": target_modules, "progress": False, **options}
    return fastdean.score(model, odd_loader(), **options)


def test_parameters_of_any_shape(tmp_path):
    model = Odd()
    found = score_odd(model, signs=True)
    expected = summed_by_hand_of_floats(model)
    assert {len(found[name].shape) for name in found} == {0, 1, 2, 3, 4}
    for name in found:
        assert norm_error(found[name], expected[name]) < 1e-5, name
    found.save_pretrained(tmp_path / "scores")
    read = fastdean.Scores.from_pretrained(tmp_path / "scores")
    assert list(read) == list(found)
    assert all(torch.equal(read[name], found[name]) for name in found)
    assert read.expert_scope == found.expert_scope
    # Of a convolution, too, the ratio is a share of the whole tensor.
    assert found.entries["along.weight"].competing == 8 * 8 * 3
    mask = fastdean.couple(found, read, ratio=0.5, min_k=1)
    assert set(mask.names) == set(found)
    assert len(mask.entries["gate"]) == 1 and len(mask.entries["along.weight"]) == 96
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with mask.applied(model):
        assert not model.gate.detach()
        assert int((model.along.weight == 0).sum()) == 96
        assert int((model.image.weight == 0).sum()) == 4
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    mask.save_pretrained(tmp_path / "mask")
    fastdean.NeuronMask.from_pretrained(tmp_path / "mask").apply_(model)
    assert not model.gate.detach()
    sparse = score_odd(Odd(), keep_top=0.5)
    assert torch.equal(sparse.index("along.weight"), mask.entries["along.weight"].index)


def summed_by_hand_of_floats(model):
    model = copy.deepcopy(model)
    del model.numbers
    return summed_by_hand(model, odd_loader(), token_losses)


@pytest.mark.parametrize("name", ["mamba2", "GptOss"])
def test_a_checkpoint_is_patched_as_the_model_is(name, tmp_path):
    model = MODELS[name]()
    wanted = {
        "mamba2": "conv1d.weight,A_log,dt_bias,norm.weight,embeddings.weight",
        "GptOss": "router.weight,router.bias,sinks,gate_up_proj_bias,lm_head.weight",
    }
    first, second = (score(model, wanted[name], keep_top=0.5) for _ in range(2))
    mask = fastdean.couple(first, second, ratio=0.1, min_k=1)
    assert set(mask.names) == set(first)
    model.save_pretrained(tmp_path / "model")
    fastdean.patch_checkpoint(tmp_path / "model", mask, tmp_path / "out")
    patched = type(model).from_pretrained(tmp_path / "out").state_dict()
    mask.apply_(model)
    assert all(torch.equal(patched[key], value) for key, value in model.state_dict().items())


def test_signs_are_those_of_the_sum_of_gradients():
    model = llama()
    found = score(model, NORMS, signs=True)
    total = {name: 0.0 for name in found}
    own = copy.deepcopy(model).double()
    for ids, labels in examples():
        loss = weight_loss(own, ids, labels)
        gradients = torch.autograd.grad(loss, [own.get_parameter(name) for name in found])
        total = {n: total[n] + g for (n, g) in zip(found, gradients, strict=True)}
    for name in found:
        weight = own.get_parameter(name).detach()
        assert torch.equal(found.signs(name), (weight * total[name]).sign().to(torch.int8))


def weight_loss(model, ids, labels):
    logits = model(ids[None]).logits[0, :-1]
    return nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100)


# Which parameters.


@pytest.mark.parametrize(
    "target_modules, parameters, by_example",
    [
        (["input_layernorm.weight"], 2, 2),
        ("model.norm.weight", 1, 1),
        ("mlp,norm.weight", 7, 1),
        (["q_proj", "lm_head.weight"], 3, 1),
        (["q_proj.weight"], 2, 0),
        (r".*layernorm\.weight", 4, 4),
        (r"model\.layers\.0\..*", 7, 0),
        ("all", 14, 0),
        ("mlp", 6, 0),
        ("every", 21, 7),
        ("q_proj,every", 21, 7),
    ],
)
def test_what_is_asked_for(target_modules, parameters, by_example):
    found = find_targets(llama(), target_modules)
    names = [target.parameter for target in found]
    assert len(set(names)) == len(names) == parameters
    assert sum(target.by_example for target in found) == by_example


def test_a_module_is_meant_before_a_parameter():
    """Else a suffix that named matrices alone would take longer than before."""
    model = llama()
    model.model.layers[0].register_parameter("q_proj", nn.Parameter(torch.ones(3)))
    assert not any(target.by_example for target in find_targets(model, ["q_proj"]))


def test_tied_weights_go_by_either_name():
    (target,) = find_targets(qwen2(), ["lm_head.weight"])
    assert target.parameter == "model.embed_tokens.weight"
    assert find_targets(qwen2(), "embed_tokens.weight")[0].parameter == target.parameter


@pytest.mark.parametrize("name", ["llama", "Mixtral", "mamba2"])
def test_the_whole_model_is_scored_or_listed(name):
    model = MODELS[name]()
    named = dict(model.named_parameters())
    covered = coverage(model, find_targets(model, "all" if name != "mamba2" else "mixer"))
    others = covered["others"]
    in_groups = sum(group["parameters"] for group in covered["groups"].values())
    listed = sum(each["parameters"] for each in others.values())
    assert (
        in_groups + listed == covered["model_parameters"] == sum(map(torch.numel, named.values()))
    )
    assert sum(each["share"] for each in others.values()) == pytest.approx(
        listed / covered["model_parameters"]
    )
    assert not any(each["scored_parameters"] for each in others.values())
    every = coverage(model, find_targets(model, "every"))
    assert every["share"] == 1 and not every["unscorable"]
    assert all(each["scored_parameters"] == each["parameters"] for each in every["others"].values())


def test_the_manifest_says_how():
    manifest = score(llama(), "mlp,model.norm.weight").manifest
    assert manifest["one_backward_pass_per_example"] == ["model.norm.weight"]
    others = manifest["coverage"]["others"]
    assert others["model.norm.weight"]["scored_parameters"] == HIDDEN
    assert others["model.layers.*.input_layernorm.weight"] == {
        "parameters": 2 * HIDDEN,
        "scored_parameters": 0,
        "share": 2 * HIDDEN / manifest["model"]["parameters"],
    }
    assert "one_backward_pass_per_example" not in score(llama(), "mlp").manifest


# What hooks cannot see of a matrix.


def test_layers_that_share_a_norm():
    model = llama()
    model.model.layers[1].input_layernorm.weight = model.model.layers[0].input_layernorm.weight
    found = score(model, ["input_layernorm.weight"])
    assert list(found) == ["model.layers.0.input_layernorm.weight"]
    assert_exact(found, model)
    with pytest.raises(
        RuntimeError, match=r"got model\.layers\.0\.input_layernorm\.weight, which "
    ):
        score(model, ["input_layernorm.weight"], order="layers")


def test_linear_layers_that_share_a_weight_are_right_by_its_name():
    model = llama()
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match="layers with weights of their own"):
        score(model, ["up_proj"])
    assert_exact(score(model, ["up_proj.weight", "down_proj"]), model)


class Doubled(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, 2 * self.weight)


def test_a_linear_layer_that_computes_something_else_is_right_by_its_name():
    model = llama()
    own = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = other = Doubled(HIDDEN, INTERMEDIATE, bias=False)
    other.weight = own.weight
    with pytest.raises(RuntimeError, match="quantised weight or one that is used elsewhere"):
        score(model, ["up_proj"])
    found = score(model, ["up_proj.weight"])
    assert found.manifest["one_backward_pass_per_example"] == ["model.layers.0.mlp.up_proj.weight"]
    assert_exact(found, model)


# Half precision, files, ranks of a job.


def test_in_fp16_no_gradient_is_lost():
    model = llama().half()
    found = score(model, ["norm.weight", "post_attention_layernorm.weight"])
    assert found.manifest["loss_scale"] > 1
    assert_exact(found, model, within=2e-2)
    # An infinite gradient is taken again with less.
    with torch.no_grad():
        model.lm_head.weight *= 300
    scaled = score(model, ["norm.weight", "post_attention_layernorm.weight"])
    assert_exact(scaled, model, within=5e-2)


@pytest.mark.parametrize("family", ["llama", "GptOss"])
def test_a_streamed_model(family, tmp_path):
    model = MODELS[family]()
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    options = {"keep_top": 0.3, "order": "layers"}
    expected = score(model, **options)
    stream = stream_model(str(tmp_path / "model"))
    found = score(stream, **options)
    assert list(found) == list(expected)
    for name in found:
        assert torch.equal(found.index(name), expected.index(name)), name
        assert norm_error(found[name], expected[name]) < 1e-6, name
    assert {parameter.device.type for parameter in stream.model.parameters()} == {"meta"}


def test_tied_weights_that_are_streamed_are_refused(tmp_path):
    qwen2().save_pretrained(tmp_path / "model")
    stream = stream_model(str(tmp_path / "model"))
    with pytest.raises(RuntimeError, match="got model.embed_tokens.weight, which is lm_head.weigh"):
        score(stream, "lm_head.weight", keep_top=0.2)
    assert list(score(stream, "norm.weight", keep_top=0.2)) == ["model.norm.weight"]


@pytest.mark.parametrize("build", [llama, qwen2])
def test_offloaded_weights(build):
    """A tied weight that is offloaded is two tensors, which would have a part each."""
    from accelerate import cpu_offload

    wanted = "embed_tokens.weight,norm.weight,input_layernorm.weight,down_proj"
    expected, model = score(build(), wanted), build()
    cpu_offload(model, execution_device=torch.device("cpu"))
    if build is qwen2:
        with pytest.raises(RuntimeError, match="got model.embed_tokens.weight, which is lm_head.w"):
            score(model, wanted, order="layers")
        with pytest.raises(ValueError, match="got model.embed_tokens.weight, which is offloaded; "):
            score(model, wanted)
        return
    found = score(model, wanted)
    assert found.manifest["order"]["by"] == "layers" and list(found) == list(expected)
    for name in found:
        assert norm_error(found[name], expected[name]) < 1e-5, name
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_inside_peft():
    model = adapted(merged=True)
    found = score(model)
    plain = copy.deepcopy(model.get_base_model())
    for layer in plain.model.layers:
        layer.mlp.up_proj = layer.mlp.up_proj.base_layer
        layer.self_attn.q_proj = layer.self_attn.q_proj.base_layer
    assert set(found) == {name for name, _ in plain.named_parameters()}
    assert_exact(found, plain)
    with pytest.raises(ValueError, match="model must have its adapters merged"):
        score(adapted())
    assert len(score(adapted(), NORMS)) == 3


@pytest.mark.parametrize("steps", [1, 4, 6, 8])
def test_a_job_goes_on(steps, tmp_path, monkeypatch):
    """Two layers forward, two losses, then for the layer, and before it, two sets of targets."""
    options = {"target_modules": "every", "progress": False, "order": "layers"}
    sets = {"fair": list(batches(examples(), 4))}
    expected = score_sets(llama(), sets, **options)["fair"]
    with monkeypatch.context() as patch:
        reached = resumable.Resumable.reached

        def stopping(self, step):
            reached(self, step)
            if step + 1 == steps:
                raise KeyboardInterrupt

        patch.setattr(resumable.Resumable, "reached", stopping)
        with pytest.raises(KeyboardInterrupt):
            score_sets(llama(), sets, resume=tmp_path / "job", **options)
    found = score_sets(llama(), sets, resume=tmp_path / "job", **options)["fair"]
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_budget_gives_the_same_bits_over_several_passes():
    model = llama()
    whole, parts = score(model), score(model, memory_budget=50_000)
    assert list(whole) == list(parts)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


# Refusals.


@pytest.mark.parametrize(
    "build, target_modules, options, message",
    [
        (
            llama,
            NORMS,
            {"granularity": "unit"},
            r"got \['input_layernorm.weight', .* no units, suc",
        ),
        (llama, "every", {"granularity": "unit"}, "parameters that have no units, such as model.e"),
        (llama, ["nothing.weight"], {}, r"by their names are .*model\.layers\.\*\.input_layernorm"),
        (llama, "mlp,nothing.weight", {}, r"a parameter with each of its parts, got 'nothing\.we"),
        (llama, "mlp,nothing.weight", {}, r"names are .*model\.layers\.\*\.input_layernorm"),
        (llama, ["rotary_emb.inv_freq"], {}, r"inv_freq is a buffer, which nothing trains"),
        (Odd, "numbers", {}, r"floating-point weights of 16 bits.*, got torch\.int64 in num"),
        (Odd, "unused", {}, "unused must take part in the loss, got no gradient"),
        (Odd, ["unused", "gate"], {}, "unused must take part in the loss, got no gradient"),
    ],
)
def test_refusals(build, target_modules, options, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        scored = score if build is llama else score_odd
        scored(build(), target_modules, **options)


def test_parameters_that_are_frozen_are_scored_and_stay_frozen():
    model = llama().requires_grad_(False)
    assert_exact(score(model, NORMS), llama())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_failure_leaves_the_model_as_it_was():
    model = llama()
    before = dict(model.named_parameters())
    (first, _), *others = examples()
    # Not in the two longest examples, which are tried.
    token = next(t for t in first.tolist() if all(t not in ids for ids, _ in others))
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("nan")
    for order in ("batches", "layers"):
        with pytest.raises(ValueError, match="loss must be finite, got nan for example 0"):
            score(model, order=order)
        after = dict(model.named_parameters())
        assert all(after[name] is parameter for name, parameter in before.items())
        assert all(p.requires_grad and p.grad is None for p in after.values())


def test_losses_that_depend_on_the_batch_are_refused():
    def loss(outputs, batch):
        return token_losses(outputs, batch) * len(batch["input_ids"])

    with pytest.raises(RuntimeError, match="loss_fn must give each example a loss of its own"):
        score_odd(Odd(), loss_fn=loss)


def test_a_parameter_that_a_layer_and_what_is_before_it_use_is_refused_by_layers():
    model = llama()
    model.model.embed_tokens.register_forward_hook(
        lambda module, args, output: output * model.model.norm.weight
    )
    with pytest.raises(RuntimeError, match="parts of that of model.norm.weight in several"):
        score(model, NORMS, order="layers")
    assert_exact_with_hook(model, score(model, NORMS))


def assert_exact_with_hook(model, found):
    batch = {"input_ids": examples()[1][0][None], "labels": examples()[1][1][None]}
    alone = fastdean.score(model, [batch], target_modules=NORMS, progress=False)
    weight = model.model.norm.weight
    weight.grad = None
    weight_loss(model, *examples()[1]).backward()
    expected = (weight * weight.grad).abs().detach()
    weight.grad = None
    assert norm_error(alone["model.norm.weight"], expected) < 1e-5
    assert set(found) == set(alone)
