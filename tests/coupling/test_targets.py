"""Which modules are scored, what they cover, and what is said about the rest."""

from __future__ import annotations

import logging

import pytest
import torch
from oracle import norm_error, unit_importance, weight_importance
from tiny_data import batches, make_examples
from tiny_models import HIDDEN, INTERMEDIATE, LAYERS, MODELS, VOCAB, gpt2, llama
from torch import nn

import fastdean
from fastdean.coupling.targets.coverage import coverage
from fastdean.coupling.targets.finding import find_targets
from fastdean.models.layers.stacks import decoder_layers
from fastdean.models.model_state import config_entry

# Per layer: the MLP's and the attention's matrices, by hand, and the MLP's down projection.
GATED = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
SPLIT = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LAYOUT = {
    name: ("model.layers", GATED, SPLIT, "mlp.down_proj")
    for name in ("llama", "qwen2", "gemma2", "cohere", "granite")
} | {
    "gpt2": (
        "transformer.h",
        ["mlp.c_fc", "mlp.c_proj"],
        ["attn.c_attn", "attn.c_proj"],
        "mlp.c_proj",
    ),
    "bert": (
        "bert.encoder.layer",
        ["intermediate.dense", "output.dense"],
        [
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
        ],
        "output.dense",
    ),
}


def names(model, *args, **options):
    return [target.name for target in find_targets(model, *args, **options)]


def in_every_layer(name, modules):
    prefix = LAYOUT[name][0]
    return {f"{prefix}.{i}.{module}" for i in range(LAYERS) for module in modules}


@pytest.mark.parametrize("name", MODELS)
def test_groups_of_every_family(name):
    model = MODELS[name]()
    _, mlp, attention, down = LAYOUT[name]
    assert list(decoder_layers(model)) == [f"{LAYOUT[name][0]}.{i}" for i in range(LAYERS)]
    assert set(names(model)) == set(names(model, "mlp")) == in_every_layer(name, mlp)
    assert set(names(model, "self_attn")) == in_every_layer(name, attention)
    assert set(names(model, "all")) == in_every_layer(name, [*mlp, *attention])
    assert set(names(model, granularity="unit")) == in_every_layer(name, [down])
    # A choice that holds more than the down projections comes to the same.
    assert names(model, "all", "unit") == names(model, "mlp", "unit")


@pytest.mark.parametrize("name", MODELS)
def test_targets_know_their_place(name):
    model = MODELS[name]()
    layers = list(decoder_layers(model))
    for target in find_targets(model, "all"):
        weight = model.get_parameter(target.parameter)
        assert weight is target.module.weight
        assert target.name.startswith(f"{layers[target.layer_index]}.")
        sizes = (target.num_outputs, target.num_inputs)
        assert sizes == (tuple(weight.shape)[::-1] if name == "gpt2" else tuple(weight.shape))
        assert weight.shape[target.unit_axis] == target.num_inputs


def test_regular_expressions_match_the_whole_name():
    model = llama()
    assert names(model, r"model\.layers\.1\.mlp\.(up|gate)_proj") == [
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
    ]
    assert len(names(model, r".*\.[qk]_proj")) == 2 * LAYERS
    with pytest.raises(ValueError, match="must match at least one Linear layer"):
        find_targets(model, "up_pro.")


@pytest.mark.parametrize(
    ("text", "modules"),
    [
        ("q_proj", ["self_attn.q_proj"]),
        ("q_proj,v_proj", ["self_attn.q_proj", "self_attn.v_proj"]),
        (" mlp.up_proj, q_proj ", ["mlp.up_proj", "self_attn.q_proj"]),
        ("mlp,o_proj", [*GATED, "self_attn.o_proj"]),
        (".*q_proj", ["self_attn.q_proj"]),
    ],
)
def test_a_text_may_list_suffixes_and_groups(text, modules):
    assert set(names(llama(), text)) == in_every_layer("llama", modules)


def test_a_part_of_a_list_that_nothing_is_called_is_refused():
    with pytest.raises(ValueError, match="with each of its parts, got 'vproj' in 'q_proj,vproj'"):
        names(llama(), "q_proj,vproj")
    with pytest.raises(ValueError, match="target_modules must match at least one Linear layer"):
        names(llama(), "q_pro")


def test_suffixes_match_whole_parts_of_a_name():
    model = llama()
    assert len(names(model, ["up_proj", "self_attn.q_proj"])) == 2 * LAYERS
    assert names(model, ["layers.0.mlp.up_proj"]) == ["model.layers.0.mlp.up_proj"]
    with pytest.raises(ValueError, match="must match at least one Linear layer"):
        find_targets(model, ["proj"])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pattern", [".*", ".*head.*|.*decoder.*|.*embed.*|.*wte.*|.*wpe.*"])
def test_head_and_embeddings_never_count(name, pattern):
    model = MODELS[name]()
    never = {id(model.get_output_embeddings()), id(model.get_input_embeddings())}
    try:
        found = find_targets(model, pattern)
    except ValueError:
        assert pattern != ".*"
        return
    assert never.isdisjoint(id(target.module) for target in found)


def test_a_target_outside_the_layers_is_scored_too():
    # BERT's prediction transform lies after the encoder.
    model, examples = MODELS["bert"](), make_examples()
    wanted = "cls.predictions.transform.dense"
    scores = fastdean.score(model, batches(examples, 3), target_modules=[wanted], progress=False)
    expected = weight_importance(model, examples, list(scores), shift=0)
    assert list(scores) == [f"{wanted}.weight"]
    assert norm_error(scores[f"{wanted}.weight"], expected[f"{wanted}.weight"]) < 1e-5


def test_conv1d_scores_lie_as_the_weight_is_stored():
    model = gpt2()
    scores = fastdean.score(model, batches(make_examples(), 3), progress=False)
    name = "transformer.h.0.mlp.c_fc.weight"
    assert tuple(scores[name].shape) == (HIDDEN, INTERMEDIATE)
    units = fastdean.score(model, batches(make_examples(), 3), granularity="unit", progress=False)
    entry = units.entries["transformer.h.0.mlp.c_proj.weight"]
    assert (entry.unit_axis, entry.shape) == (0, (INTERMEDIATE, HIDDEN))


def test_coverage_equals_a_count_by_hand():
    model = llama()
    found = coverage(model, find_targets(model))
    scored = LAYERS * 3 * HIDDEN * INTERMEDIATE
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert found == {
        "targets": 3 * LAYERS,
        "matched": 3 * LAYERS,
        "scored": 3 * LAYERS,
        "scored_parameters": scored,
        "model_parameters": whole,
        "share": scored / whole,
        "share_of_matched": 1.0,
        "groups": {
            "self_attn": {
                "modules": 4 * LAYERS,
                "parameters": LAYERS * 3 * HIDDEN * HIDDEN,
                "scored": 0,
                "scored_parameters": 0,
                "unscorable": 0,
            },
            "mlp": {
                "modules": 3 * LAYERS,
                "parameters": scored,
                "scored": 3 * LAYERS,
                "scored_parameters": scored,
                "unscorable": 0,
            },
        },
        "kinds": {
            "linear": {
                "parameters": scored + LAYERS * 3 * HIDDEN * HIDDEN,
                "scored_parameters": scored,
            },
            "experts": {"parameters": 0, "scored_parameters": 0},
        },
        "others": {
            name: {"parameters": size, "scored_parameters": 0, "share": size / whole}
            for name, size in {
                "model.embed_tokens.weight": VOCAB * HIDDEN,
                "model.layers.*.input_layernorm.weight": LAYERS * HIDDEN,
                "model.layers.*.post_attention_layernorm.weight": LAYERS * HIDDEN,
                "model.norm.weight": HIDDEN,
                "lm_head.weight": VOCAB * HIDDEN,
            }.items()
        },
        "unscorable": {},
    }


def test_coverage_tells_the_scored_targets_from_the_matched_ones():
    model = llama()
    targets = find_targets(model, "all")
    found = coverage(model, targets, {t.parameter for t in targets if t.group == "mlp"})
    mlp = LAYERS * 3 * HIDDEN * INTERMEDIATE
    attention = LAYERS * 3 * HIDDEN * HIDDEN  # queries and output whole, keys and values halved
    assert (found["matched"], found["scored"], found["targets"]) == (7 * LAYERS, *[3 * LAYERS] * 2)
    assert found["scored_parameters"] == mlp
    assert found["share_of_matched"] == mlp / (mlp + attention)
    assert found["share"] == mlp / found["model_parameters"]


@pytest.mark.parametrize("name", MODELS)
def test_dense_models_have_nothing_that_hooks_cannot_see(name):
    model = MODELS[name]()
    assert coverage(model, find_targets(model, "all"))["unscorable"] == {}


# Mixtures of experts: the experts are fused 3-D parameters; which families, test_experts.py says.

MOE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(**MOE, intermediate_size=48, num_local_experts=4)
    ).eval()


def qwen2_moe():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        **MOE,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=40,
        num_experts=4,
        num_experts_per_tok=2,
    )
    model = Qwen2MoeForCausalLM(config).eval()
    # The grouped product of the default implementation has no float64 form, which the oracle needs.
    model.set_experts_implementation("eager")
    return model


def jetmoe():
    """Experts whose modules know of no token which row is its own."""
    from transformers import JetMoeConfig, JetMoeForCausalLM

    torch.manual_seed(0)
    config = JetMoeConfig(
        **{k: v for k, v in MOE.items() if k != "num_attention_heads"},
        intermediate_size=48,
        kv_channels=8,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    return JetMoeForCausalLM(config).eval()


def test_experts_have_no_units_and_a_model_of_nothing_else_is_refused_with_the_reason():
    with pytest.raises(ValueError) as caught:
        find_targets(mixtral(), "mlp", "unit")
    text = str(caught.value)
    assert text.startswith("target_modules must match at least one down projection of an MLP")
    assert "model.layers.*.mlp.experts.down_proj" in text
    assert "fused experts have scores of weights alone" in text


def dbrx():
    """Experts that are rows of one matrix."""
    from transformers import DbrxConfig, DbrxForCausalLM

    torch.manual_seed(0)
    config = DbrxConfig(
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        vocab_size=MOE["vocab_size"],
        attn_config={"rope_theta": 10000.0, "clip_qkv": 8.0, "kv_n_heads": 2},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    )
    return DbrxForCausalLM(config).eval()


@pytest.mark.parametrize("order", ["batches", "layers"])
@pytest.mark.parametrize(
    "model, leaves",
    [
        (jetmoe, ["input_linear.weight", "output_linear.weight"]),
        (dbrx, ["experts.mlp.w1", "experts.mlp.v1", "experts.mlp.w2"]),
    ],
)
def test_experts_in_a_form_of_their_own_are_scored_from_their_gradients(
    model, leaves, order, caplog
):
    model, examples = model(), make_examples()
    with caplog.at_level(logging.WARNING, logger="fastdean"):
        scores = fastdean.score(model, batches(examples, 3), order=order, progress=False)
    owners = {name.partition(".mlp.")[0].partition(".ffn.")[0] for name in scores}
    assert len(owners) == 2 and len(scores) == 2 * len(leaves)
    assert all(name.endswith(tuple(leaves)) for name in scores)
    assert sorted(scores.manifest["one_backward_pass_per_example"]) == sorted(scores)
    assert f"of 'mlp' no hook sees a product: {len(scores)} parameters" in caplog.text
    expected = weight_importance(model, examples, list(scores))
    for name in scores:
        assert norm_error(scores[name], expected[name]) < 1e-5


class Doubling(nn.Linear):
    """A Linear that computes something else, and whose weight is a parameter like others."""

    def __init__(self, of):
        super().__init__(of.in_features, of.out_features, bias=False)
        self.weight = of.weight

    def forward(self, x):
        return super().forward(x), None


def test_a_model_of_nothing_else_is_scored_from_its_gradients_as_all():
    model = llama()
    for layer in model.model.layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, leaf = name.rpartition(".")
                setattr(layer.get_submodule(parent), leaf, Doubling(module))
    found = find_targets(model, "all")
    names = {f"model.layers.{i}.{name}.weight" for i in range(LAYERS) for name in (*GATED, *SPLIT)}
    assert {target.parameter for target in found} == names
    assert all(target.by_example for target in found)


def unseen(model, *names):
    """Every layer's Linear of these names in a form that no hook sees."""
    for layer in model.model.layers:
        for name in names:
            parent, _, leaf = name.rpartition(".")
            setattr(layer.get_submodule(parent), leaf, Doubling(layer.get_submodule(name)))
    return model


def in_layers(*names):
    return {f"model.layers.{i}.{name}.weight" for i in range(2) for name in names}


ROUTED = ("mlp.input_linear", "mlp.output_linear")
QUERIES = ("self_attention.experts.input_linear", "self_attention.experts.output_linear")
# What chooses the experts of attention lies in it.
KEYS, CHOOSER = "self_attention.kv_proj", "self_attention.experts.router.layer"


def test_experts_in_a_form_of_their_own_have_no_units():
    with pytest.raises(ValueError, match="4 parameters that have no units, such as model.layers.0"):
        find_targets(jetmoe(), "mlp", "unit")


@pytest.mark.parametrize("target_modules", ["all", "mlp,self_attn", "all,mlp"])
def test_all_takes_of_each_group_what_hooks_see_or_else_its_matrices(target_modules):
    found = find_targets(jetmoe(), target_modules)
    assert {t.parameter for t in found if not t.by_example} == in_layers(KEYS, CHOOSER)
    assert {t.parameter for t in found if t.by_example} == in_layers(*ROUTED)
    found = find_targets(unseen(jetmoe(), KEYS), target_modules)
    assert {t.parameter for t in found if not t.by_example} == in_layers(CHOOSER)
    assert {t.parameter for t in found if t.by_example} == in_layers(*ROUTED)
    found = find_targets(unseen(jetmoe(), KEYS, CHOOSER), target_modules)
    assert {t.parameter for t in found} == in_layers(KEYS, CHOOSER, *QUERIES, *ROUTED)
    assert all(target.by_example for target in found)
    found = find_targets(unseen(llama(), *SPLIT), target_modules)
    assert {t.parameter for t in found if not t.by_example} == in_layers(*GATED)
    assert {t.parameter for t in found if t.by_example} == in_layers(*SPLIT)


@pytest.mark.parametrize("target_modules", ["all", "mlp,self_attn"])
def test_units_of_a_model_whose_attention_no_hook_sees(target_modules):
    found = find_targets(unseen(llama(), *SPLIT), target_modules, "unit")
    assert {target.parameter for target in found} == in_layers("mlp.down_proj")
    with pytest.raises(ValueError, match="2 parameters that have no units, such as model.layers.0"):
        find_targets(llama(), f"{target_modules},input_layernorm.weight", "unit")


@pytest.mark.parametrize("order", ["batches", "layers"])
def test_all_of_a_model_with_one_group_that_no_hook_sees_is_that_of_autograd(order, caplog):
    model, examples = jetmoe(), make_examples()
    with caplog.at_level(logging.WARNING, logger="fastdean"):
        scores = fastdean.score(
            model, batches(examples, 3), target_modules="all", order=order, progress=False
        )
    assert set(scores) == in_layers(KEYS, CHOOSER, *ROUTED)
    assert set(scores.manifest["one_backward_pass_per_example"]) == in_layers(*ROUTED)
    assert "of 'mlp' no hook sees a product: 4 parameters, such as model.layers.0." in caplog.text
    # Of both groups most is scored, and of the model more is not than nothing is said of.
    assert "parameters of self_attn and mlp are not scored" not in caplog.text
    assert "of the model's parameters lie in its layers outside any Linear module" in caplog.text
    expected = weight_importance(model, examples, list(scores))
    for name in scores:
        assert norm_error(scores[name], expected[name]) < 1e-5


def test_a_warning_says_that_most_of_what_was_asked_for_is_not_scored(caplog):
    model = jetmoe()
    with caplog.at_level(logging.WARNING, logger="fastdean"):
        scores = fastdean.score(
            model, batches(make_examples(), 3), target_modules="self_attn", progress=False
        )
    groups = scores.manifest["coverage"]["groups"]
    asked = [groups["self_attn"]]
    total = sum(each["parameters"] + each["unscorable"] for each in asked)
    missed = total - scores.manifest["coverage"]["scored_parameters"]
    text = [r.getMessage() for r in caplog.records if r.name == "fastdean"][-1]
    assert text.startswith(f"{100 * missed / total:.0f} % of the parameters of ")
    assert f" are not scored, {missed} of {total} (such as model.layers.0." in text


def test_dense_models_warn_about_nothing(caplog):
    with caplog.at_level(logging.WARNING, logger="fastdean"):
        fastdean.score(llama(), batches(make_examples(), 3), progress=False)
    assert not caplog.records


def test_shared_experts_have_units_where_the_routed_ones_have_none():
    model, examples = qwen2_moe(), make_examples()
    scores = fastdean.score(model, batches(examples, 3), progress=False)
    shared = [f"shared_expert.{kind}_proj.weight" for kind in ("gate", "up", "down")]
    routed = [f"experts.{kind}_proj" for kind in ("gate_up", "down")]
    assert set(scores) == {
        f"model.layers.{i}.mlp.{name}" for i in range(2) for name in (*shared, *routed)
    }
    assert names(model, "router") == [f"model.layers.{i}.mlp.shared_expert_gate" for i in (0, 1)]
    covered = scores.manifest["coverage"]
    experts = 2 * 4 * 3 * 48 * 32
    assert covered["groups"]["mlp"] == {
        "modules": 2 * 5,
        "parameters": experts + 2 * 3 * 40 * 32,
        "scored": 2 * 5,
        "scored_parameters": experts + 2 * 3 * 40 * 32,
        "unscorable": 0,
    }
    assert covered["kinds"]["experts"] == {"parameters": experts, "scored_parameters": experts}
    assert covered["groups"]["router"] == {
        "modules": 2,
        "parameters": 2 * 32,
        "scored": 0,
        "scored_parameters": 0,
        "unscorable": 2 * 4 * 32,
    }
    expected = weight_importance(model, examples, list(scores))
    for name in scores:
        assert norm_error(scores[name], expected[name]) < 1e-5
    assert names(model, granularity="unit") == [
        f"model.layers.{i}.mlp.shared_expert.down_proj" for i in range(2)
    ]


# Down projections by their shapes.


def phi3(intermediate):
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    config = Phi3Config(**MOE, intermediate_size=intermediate, pad_token_id=0)
    return Phi3ForCausalLM(config).eval()


# Half the hidden size makes the fused gate_up square, the hidden size itself the down projection.
@pytest.mark.parametrize("intermediate", [HIDDEN // 2, HIDDEN, INTERMEDIATE])
def test_the_down_projection_beside_a_fused_gate_and_up(intermediate):
    model, examples = phi3(intermediate), make_examples()
    down = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert names(model, granularity="unit") == down
    scores = fastdean.score(model, batches(examples, 3), granularity="unit", progress=False)
    expected = unit_importance(model, examples, down)
    for name in down:
        assert norm_error(scores[f"{name}.weight"], expected[name]) < 1e-5


def test_the_down_projection_of_an_mlp_as_wide_as_the_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**MOE, intermediate_size=32))
    assert names(model, granularity="unit") == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]


def test_units_of_attention_do_not_exist():
    with pytest.raises(ValueError, match="at least one down projection of an MLP .* 'self_attn'"):
        find_targets(llama(), "self_attn", "unit")


# Refusals.


@pytest.mark.parametrize(
    "target_modules, text",
    [
        ("nothing", "got 'nothing'; the layers are model.layers.*.mlp.down_proj, model.layers.*."),
        (["lm_head"], "got ['lm_head']; the layers are"),
        ("(", "list of suffixes or a valid regular expression, got '(' (missing ), unterminated"),
    ],
)
def test_errors_list_what_could_have_been_meant(target_modules, text):
    with pytest.raises(ValueError) as caught:
        find_targets(llama(), target_modules)
    assert text in str(caught.value)


def test_models_without_linear_layers_say_so():
    with pytest.raises(ValueError, match="got 'mlp'; the layers are none"):
        find_targets(nn.Embedding(3, 4))


def with_a_shared_module():
    model = llama().train()
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    return model


def with_an_unused_module():
    model = llama()
    model.model.layers[1].mlp.unused_proj = nn.Linear(HIDDEN, INTERMEDIATE)
    return model


SHARED = (with_a_shared_module, "model.layers.0.mlp.up_proj", 2)
UNUSED = (with_an_unused_module, "model.layers.1.mlp.unused_proj", 0)


@pytest.mark.parametrize(("build", "module", "times"), [SHARED, UNUSED])
def test_what_takes_no_part_or_several_is_left_out_of_its_group(build, module, times, caplog):
    model, examples = build(), make_examples()
    with caplog.at_level(logging.WARNING, logger="fastdean"):
        scores = fastdean.score(model, batches(examples, 3), progress=False)
    text = f"{module} must take part in the loss exactly once per batch, got {times} times;"
    left_out = scores.manifest["coverage"]["left_out"]
    assert list(left_out) == [module] and left_out[module].startswith(text)
    (record,) = [r for r in caplog.records if r.name == "fastdean"]
    assert record.getMessage().startswith(f"1 matched modules are left out of the scores: {text}")
    assert set(scores) == {t.parameter for t in find_targets(model)} - {f"{module}.weight"}
    assert scores.manifest["coverage"]["scored"] == len(scores)
    expected = weight_importance(model, examples, list(scores))
    for name in scores:
        assert norm_error(scores[name], expected[name]) < 1e-5


@pytest.mark.parametrize("wanted", ["in a list", "by a pattern"])
@pytest.mark.parametrize(("build", "module", "times"), [SHARED, UNUSED])
def test_what_is_asked_for_by_name_is_refused_and_the_model_restored(build, module, times, wanted):
    model = build()
    training = model.training
    suffix = module.rpartition(".")[2]
    named = [suffix, "down_proj"] if wanted == "in a list" else rf".*\.{suffix}"
    with pytest.raises(RuntimeError) as caught:
        fastdean.score(model, batches(make_examples(), 3), target_modules=named, progress=False)
    assert str(caught.value).startswith(
        f"{module} must take part in the loss exactly once per batch, got {times} times;"
    )
    assert model.training == training and all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_earlier_word_for_units_still_works_and_says_what_to_write():
    with pytest.warns(FutureWarning, match="'neuron' has been called 'unit' since 0.2 .* write"):
        found = find_targets(llama(), granularity="neuron")
    assert [t.name for t in found] == names(llama(), granularity="unit")
    with pytest.warns(FutureWarning):
        scores = fastdean.score(
            llama(), batches(make_examples(), 3), granularity="neuron", progress=False
        )
    assert scores.granularity == scores.manifest["granularity"] == "unit"


def test_a_tower_that_names_sound_as_its_input_is_no_text_model():
    class Tower(nn.Module):
        input_modalities = "audio"

        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(3))

    model = nn.Module()
    model.encoder = Tower()
    model.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
    assert list(decoder_layers(model)) == ["layers.0", "layers.1"]


def test_entries_that_layers_have_each_of_their_own():
    from transformers import LlamaConfig

    layers = {1: {"intermediate_size": 64}}
    config = LlamaConfig(num_hidden_layers=2, intermediate_size=48, per_layer_config=layers)
    assert config_entry(config, "intermediate_size") == 64
    assert config_entry(config, "hidden_size") == config.hidden_size
    assert config_entry(config, "of_no_configuration") is None
