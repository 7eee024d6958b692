"""`score(order="layers")` is `score(order="batches")`, one layer at a time."""

from __future__ import annotations

import os
import weakref
from types import SimpleNamespace

import pytest
import torch
from interrupts import interrupt, moments
from oracle import norm_error, weight_importance
from tiny_adapters import adapted
from tiny_data import batches, make_examples
from tiny_experts import experts_model
from tiny_models import MODELS, bert, gemma2, gpt2, llama, qwen2
from torch import nn

import fastdean
from fastdean.coupling import order
from fastdean.coupling.layers import by_layers, homes, states
from fastdean.coupling.layers.needed_memory import ModelMemory, Rows
from fastdean.coupling.resuming import state_files
from fastdean.coupling.scoring import score_sets
from fastdean.coupling.workloads import loss_scale
from fastdean.models import available_memory
from fastdean.models.layers import replay
from fastdean.models.layers.stacks import decoder_layers

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHARING = {
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 96,
}
# What differs between them is what stands between layers and what layers hand on.
FAMILIES = {
    "gemma2": {},
    "gemma3n_text": SHARING
    | {
        "activation_sparsity_pattern": [0.0] * 6,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "intermediate_size": [48] * 6,
    },
    "gemma4_text": SHARING | {"global_head_dim": 8},
    "qwen3": {},
    "phi3": {},
    "cohere2": {},
    "olmo2": {},
    "smollm3": {},
    "granite": {},
    "stablelm": {},
    "gpt2": {},
    "opt": {},
    "gpt_neox": {},
    "bloom": {},
    "mpt": {},
    "mixtral": {},
    "gpt_oss": {},
    "roberta": {},
    "modernbert": {},
    "deberta-v2": {},
}


def score(model, loader=None, **options):
    options = {"progress": False, "target_modules": "all", **options}
    return fastdean.score(model, loader or batches(make_examples(), 4), **options)


def assert_same(model, loader=None, **options):
    expected = score(model, loader, **options)
    found = score(model, loader, order="layers", **options)
    assert list(found) == list(expected)
    for name in expected:
        assert norm_error(found[name], expected[name]) < 1e-5, name
        if expected.index(name) is not None:
            assert torch.equal(found.index(name), expected.index(name))
    return found


def per_token_losses(outputs, batch):
    logits = outputs.logits.transpose(1, 2)
    return nn.functional.cross_entropy(logits, batch["labels"], reduction="none").mean(1)


def stubs_left(model):
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def hooks_left(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


# Layers like those of others here.
ALIKE = ("phi3", "olmo2", "granite", "stablelm", "mpt")


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in FAMILIES],
)
def test_equals_the_order_by_batches(family):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    masked = family in ("roberta", "modernbert", "deberta-v2")
    kind = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SMALL | FAMILIES[family]))
    assert_same(kind.from_config(config).eval().float(), tokens_per_batch=40)


@pytest.mark.parametrize("name", MODELS)
def test_equals_autograd_one_example_at_a_time(name):
    model, examples = MODELS[name]().double().float(), make_examples()
    found = score(model, batches(examples, 4), order="layers", tokens_per_batch=40)
    shift = 0 if name == "bert" else 1
    expected = weight_importance(model, examples, list(found), shift)
    for parameter in found:
        assert norm_error(found[parameter], expected[parameter]) < 1e-5


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_and_a_decoder(kind):
    import transformers

    torch.manual_seed(0)
    if kind == "t5":
        config = transformers.T5Config(
            vocab_size=96, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2
        )
        model = transformers.T5ForConditionalGeneration(config)
    else:
        sides = {
            f"{side}_{what}": number
            for side in ("encoder", "decoder")
            for what, number in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))
        }
        config = transformers.BartConfig(vocab_size=96, d_model=16, **sides)
        model = transformers.BartForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(0)
    loader = [
        {
            name: torch.randint(3, 96, (3, width), generator=generator)
            for name, width in (("input_ids", 6), ("decoder_input_ids", 5), ("labels", 5))
        }
        for _ in range(2)
    ]
    assert_same(model.eval(), loader, loss_fn=per_token_losses)


def test_hooks_that_steer_a_layer_take_part():
    def steered():
        model = llama()
        first, second = model.model.layers
        first.register_forward_hook(lambda module, args, output: output * 1.1 + 0.2)
        second.register_forward_pre_hook(lambda module, args: (args[0] * 0.9 + 0.1, *args[1:]))
        return model

    found = assert_same(steered())
    assert norm_error(found["model.layers.0.mlp.up_proj.weight"],
                      score(llama())["model.layers.0.mlp.up_proj.weight"]) > 1e-3  # fmt: skip


def test_a_hook_that_watches_a_layer_sees_what_it_returned():
    model, seen = llama(), []
    model.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
    model.model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert_same(model)
    assert seen and not any(bool(tensor.isnan().any()) for tensor in seen)


def test_layers_whose_results_are_changed_in_place():
    model = llama()
    model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0].mul_(1.01),))
    model.model.norm.register_forward_pre_hook(lambda module, args: (args[0].add_(0.1),))
    assert_same(model)


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "unit"},
        {"keep_top": 0.05},
        {"target_modules": r"model\.layers\.1\..*up_proj"},
        {"memory_budget": 1 << 19, "target_modules": "mlp", "keep_top": 0.05},
        {"tokens_per_batch": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_with_options(options):
    assert_same(llama(), **options)


def test_in_bf16():
    assert_same(llama().bfloat16())


def test_behind_the_layers():
    assert_same(bert(), target_modules=r".*(output\.dense|transform\.dense)")


def test_with_activation_checkpointing():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = llama()
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = checkpoint_wrapper(layer)
    assert_same(model)


@pytest.mark.parametrize("tied", [False, True])
def test_offloaded_weights_are_brought_in_once_for_all_batches(tied):
    from accelerate import cpu_offload

    class Counting(dict):
        def __getitem__(self, name):
            reads[name] = reads.get(name, 0) + 1
            return super().__getitem__(name)

    def build():
        model = llama()
        if tied:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model

    options = {"tokens_per_batch": 1}
    expected, model, reads = score(build(), **options), build(), {}
    weights = Counting(build().state_dict())
    cpu_offload(model, execution_device=torch.device("cpu"), state_dict=weights)
    forwards = {name: vars(m).get("forward") for name, m in model.named_modules()}
    score(model, order="auto", **options)  # asks the model its questions, once
    reads.clear()
    found = score(model, order="auto", **options)
    assert found.manifest["order"]["by"] == "layers"
    assert found.manifest["data"]["examples"] > 4
    # The trial, the way forward and the way back, whatever the number of batches.
    assert {reads[name] for name in reads if ".layers." in name} == {3}
    # Others in the trial, and once in the sweep.
    assert {reads[name] for name in reads if ".layers." not in name} == {2}
    for name in expected:
        assert norm_error(found[name], expected[name]) < 1e-6
    assert {name: vars(m).get("forward") for name, m in model.named_modules()} == forwards
    assert all(parameter.is_meta for parameter in model.parameters())


def test_several_data_sets_take_one_sweep():
    model, examples = llama(), make_examples()
    loaders = {"a": list(batches(examples[:3], 2)), "b": list(batches(examples[2:], 4))}
    done = []
    options = {"progress": False, "target_modules": "all", "keep_top": 0.1}
    found = score_sets(
        model, loaders, order="layers", finished=lambda *args: done.append(args), **options
    )
    assert list(found) == list(loaders) and done == list(found.items())
    for name, loader in loaders.items():
        expected = score(model, loader, **options)
        for parameter in expected:
            assert torch.equal(found[name].index(parameter), expected.index(parameter))


def test_states_in_files_and_in_the_hosts_memory(tmp_path):
    expected = score(llama(), order="layers")
    for home in (tmp_path / "states", "host"):
        found = score(llama(), order="layers", states=home)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("states", "error", "message"),
    [
        ("", ValueError, "a folder, got ''"),
        ("disk", ValueError, "a folder, got 'disk'; write ./NAME"),
        (__file__, ValueError, "a folder, got "),
        (True, TypeError, "a folder, got bool"),
    ],
)
def test_no_home_for_states(states, error, message):
    with pytest.raises(error, match=f"states must be 'auto', 'device', 'host' or {message}"):
        score(llama(), order="layers", states=states)


def test_a_home_for_states_is_not_ignored():
    with pytest.raises(ValueError, match="states must be left out with order='batches'"):
        score(llama(), order="batches", states="host")


def test_files_hold_the_states_and_memory_does_not(tmp_path):
    files = state_files.InFiles(tmp_path)
    kept = states.States(files)
    given = []
    for b in range(3):
        hidden = torch.randn(1, 50, 8, dtype=torch.bfloat16)
        given.append(weakref.ref(hidden))
        kept.keep(0, b, replay.Returned((hidden, None), {}))
    kept.add_gradients(0, 1, {("result", 0): torch.ones(1, 50, 8)})
    kept.add_gradients(0, 1, {("result", 0): torch.ones(1, 50, 8)})
    expected = hidden.clone()
    del hidden
    assert not any(tensor() is not None for tensor in given)
    assert kept.gradients(0, 1)["result", 0].eq(2).all()
    assert torch.equal(kept.returned(0, 2).result[0], expected)
    for b in range(3):
        kept.drop(0, b)
    assert not os.listdir(tmp_path)
    files.close()


def test_gradients_of_two_scales_add_up_at_the_lower_one_that_holds_them():
    kept, path = states.States(homes.InMemory("device")), ("result",)
    kept.keep(0, 0, replay.Returned(torch.zeros(2).half(), {}))
    large, one = torch.tensor([60_000.0, 1.0]).half(), torch.ones(2).half()
    kept.add_gradients(0, 0, {path: large}, 3)
    kept.add_gradients(0, 0, {path: large}, 3)
    # No fp16 number is 120,000.
    assert kept.exponent(0, 0) == 2 and torch.equal(kept.gradients(0, 0)[path], large)
    kept.add_gradients(0, 0, {path: one}, 0)
    assert kept.exponent(0, 0) == 0
    assert kept.gradients(0, 0)[path].tolist() == [15_000, 1.25]  # 15,001 is between two numbers


@pytest.mark.parametrize("layout", ["packed", "padded", "alone"])
def test_batches_of_every_layout(layout):
    # BERT's examples cannot be packed.
    model = llama() if layout == "packed" else bert()
    found = assert_same(model, tokens_per_batch=1 if layout == "alone" else 60)
    assert found.manifest["batching"]["packed"] == (layout == "packed")


@pytest.mark.parametrize("targets", ["mlp", "self_attn", "all", "q_proj,down_proj"])
def test_targets_of_every_kind(targets):
    found = assert_same(llama(), target_modules=targets)
    if targets == "all":
        assert len(found) == 2 * 7
    else:
        assert_same(gpt2(), target_modules=targets.replace("q_proj,down_proj", "c_proj"))


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
@pytest.mark.parametrize("targets", ["mlp", "self_attn"])
def test_shared_keys_and_values_of_several_batches(family, targets):
    """The layers that share them get them from a layer further up, by a mapping."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SMALL | FAMILIES[family]))
    model = AutoModelForCausalLM.from_config(config).eval().float()
    assert_same(model, target_modules=targets, tokens_per_batch=10)


@pytest.mark.parametrize("state", ["merged", "off"])
def test_inside_peft(state):
    found = assert_same(adapted(merged=state == "merged", off=state == "off"))
    assert "model.layers.0.mlp.up_proj.weight" in list(found)


def test_beside_adapters_that_are_at_work():
    found = assert_same(adapted(), target_modules=["down_proj", "v_proj"])
    assert len(found) == 4


def test_with_hooks_of_accelerate_that_offload_nothing():
    from accelerate import dispatch_model

    model = llama()
    expected = score(model)
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    forwards = {name: vars(m).get("forward") for name, m in model.named_modules()}
    assert any(forwards.values())
    found = assert_same(model)
    assert all(norm_error(found[name], expected[name]) < 1e-6 for name in expected)
    assert {name: vars(m).get("forward") for name, m in model.named_modules()} == forwards


def test_with_the_checkpointing_of_transformers():
    model = llama()
    expected = score(model)
    # By the name that this release of transformers has for it.
    new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
    getattr(model, new if hasattr(model, new) else old)()
    model.train()
    found = assert_same(model)
    assert model.training
    assert all(norm_error(found[name], expected[name]) < 1e-6 for name in expected)


@pytest.mark.parametrize("kind", ["qwen3", "mixtral"])
def test_other_families_in_bf16(kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL)
    assert_same(AutoModelForCausalLM.from_config(config).eval().bfloat16())


# What cannot be entered layer by layer.


class Random(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return nn.functional.dropout(self.inner(x), 0.1, training=True)


def dropout_that_is_always_on():
    model = llama()
    model.model.layers[1].mlp = Random(model.model.layers[1].mlp)
    return model


def a_shared_layer():
    model = llama()
    first, second = model.model.layers
    model.model.layers = nn.ModuleList([first, second, second])
    model.config.num_hidden_layers = 3
    return model


def a_skipped_layer():
    model = llama()
    model.config.num_hidden_layers = 1
    return model


def loader_with_losses():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (2, 6), generator=generator)
    return [{"input_ids": ids, "labels": ids}]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (dropout_that_is_always_on, "model.layers.1 must compute the same when it is run by its"),
        (a_shared_layer, "each decoder layer called once.* got model.layers.1 called again"),
        (a_skipped_layer, "each decoder layer called once.* got model.layers.1 left out"),
    ],
)
def test_what_cannot_be_run_by_layers_is_refused_by_name(build, message, monkeypatch, caplog):
    options = {"loss_fn": per_token_losses, "target_modules": r"model\.layers\.0\..*up_proj"}
    model = build()
    with pytest.raises(RuntimeError, match=f"{message}.*use order='batches'"):
        score(model, loader_with_losses(), order="layers", **options)
    assert not stubs_left(model) and not hooks_left(model)
    # On its own it takes the other order and says why.
    monkeypatch.setattr(order, "available_memory", lambda device: 1)
    found = score(model, loader_with_losses(), order="auto", keep_top=0.1, **options)
    assert found.manifest["order"]["by"] == "batches" and list(found)
    assert "batch by batch after all" in caplog.text


def test_a_loss_of_what_layers_do_not_return_is_refused_by_name():
    def of_routers(outputs, batch):
        return per_token_losses(outputs, batch) + 0 * outputs.router_logits[1].mean()

    options = {"loss_fn": of_routers, "target_modules": "self_attn"}
    model = experts_model("Mixtral")
    model.config.output_router_logits = True
    message = "what follows the layers on what they return, got IndexError.*use order='batches'"
    with pytest.raises(RuntimeError, match=message):
        score(model, loader_with_losses(), order="layers", **options)
    assert not stubs_left(model)
    assert list(score(model, loader_with_losses(), order="batches", **options))


# Half precision.


def scaled_by(exponent, monkeypatch):
    """Losses are multiplied by this power of two, whatever the trial saw."""
    fitted = loss_scale.LossScale(exponent)
    monkeypatch.setattr(loss_scale.LossScale, "fitted", lambda *_: fitted)


def assert_same_in_fp16(build, loader=None, **options):
    """The same entries, and the bits of the other order where a CPU adds in its order."""
    expected = score(build().half(), loader, **options)
    found = score(build().half(), loader, order="layers", **options)
    assert list(found) == list(expected)
    assert found.manifest["loss_scale"] == expected.manifest["loss_scale"] > 0
    for name in expected:
        assert norm_error(found[name], expected[name]) < 1e-3, name
        if expected.index(name) is not None:
            assert torch.equal(found.index(name), expected.index(name)), name
    return found


def mixtral():
    return experts_model("Mixtral")


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (llama, {}),
        (gpt2, {"keep_top": 0.05}),
        (gemma2, {"signs": True}),
        (bert, {}),
        (mixtral, {"keep_top": 0.05}),
        (llama, {"granularity": "unit", "target_modules": "mlp"}),
    ],
)
def test_a_model_in_fp16(build, options):
    found = assert_same_in_fp16(build, tokens_per_batch=20, **options)
    if options == {}:
        shift = 0 if build is bert else 1
        expected = weight_importance(build().half(), make_examples(), list(found), shift)
        assert max(norm_error(found[name], expected[name]) for name in found) < 4e-3


def test_auto_takes_the_layers_in_fp16_too(monkeypatch):
    monkeypatch.setattr(order, "available_memory", lambda device: 1)
    found = score(llama().half(), order="auto", keep_top=0.1)
    assert found.manifest["order"]["by"] == "layers"


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (llama, {}),
        (llama, {"signs": True}),
        (llama, {"granularity": "unit", "target_modules": "mlp"}),
        (mixtral, {}),
    ],
    ids=["", "signs", "units", "experts"],
)
@pytest.mark.parametrize("exponent", [14, 20, 24])
def test_a_batch_that_overflows_in_a_window_is_done_again(exponent, build, options, monkeypatch):
    options = {"tokens_per_batch": 20, **options}
    expected = score(build().half(), **options)
    scaled_by(exponent, monkeypatch)
    found = score(build().half(), order="layers", **options)
    for name in expected:
        assert norm_error(found[name], expected[name]) < 1e-3, name
        if options.get("signs"):
            assert torch.equal(found.signs(name), expected.signs(name)), name


def test_what_overflows_in_a_lower_layer_alone(monkeypatch):
    """The layers above it keep their scale, whose small gradients the lower one would lose."""
    ran = []
    through = by_layers.Sweep._backward_of_batch

    def counted(self, replay, k, b, *rest):
        ran.append((k, rest[-1]))
        return through(self, replay, k, b, *rest)

    def build():
        model = llama()
        # What its second norm is given is small, so that the gradient behind it is large.
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(2.0**-8)
            model.model.layers[0].self_attn.o_proj.weight.mul_(2.0**-8)
            model.model.layers[0].mlp.down_proj.weight.mul_(2.0**4)
        return model

    scaled_by(8, monkeypatch)
    monkeypatch.setattr(by_layers.Sweep, "_backward_of_batch", counted)
    found = score(build().half(), order="layers")
    assert {exponent for k, exponent in ran if k == 1} == {8}
    assert {exponent for k, exponent in ran if k == 0} == {8, 0}
    expected = weight_importance(build().half(), make_examples(), list(found))
    for name in found:
        assert norm_error(found[name], expected[name]) < 4e-3, name


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_gradients_that_reach_a_layer_from_several_above_are_at_one_scale(family, monkeypatch):
    from transformers import AutoConfig, AutoModelForCausalLM

    def build():
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **(SMALL | FAMILIES[family]))
        return AutoModelForCausalLM.from_config(config).eval()

    scaled_by(20, monkeypatch)
    assert_same_in_fp16(build, tokens_per_batch=40)


def test_gradients_that_are_never_finite_are_refused_by_layers():
    model = llama().half()

    def broken(module, args, output):
        if output.requires_grad:
            output.register_hook(lambda g: g * float("inf"))

    model.model.layers[1].mlp.up_proj.register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="finite in float16, got others in the batch of example"):
        score(model, order="layers", target_modules="mlp")


def test_targets_before_the_layers_are_refused_by_name():
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=96,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = OPTForCausalLM(config).eval()
    assert_same(model, target_modules=".*(fc1|project_out)")
    message = "in a decoder layer or behind all of them: .*project_in.*use order='batches'"
    with pytest.raises(RuntimeError, match=message):
        score(model, order="layers", target_modules=".*(fc1|project_in)")


def test_other_orders_are_refused():
    with pytest.raises(ValueError, match="order must be one of auto, batches, layers, got 'rows'"):
        score(llama(), order="rows")


# Which order "auto" takes.


# Of the MLPs of the tiny model: two layers of three matrices of 64 x 32.
DENSE = 2 * 3 * 64 * 32 * 4


def scored_by(free, monkeypatch, **options):
    monkeypatch.setattr(order, "available_memory", lambda device: free)
    found = score(llama(), target_modules="mlp", **{"order": "auto", **options})
    return found.manifest["order"]["by"]


@pytest.mark.parametrize(
    ("free", "options", "by"),
    [
        (1 << 40, {"keep_top": 0.1}, "batches"),
        (1 << 40, {}, "batches"),
        (1 << 10, {"keep_top": 0.1}, "layers"),
        # The sums, and not a batch beside them.
        (DENSE, {}, "layers"),
        (DENSE, {"memory_budget": DENSE - 1}, "batches"),
        (None, {}, "batches"),
    ],
)
def test_auto_goes_by_the_memory_there_is(free, options, by, monkeypatch):
    assert scored_by(free, monkeypatch, **options) == by


@pytest.mark.parametrize("by", ["layers", "auto"])
def test_dense_sums_that_do_not_fit_are_refused_before_anything_runs(by, monkeypatch):
    message = (
        f"keep_top must be given with order='{by}' where .*, got None with {DENSE:,} bytes of sums "
        f"and room for {DENSE - 1:,}; pass keep_top=1e-3"
    )
    monkeypatch.setattr(order, "available_memory", lambda device: DENSE - 1)
    model = llama()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=message):
        score(model, target_modules="mlp", order=by)


def test_dense_sums_are_those_of_all_data_sets(monkeypatch):
    monkeypatch.setattr(order, "available_memory", lambda device: 2 * DENSE - 1)
    assert scored_by(2 * DENSE - 1, monkeypatch, order="layers") == "layers"
    loaders = {name: list(batches(make_examples(), 4)) for name in ("a", "b")}
    with pytest.raises(ValueError, match=f"got None with {2 * DENSE:,} bytes of sums"):
        score_sets(llama(), loaders, order="layers", progress=False)


def test_a_budget_bounds_dense_sums_by_layers(monkeypatch):
    assert scored_by(1 << 40, monkeypatch, order="layers", memory_budget=1 << 30) == "layers"
    with pytest.raises(ValueError, match=f"keep_top must be given .* and room for {DENSE - 1:,};"):
        scored_by(1 << 40, monkeypatch, order="layers", memory_budget=DENSE - 1)
    # It never did batch by batch, where it is for the sums at a time.
    assert scored_by(1 << 40, monkeypatch, order="batches", memory_budget=DENSE - 1) == "batches"


def test_the_head_counts_whether_it_is_the_embedding_or_not():
    """Its logits are kept either way; a table that is only looked up in keeps nothing."""
    tied, own = qwen2(), qwen2()
    own.lm_head.weight = torch.nn.Parameter(own.lm_head.weight.detach().clone())
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    rows = Rows(batch=4, targets=3, all=4, longest=4)

    def batch(model):
        return ModelMemory.of(model, decoder_layers(model).values()).batch(rows)

    # Logits of a row, and the gradient in them, are more than the layers' gradients.
    logits = 2 * 3 * len(own.lm_head.weight) * 4
    deepest = ModelMemory.of(own, decoder_layers(own).values()).layers[0].kept * 4
    assert batch(tied) == batch(own)
    assert batch(tied.model) == batch(own) - max(0, logits - deepest)


def test_available_memory_is_the_least_of_what_is_left(tmp_path, monkeypatch):
    group = tmp_path / "jobs" / "mine"
    group.mkdir(parents=True)
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable: 4000 kB\n")
    (tmp_path / "cgroup").write_text("0::/jobs/mine\n")
    monkeypatch.setattr(available_memory, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(available_memory, "_OF_GROUP", tmp_path / "cgroup")
    monkeypatch.setattr(available_memory, "_GROUPS", tmp_path)
    monkeypatch.setattr(available_memory, "_left_of_limits", lambda: iter(()))
    cpu = torch.device("cpu")
    assert available_memory.available_memory(cpu) == 4000 * 1024
    (group / "memory.max").write_text("max\n")
    # The group above has the limit.
    (group.parent / "memory.max").write_text("3000000\n")
    (group.parent / "memory.current").write_text("2500000\n")
    (group.parent / "memory.stat").write_text("anon 1\ninactive_file 100000\n")
    assert available_memory.available_memory(cpu) == 600_000
    monkeypatch.setattr(available_memory, "_left_of_limits", lambda: iter((1234,)))
    assert available_memory.available_memory(cpu) == 1234


# The model comes back, whatever happens.


def test_an_interrupt_at_any_line_leaves_the_model_as_it_was(tmp_path):
    loader = list(batches(make_examples(lengths=(4,)), 1))

    def call():
        score(model, loader, order="layers", states=tmp_path, target_modules=".*up_proj")

    modules = (by_layers, homes, replay, state_files, states)
    files = {module.__file__ for module in modules}
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [(p.requires_grad, p.grad) for p in model.parameters()]
    found = moments(call, files)
    assert len(found) > 100
    for moment in found[::7]:
        interrupt(call, files, moment)
        assert not stubs_left(model) and not hooks_left(model)
        assert [(p.requires_grad, p.grad) for p in model.parameters()] == modes
        assert not os.listdir(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# What layers hand on beside what they take and return.


class Note:
    """What is no mapping, and is handed from layer to layer."""

    last = None


class Handing(nn.Module):
    """A layer that adds what the layer above left to it, and leaves its own.

    Args:
        kind: where it leaves it.
    """

    def __init__(self, kind):
        super().__init__()
        self.up = nn.Linear(16, 16)
        self.kind = kind

    def forward(self, x, left):
        before = self._before(left)
        result = x + torch.tanh(self.up(x)) + (0 if before is None else before)
        self._leave(left, 0.5 * result)
        return result

    def _before(self, left):
        if self.kind == "attribute":
            return left.last
        if self.kind == "list":
            return left[-1] if left else None
        if self.kind == "tensor":
            return left.clone()
        if self.kind == "mapping":
            return left.get("last")
        return getattr(left.module, "last", None)

    def _leave(self, left, value):
        if self.kind == "attribute":
            left.last = value
        elif self.kind == "list":
            left.append(value)
        elif self.kind == "tensor":
            left.copy_(value.detach())
        elif self.kind == "mapping":
            left["last"] = value
        else:
            left.module.last = value


class Handed(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.embed = nn.Embedding(96, 16)
        self.layers = nn.ModuleList(Handing(kind) for _ in range(3))
        self.head = nn.Linear(16, 96)
        self.state = nn.Identity()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids):
        x = self.embed(input_ids)
        self.state.last = None
        note = Note()
        note.module = self.state
        left = {"list": [], "tensor": torch.zeros_like(x), "mapping": {}}.get(self.kind, note)
        for layer in self.layers:
            x = layer(x, left)
        return SimpleNamespace(logits=self.head(x))


@pytest.mark.parametrize("kind", ["attribute", "list", "tensor", "module"])
def test_what_is_handed_on_unseen_is_refused_by_name(kind):
    options = {"loss_fn": per_token_losses, "target_modules": r"layers\..*up", "keep_top": 0.5}
    message = r"layers\.1 must compute the same when it is run by itself.*; use order='batches'"
    with pytest.raises(RuntimeError, match=message):
        score(Handed(kind), loader_with_losses(), order="layers", **options)


def test_what_is_handed_on_in_a_mapping_is_exact():
    options = {"loss_fn": per_token_losses, "target_modules": r"layers\..*up"}
    assert_same(Handed("mapping"), loader_with_losses(), **options)
