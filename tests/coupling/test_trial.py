"""What the hooks of `score` capture is the gradient of the weight by example, or is refused."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from oracle import norm_error, unit_importance, weight_importance
from tiny_data import batches, make_examples
from tiny_models import VOCAB, bert, llama, qwen2
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
)
from torch.nn.utils import parametrize, prune

import fastdean
from fastdean.data.examples import Example

UP = "model.layers.1.mlp.up_proj"
QUERY = "model.layers.0.self_attn.q_proj"  # with a bias, and the lowest target


def score(model, **options):
    return fastdean.score(model, batches(make_examples(), 4), progress=False, **options)


def assert_exact(model, scores, shift=1):
    expected = weight_importance(model, make_examples(), list(scores), shift)
    for name, value in scores.items():
        assert norm_error(value, expected[name]) < 1e-5, name


# Hooks of the user's: the model computes with them, the gradient is that of the product.


def in_place(module, args, output):
    output.mul_(1.7)


def on_the_gradient(module, args, output):
    if output.requires_grad:
        output.register_hook(lambda g: 3 * g)


FORWARD = {
    "scaling": lambda module, args, output: 1.7 * output,
    "steering": lambda module, args, output: output + torch.linspace(-1, 1, output.shape[-1]),
    "fake quantisation": lambda module, args, output: output.clamp(-0.05, 0.05),
    "in place": in_place,
    "on the gradient": on_the_gradient,
}


@pytest.mark.parametrize("module", [UP, QUERY])
@pytest.mark.parametrize("name", FORWARD)
def test_forward_hooks(name, module):
    model = qwen2()
    model.get_submodule(module).register_forward_hook(FORWARD[name])
    assert_exact(model, score(model, target_modules="all"))


def doubled(module, gradients, *others):
    return tuple(None if g is None else 2 * g for g in gradients)


BACKWARD = {
    "forward pre-hook": ("register_forward_pre_hook", lambda module, args: (0.5 * args[0],)),
    "full backward hook": ("register_full_backward_hook", doubled),
    "full backward pre-hook": ("register_full_backward_pre_hook", doubled),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_other_hooks(name):
    model = qwen2()
    method, hook = BACKWARD[name]
    getattr(model.get_submodule(UP), method)(hook)
    assert_exact(model, score(model, target_modules="all"))


def of_wide(change):
    """A hook that changes what Linears of 64 outputs give, and nothing else."""

    def hook(module, *values):
        wide = isinstance(module, nn.Linear) and module.out_features == 64
        return change(module, *values) if wide else None

    return hook


EVERYWHERE = {
    "forward": (register_module_forward_hook, FORWARD["scaling"]),
    "forward pre": (register_module_forward_pre_hook, BACKWARD["forward pre-hook"][1]),
    "full backward": (register_module_full_backward_hook, doubled),
}


# Such a hook is called for modules without tensors too, and for those below the lowest target.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.filterwarnings("ignore:For backward hooks to be called:UserWarning")
@pytest.mark.parametrize("name", EVERYWHERE)
def test_hooks_of_all_modules(name):
    register, hook = EVERYWHERE[name]
    model, handle = llama(), register(of_wide(hook))
    try:
        assert_exact(model, score(model, target_modules="all"))
    finally:
        handle.remove()


def test_units_of_a_layer_whose_input_is_changed_on_the_way():
    model, examples = llama(), make_examples()
    modules = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    model.get_submodule(modules[1]).register_forward_pre_hook(lambda module, args: (2 * args[0],))
    scores = score(model, granularity="unit")
    expected = unit_importance(model, examples, modules)
    for name in modules:
        assert norm_error(scores[f"{name}.weight"], expected[name]) < 1e-5


# Weights that are not what they seem.


class Bounded(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, torch.tanh(5 * self.weight), self.bias)


class Rescaled(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


class Rounded(nn.Linear):
    """Straight-through: the gradient passes to the weight as it is."""

    def forward(self, x):
        rounded = self.weight + ((8 * self.weight).round() / 8 - self.weight).detach()
        return nn.functional.linear(x, rounded, self.bias)


class Adapted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + x[..., :1].sin()


class Detached(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight.detach(), self.bias)


def retyped(kind):
    model = llama()
    model.get_submodule(UP).__class__ = kind
    return model


@pytest.mark.parametrize("kind", [Rounded, Adapted])
def test_a_forward_of_ones_own_with_the_right_gradient(kind):
    model = retyped(kind)
    assert_exact(model, score(model))


@pytest.mark.parametrize(
    ("kind", "got"),
    [
        (Bounded, "one that is 0.* off"),
        (Rescaled, "one that is 0.5 off"),
        (Detached, "no gradient"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_forward_of_ones_own_with_another_gradient_is_refused(kind, got, dtype):
    text = rf"{UP} must get the gradient of its weight from .*, got {got} of what autograd gives;"
    with pytest.raises(RuntimeError, match=text):
        score(retyped(kind).to(dtype))


def test_a_weight_that_is_used_beside_its_layer_is_refused():
    model = llama()
    mlp = model.model.layers[1].mlp

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = mlp

        def forward(self, x):
            return self.mlp(x) + nn.functional.linear(x, mlp.up_proj.weight).mean(-1, True)

    model.model.layers[1].mlp = Twice()
    with pytest.raises(RuntimeError, match="mlp.up_proj must get the gradient of its weight from"):
        score(model)


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        # Else the next one may lie where the last one lay, and pass for the same.
        self.made = []

    def forward(self, weight):
        self.made.append(2 * weight)
        return self.made[-1]


COMPUTED = {
    "parametrization": lambda m: parametrize.register_parametrization(m, "weight", Doubled()),
    "spectral norm": torch.nn.utils.spectral_norm,
    "pruning": lambda m: prune.random_unstructured(m, "weight", 0.5),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_weight_that_is_computed_is_refused_with_advice(name):
    model = llama()
    COMPUTED[name](model.get_submodule(UP))
    with pytest.raises(ValueError) as caught:
        score(model)
    assert str(caught.value).startswith(f"{UP}.weight must be a parameter, got a tensor that is ")
    assert "make it permanent" in str(caught.value)


def test_the_trial_leaves_the_weights_own_gradients_and_hooks_alone():
    model, calls = llama(), []
    weight = model.get_parameter(f"{UP}.weight")
    weight.grad = torch.ones_like(weight)
    weight.register_hook(lambda g: calls.append(1))
    weight.register_post_accumulate_grad_hook(lambda p: calls.append(1))
    score(model)
    assert not calls and torch.equal(weight.grad, torch.ones_like(weight))


# Rows that do not come example by example.

WIDTH = 16


class Block(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.up, self.down = how, nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def mlp(self, x):
        return self.down(self.up(x).relu())

    def forward(self, x):
        flat = x.flatten(0, 1)
        if self.how == "batch first":
            return x + self.mlp(x)
        if self.how == "sequence first":
            return x + self.mlp(x.transpose(0, 1)).transpose(0, 1)
        if self.how == "flattened sequence first":
            rows = self.mlp(x.transpose(0, 1).flatten(0, 1))
            return x + rows.view(x.shape[1], x.shape[0], -1).transpose(0, 1)
        if self.how == "windows":
            # Every example's first window comes before any second; texts of one window stay.
            windows = x.unflatten(1, (-1, 3)) if x.shape[1] % 3 == 0 else x.unsqueeze(1)
            return x + self.mlp(windows.transpose(0, 1)).transpose(0, 1).reshape(x.shape)
        # Sorted by what the first feature is.
        order = flat[:, 0].argsort()
        return x + torch.empty_like(flat).index_copy(0, order, self.mlp(flat[order])).view_as(x)


class Mixing(nn.Module):
    """Embedding, blocks and head, with attention so that every token's gradient counts."""

    def __init__(self, layers, first=True):
        super().__init__()
        self.first, self.config = first, SimpleNamespace(hidden_size=WIDTH)
        self.embed, self.layers = nn.Embedding(VOCAB, WIDTH), nn.ModuleList(layers)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        x = x + x.mean(1, keepdim=True)
        x = x if self.first else x.transpose(0, 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x if self.first else x.transpose(0, 1))


def block_model(how):
    torch.manual_seed(0)
    return Mixing([Block(how), Block(how)]).eval()


def encoder_model(first):
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=first) for _ in range(2)]
    return Mixing(layers, first).eval()


def token_losses(outputs, batch):
    targets = batch["input_ids"][:, 1:]
    losses = nn.functional.cross_entropy(outputs[:, :-1].mT, targets, reduction="none")
    return losses.mean(1)


def alone(model, loader, names):
    """name -> importance, by autograd with one example at a time."""
    model = copy.deepcopy(model).double()
    weights = [model.get_parameter(name) for name in names]
    rows = [row.unsqueeze(0) for batch in loader for row in batch["input_ids"]]
    sums = [0] * len(weights)
    for ids in rows:
        (loss,) = token_losses(model(ids), {"input_ids": ids})
        sums = [s + g.abs() for s, g in zip(sums, torch.autograd.grad(loss, weights), strict=True)]
    return {
        n: s * w.detach().abs() / len(rows) for n, s, w in zip(names, sums, weights, strict=True)
    }


def tokens(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(VOCAB, shape, generator=generator)} for shape in shapes]


SHAPES = {
    "wide": [(3, 7), (2, 5)],
    "square": [(4, 4)],
    "high": [(7, 3), (1, 3)],
    "two": [(2, 2)],
    "one token first": [(2, 2), (3, 5)],
}
MODELS = {
    "batch first": lambda: block_model("batch first"),
    "sequence first": lambda: block_model("sequence first"),
    "flattened sequence first": lambda: block_model("flattened sequence first"),
    "sorted": lambda: block_model("sorted"),
    "encoder, batch first": lambda: encoder_model(True),
    "encoder, sequence first": lambda: encoder_model(False),
}
ONE_BY_ONE = {"flattened sequence first", "sorted"}


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("name", MODELS)
def test_rows_in_every_order(name, shapes, caplog):
    model, loader = MODELS[name](), tokens(*SHAPES[shapes])
    options = {"loss_fn": token_losses, "target_modules": "mlp", "progress": False}
    with caplog.at_level(logging.WARNING, logger="fastdean"):
        scores = fastdean.score(model, loader, **options)
    expected = alone(model, loader, list(scores))
    assert len(scores) == 4
    for parameter, value in scores.items():
        assert norm_error(value, expected[parameter]) < 1e-5, parameter
    said = [r for r in caplog.records if r.getMessage().startswith("examples are scored one at a")]
    assert ("one_example_per_batch" in scores.manifest) == bool(said) == (name in ONE_BY_ONE)


def test_windows_that_only_long_texts_are_cut_into(caplog):
    model, loader = block_model("windows"), tokens((4, 3), (2, 6))
    options = {"loss_fn": token_losses, "target_modules": "mlp", "progress": False}
    scores = fastdean.score(model, loader, **options)
    expected = alone(model, loader, list(scores))
    for parameter, value in scores.items():
        assert norm_error(value, expected[parameter]) < 1e-5, parameter


class Leaking(Block):
    """A little of the batch's mean is in each of its examples."""

    def __init__(self):
        super().__init__("batch first")

    def mlp(self, x):
        x = super().mlp(x)
        return x + 1e-3 * x.mean(0, keepdim=True)


def test_examples_that_leak_into_each_other_are_scored_one_at_a_time():
    torch.manual_seed(0)
    model, loader = Mixing([Leaking(), Leaking()]).eval(), tokens((3, 5), (2, 7))
    scores = fastdean.score(model, loader, loss_fn=token_losses, progress=False)
    expected = alone(model, loader, list(scores))
    assert "one_example_per_batch" in scores.manifest
    for parameter, value in scores.items():
        assert norm_error(value, expected[parameter]) < 1e-5, parameter


def test_units_in_another_order():
    model, loader = encoder_model(False), tokens((3, 7), (2, 5))
    options = {"loss_fn": token_losses, "granularity": "unit", "progress": False}
    together = fastdean.score(model, loader, **options)
    rows = [{"input_ids": row.unsqueeze(0)} for batch in loader for row in batch["input_ids"]]
    one_by_one = fastdean.score(model, rows, **options)
    assert len(one_by_one) == 2
    for name in one_by_one:
        assert norm_error(together[name], one_by_one[name]) < 1e-5


def test_losses_that_depend_on_the_other_examples_are_refused():
    def contrasted(outputs, batch):
        losses = token_losses(outputs, batch)
        return losses - losses.mean() / 2

    with pytest.raises(RuntimeError) as caught:
        fastdean.score(block_model("batch first"), tokens((3, 7)), loss_fn=contrasted)
    assert str(caught.value).startswith("loss_fn must give each example a loss of its own, got ")


def test_a_language_model_that_puts_the_sequence_first():
    model, examples = bert(), make_examples()
    expected = weight_importance(model, examples, names_of(model), shift=0)
    for layer in model.bert.encoder.layer:
        transposed(layer.intermediate.dense)
        transposed(layer.output.dense)
    scores = score(model)
    for name in scores:
        assert norm_error(scores[name], expected[name]) < 1e-5


def names_of(model):
    return [target.parameter for target in fastdean.coupling.targets.finding.find_targets(model)]


def transposed(module):
    """The layer is given [T, B, D] and gives back [B, T, D]."""
    module.register_forward_pre_hook(lambda module, args: (args[0].transpose(0, 1).contiguous(),))
    module.register_forward_hook(lambda module, args, output: output.transpose(0, 1))


# Half precision.


def long_llama():
    from tiny_models import _DECODER, _build
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {**_DECODER, "max_position_embeddings": 1024, "num_key_value_heads": 2}
    return _build(LlamaForCausalLM, LlamaConfig(**config, tie_word_embeddings=False), 0)


@pytest.mark.parametrize("head", [1.0, 30.0, 2e-3], ids=["", "steep", "flat"])
@pytest.mark.parametrize("lengths", [(607,), (607, 3, 40, 300)])
def test_long_answers_in_fp16(lengths, head):
    model, examples = long_llama().half(), make_examples(lengths=lengths)
    with torch.no_grad():
        model.lm_head.weight.mul_(head)
    scores = fastdean.score(model, batches(examples, 4), target_modules="all", progress=False)
    expected = weight_importance(model, examples, list(scores))
    for name, value in scores.items():
        assert norm_error(value, expected[name]) < 4e-3, name
    assert scores.manifest["loss_scale"] > 0


def test_the_callers_fp16_autocast():
    model, examples = long_llama(), make_examples(lengths=(607, 9))
    expected = weight_importance(model, examples, names_of(model))
    with torch.autocast("cpu", torch.float16):
        scores = fastdean.score(model, batches(examples, 2), progress=False)
    for name, value in scores.items():
        assert norm_error(value, expected[name]) < 1e-2, name


@pytest.mark.parametrize("granularity", ["weight", "unit"])
@pytest.mark.parametrize("exponent", [14, 20, 24])
def test_a_batch_that_overflows_is_done_again(exponent, granularity, monkeypatch):
    from fastdean.coupling.workloads import loss_scale

    expected = score(llama().half(), granularity=granularity, tokens_per_batch=20)
    too_much = loss_scale.LossScale(exponent)
    monkeypatch.setattr(loss_scale.LossScale, "fitted", lambda *args: too_much)
    scores = score(llama().half(), granularity=granularity, tokens_per_batch=20)
    for name, value in scores.items():
        assert norm_error(value, expected[name]) < 1e-3, name


def test_gradients_that_are_never_finite_are_refused():
    model = llama().half()

    def broken(module, args, output):
        if output.requires_grad:
            output.register_hook(lambda g: g * float("inf"))

    model.get_submodule(UP).register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="gradients must be finite in float16, got others in"):
        score(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_scaled_in_other_dtypes(dtype):
    assert "loss_scale" not in score(llama().to(dtype)).manifest


# What the trial runs on.


def test_a_window_that_short_texts_are_padded_to():
    from transformers import LongformerConfig, LongformerForMaskedLM

    torch.manual_seed(0)
    config = LongformerConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, attention_window=80, max_position_embeddings=128, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model, examples = LongformerForMaskedLM(config).eval(), make_examples(lengths=(80, 80, 80))
    scores = fastdean.score(model, batches(examples, 3), progress=False)
    expected = weight_importance(model, examples, list(scores), shift=0)
    for name, value in scores.items():
        assert norm_error(value, expected[name]) < 1e-5, name


def test_an_excerpt_is_short_and_all_targets():
    from fastdean.coupling.workloads.planning import plan_workload
    from fastdean.models.ranks.distributed import Ranks

    ids = torch.arange(3, 90)
    rows = [{"input_ids": each, "labels": each} for each in (ids[:5], ids.repeat(3)[:120], ids)]
    work = plan_workload(llama(), rows, template="raw", ranks=Ranks(0, 1))
    excerpt = work.excerpt()
    # Both together are longer than the model's positions.
    assert [len(example) for example in work.excerpt(whole=True).examples] == [120]
    assert len(excerpt.batches) == 1 and excerpt.batches[0].num_examples == 2
    assert [len(example) for example in excerpt.examples] == [32, 21]
    assert all(isinstance(each, Example) and each.num_targets(0) for each in excerpt.examples)


@pytest.mark.parametrize("target_modules", ["all", ["query", "lm_head.dense"]])
def test_texts_that_are_shorter_than_a_window(target_modules):
    from transformers import LongformerConfig, LongformerForMaskedLM

    torch.manual_seed(0)
    config = LongformerConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, attention_window=16, max_position_embeddings=128, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model, examples = LongformerForMaskedLM(config).eval(), make_examples(lengths=(5, 9, 20))
    loader, options = batches(examples, 3), {"target_modules": target_modules, "progress": False}
    scores = fastdean.score(model, loader, **options)
    assert any(name.endswith("attention.self.query.weight") for name in scores)
    # Padding that sees nothing is NaN to this model in float64.
    expected = weight_importance(model, examples, list(scores), 0, torch.float32)
    for name, value in scores.items():
        assert norm_error(value, expected[name]) < 1e-5, name


def test_a_default_dtype_of_the_callers_changes_nothing():
    model, examples = llama(), make_examples()
    expected = fastdean.score(model, batches(examples, 2), progress=False)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        found = fastdean.score(model, batches(examples, 2), progress=False)
    finally:
        torch.set_default_dtype(before)
    for name, value in expected.items():
        assert norm_error(found[name], value) < 1e-5, name
