"""What a decoder layer is made of, over the families of transformers, and where the layers are."""

from __future__ import annotations

import re

import pytest
import torch
from oracle import norm_error, weight_importance
from tiny_data import batches, make_examples
from tiny_models import VOCAB, llama
from torch import nn

import fastdean
from fastdean.coupling.targets.coverage import coverage
from fastdean.coupling.targets.finding import find_targets
from fastdean.models.layers.stacks import decoder_layers

GATED = "mlp.gate_proj mlp.up_proj mlp.down_proj"
FF_EXPERTS = " feed_forward.experts.gate_up_proj feed_forward.experts.down_proj"
EXPERTS = " mlp.experts.gate_up_proj mlp.experts.down_proj"
FF_GATED = "feed_forward.gate_proj feed_forward.up_proj feed_forward.down_proj"
NEOX = "mlp.dense_h_to_4h mlp.dense_4h_to_h"
BERT = "intermediate.dense output.dense"
TWO = {"num_hidden_layers": 2}
TEXT = {"text_config": {"model_type": "llama", "num_hidden_layers": 2}}

# Family -> configuration, model, options, stacks, groups besides attention, down projections.
FAMILIES = {
    "phi3": ("Phi3", "ForCausalLM", TWO, "model.layers",
        {"mlp": "mlp.gate_up_proj mlp.down_proj"}, "mlp.down_proj"),
    "gpt-neo": ("GPTNeo", "ForCausalLM",
        {"num_layers": 2, "attention_types": [[["global", "local"], 1]]}, "transformer.h",
        {"mlp": "mlp.c_fc mlp.c_proj"}, "mlp.c_proj"),
    "gpt-neox": ("GPTNeoX", "ForCausalLM", TWO, "gpt_neox.layers",
        {"mlp": NEOX}, "mlp.dense_4h_to_h"),
    "gptj": ("GPTJ", "ForCausalLM", {"n_layer": 2}, "transformer.h",
        {"mlp": "mlp.fc_in mlp.fc_out"}, "mlp.fc_out"),
    "opt": ("OPT", "ForCausalLM", TWO, "model.decoder.layers", {"mlp": "fc1 fc2"}, "fc2"),
    "bloom": ("Bloom", "ForCausalLM", {"n_layer": 2}, "transformer.h",
        {"mlp": NEOX}, "mlp.dense_4h_to_h"),
    "falcon": ("Falcon", "ForCausalLM", TWO, "transformer.h", {"mlp": NEOX}, "mlp.dense_4h_to_h"),
    "mpt": ("Mpt", "ForCausalLM", {"n_layers": 2}, "transformer.blocks",
        {"mlp": "ffn.up_proj ffn.down_proj"}, "ffn.down_proj"),
    "mamba": ("Mamba", "ForCausalLM", TWO, "backbone.layers",
        {"mixer": "mixer.in_proj mixer.x_proj mixer.dt_proj mixer.out_proj"}, ""),
    "jamba": ("Jamba", "ForCausalLM",
        {"num_hidden_layers": 4, "attn_layer_offset": 1, "attn_layer_period": 2,
         "expert_layer_offset": 3, "expert_layer_period": 4}, "model.layers",
        {"mamba": "mamba.in_proj mamba.x_proj mamba.dt_proj mamba.out_proj",
         "mlp": FF_GATED + FF_EXPERTS},
        "feed_forward.down_proj"),
    "bamba": ("Bamba", "ForCausalLM", TWO | {"attn_layer_indices": [1]}, "model.layers",
        {"mamba": "mamba.in_proj mamba.out_proj", "mlp": FF_GATED}, "feed_forward.down_proj"),
    "zamba2": ("Zamba2", "ForCausalLM",
        {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"]},
        "model.layers",
        {"mamba": "mamba.in_proj mamba.out_proj", "linear": "linear",
         "mamba_decoder": "mamba_decoder.mamba.in_proj mamba_decoder.mamba.out_proj",
         "mlp": "shared_transformer.feed_forward.gate_up_proj "
                "shared_transformer.feed_forward.down_proj",
         "gate_up_proj_adapter_list":
             "shared_transformer.feed_forward.gate_up_proj_adapter_list.0.0 "
             "shared_transformer.feed_forward.gate_up_proj_adapter_list.0.1"},
        "shared_transformer.feed_forward.down_proj"),
    "recurrent-gemma": ("RecurrentGemma", "ForCausalLM", {"num_hidden_layers": 3}, "model.layers",
        {"temporal_block":
             "temporal_block.linear_x temporal_block.linear_y temporal_block.linear_out",
         "mlp": "mlp_block.gate_proj mlp_block.up_proj mlp_block.down_proj"},
        "mlp_block.down_proj"),
    "rwkv": ("Rwkv", "ForCausalLM", TWO, "rwkv.blocks",
        {"mlp": "feed_forward.key feed_forward.receptance feed_forward.value"},
        "feed_forward.value"),
    "lfm2": ("Lfm2", "ForCausalLM", TWO | {"layer_types": ["conv", "full_attention"]},
        "model.layers",
        {"conv": "conv.in_proj conv.out_proj",
         "mlp": "feed_forward.w1 feed_forward.w2 feed_forward.w3"}, "feed_forward.w2"),
    "nemotron-h": ("NemotronH", "ForCausalLM",
        {"layers_block_type": ["mamba", "attention", "mlp"]}, "model.layers",
        {"mixer": "mixer.in_proj mixer.out_proj", "mlp": "mixer.up_proj mixer.down_proj"},
        "mixer.down_proj"),
    "xlstm": ("xLSTM", "ForCausalLM", TWO, "backbone.blocks",
        {"mlstm_layer": " ".join(f"mlstm_layer.{name}" for name in (
            "q", "k", "v", "ogate_preact", "igate_preact", "fgate_preact", "out_proj")),
         "mlp": "ffn.proj_up_gate ffn.proj_up ffn.proj_down"}, "ffn.proj_down"),
    "qwen2-moe": ("Qwen2Moe", "ForCausalLM", TWO, "model.layers",
        {"mlp": " ".join(f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down"))
                + EXPERTS,
         "router": "mlp.shared_expert_gate"}, "mlp.shared_expert.down_proj"),
    "deepseek-v3": ("DeepseekV3", "ForCausalLM", {"num_hidden_layers": 4}, "model.layers",
        {"mlp": GATED + " mlp.shared_experts.gate_proj mlp.shared_experts.up_proj "
                "mlp.shared_experts.down_proj" + EXPERTS},
        "mlp.down_proj mlp.shared_experts.down_proj"),
    "deberta": ("DebertaV2", "ForMaskedLM", TWO, "deberta.encoder.layer",
        {"mlp": BERT}, "output.dense"),
    "distilbert": ("DistilBert", "ForMaskedLM", {"n_layers": 2}, "distilbert.transformer.layer",
        {"mlp": "ffn.lin1 ffn.lin2"}, "ffn.lin2"),
    "albert": ("Albert", "ForMaskedLM", {}, "albert.encoder.albert_layer_groups",
        {"mlp": "albert_layers.0.ffn albert_layers.0.ffn_output"}, "albert_layers.0.ffn_output"),
    "modernbert": ("ModernBert", "ForMaskedLM", TWO, "model.layers",
        {"mlp": "mlp.Wi mlp.Wo"}, "mlp.Wo"),
    "mobilebert": ("MobileBert", "ForMaskedLM", TWO | {"num_feedforward_networks": 2},
        "mobilebert.encoder.layer",
        {"mlp": BERT + " ffn.0.intermediate.dense ffn.0.output.dense",
         "bottleneck": "output.bottleneck.dense", "input": "bottleneck.input.dense"},
        "output.dense ffn.0.output.dense"),
    "funnel": ("Funnel", "ForMaskedLM", {"block_sizes": [1, 1]},
        "funnel.encoder.blocks.0 funnel.encoder.blocks.1 funnel.decoder.layers",
        {"mlp": "ffn.linear_1 ffn.linear_2"}, "ffn.linear_2"),
    "xlm": ("XLM", "WithLMHeadModel", {"n_layers": 2}, "transformer.attentions transformer.ffns",
        {"mlp": "lin1 lin2"}, "lin2"),
    "xlnet": ("XLNet", "LMHeadModel", {"n_layer": 2}, "transformer.layer",
        {"mlp": "ff.layer_1 ff.layer_2"}, "ff.layer_2"),
    "fnet": ("FNet", "ForMaskedLM", TWO, "fnet.encoder.layer", {"mlp": BERT}, "output.dense"),
    "t5": ("T5", "ForConditionalGeneration", {"num_layers": 2}, "encoder.block decoder.block",
        {"mlp": " ".join(f"layer.{i}.DenseReluDense.{w}" for i in (1, 2) for w in ("wi", "wo"))},
        "layer.1.DenseReluDense.wo layer.2.DenseReluDense.wo"),
    "bart": ("Bart", "ForConditionalGeneration", {"encoder_layers": 2, "decoder_layers": 2},
        "model.encoder.layers model.decoder.layers", {"mlp": "fc1 fc2"}, "fc2"),
    # Speech: the encoder reads sound.
    "whisper": ("Whisper", "ForConditionalGeneration", {"encoder_layers": 3, "decoder_layers": 2},
        "model.decoder.layers", {"mlp": "fc1 fc2"}, "fc2"),
    # Vision towers of 24, 32 and 12 layers beside a text model of two.
    "llava": ("Llava", "ForConditionalGeneration", TEXT, "model.language_model.layers",
        {"mlp": GATED}, "mlp.down_proj"),
    "qwen2-vl": ("Qwen2VL", "ForConditionalGeneration", {"text_config": TWO},
        "model.language_model.layers", {"mlp": GATED}, "mlp.down_proj"),
    "idefics3": ("Idefics3", "ForConditionalGeneration", TEXT, "model.text_model.layers",
        {"mlp": GATED}, "mlp.down_proj"),
}  # fmt: skip


def build(family):
    """On the meta device: structure and shapes, and no values."""
    import transformers

    name, model, options, *_ = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**options)
    with torch.device("meta"):
        return getattr(transformers, f"{name}{model}")(config)


def in_layers(model, targets):
    layers = list(decoder_layers(model))
    found: dict[str, set[str]] = {}
    for target in targets:
        prefix = layers[target.layer_index]
        found.setdefault(target.group, set()).add(target.name[len(prefix) + 1 :])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_groups_of_a_layer(family):
    *_, stacks, groups, downs = FAMILIES[family]
    model = build(family)
    layers = decoder_layers(model)
    assert list(dict.fromkeys(name.rpartition(".")[0] for name in layers)) in (
        stacks.split(),
        # The lists of one layer's parts take turns.
        [*dict.fromkeys(stacks.split())],
    )
    everything = [t for t in find_targets(model, ".*") if t.group is not None]
    found = in_layers(model, everything)
    attention = found.pop("self_attn", set())
    assert found == {group: set(names.split()) for group, names in groups.items()}
    assert not any(re.search(r"mlp|ffn|feed_forward|mamba|conv", name) for name in attention)
    both = [t.name for t in everything if t.group in ("mlp", "self_attn")]
    if both:
        # Beside these, the matrices of a group that no hook sees, such as XLNet's attention.
        assert [t.name for t in find_targets(model, "all") if not t.by_example] == both
    if downs:
        units = find_targets(model, "mlp", "unit")
        assert in_layers(model, units) == {"mlp": set(downs.split())}
    # Every group can be asked for by its name, and is counted.
    for group, counted in coverage(model, everything)["groups"].items():
        members = [t for t in everything if t.group == group]
        if members:
            assert [t.name for t in find_targets(model, group)] == [t.name for t in members]
        assert (counted["modules"], counted["scored"]) == (len(members), len(members))
        assert counted["parameters"] == sum(t.weight.numel() for t in members)


def test_a_model_without_feed_forward_blocks_names_its_groups():
    with pytest.raises(ValueError, match="got 'mlp'; .* in groups of their own mixer"):
        find_targets(build("mamba"))


# Linear subclasses.


@pytest.mark.parametrize("family", ["Llama4", "Phimoe"])
def test_routers_that_are_linear_and_return_more_are_unscorable(family):
    import transformers

    name = "Llama4Text" if family == "Llama4" else family
    config = getattr(transformers, f"{name}Config")(**TWO, num_local_experts=4)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    covered = coverage(model, find_targets(model, "self_attn"))
    routers = [name for name in covered["unscorable"] if name.endswith("router.weight")]
    assert len(routers) == 2
    assert covered["groups"]["router"] == {
        "modules": 0,
        "parameters": 0,
        "scored": 0,
        "scored_parameters": 0,
        "unscorable": 2 * 4 * config.hidden_size,
    }


class Written(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


class Counting(nn.Linear):
    def forward(self, x):
        return super().forward(x), x.shape[0]


@pytest.mark.parametrize(("kind", "scored"), [(Written, True), (Counting, False)])
def test_a_linear_subclass_counts_if_it_computes_a_linear(kind, scored):
    model = llama()
    model.model.layers[0].mlp.up_proj = kind(32, 64)
    name = "model.layers.0.mlp.up_proj"
    found = [target.name for target in find_targets(model)]
    assert (name in found) == scored and len(found) == 5 + scored
    assert (f"{name}.weight" in coverage(model, [])["unscorable"]) != scored


def test_an_overridden_forward_of_one_instance_is_still_a_linear():
    model = llama()
    layer = model.model.layers[0].mlp.up_proj
    plain = layer.forward
    layer.forward = lambda *args, **kwargs: plain(*args, **kwargs)  # as accelerate hooks a module
    examples = make_examples()
    scores = fastdean.score(model, batches(examples, 3), progress=False)
    expected = weight_importance(llama(), examples, list(scores))
    assert all(norm_error(scores[name], expected[name]) < 1e-5 for name in scores)


# Models of no family.


class Mixed(nn.Module):
    """Names that say nothing: a block that mixes tokens, one that widens, and a low-rank gate."""

    def __init__(self, width=8):
        super().__init__()
        self.first = nn.ModuleDict({"a": nn.Linear(width, width), "b": nn.Linear(width, width)})
        self.second = nn.ModuleDict({"a": nn.Linear(width, 24), "b": nn.Linear(24, width)})
        self.third = nn.ModuleDict({"a": nn.Linear(width, 2), "b": nn.Linear(2, width)})


def test_without_names_a_block_is_what_widens_and_comes_back():
    model = nn.Module()
    model.blocks = nn.ModuleList(Mixed() for _ in range(2))
    targets = find_targets(model, ".*")
    assert {t.name: t.group for t in targets if t.layer_index == 0} == {
        f"blocks.0.{part}.{name}": group
        for part, group in (("first", "first"), ("second", "mlp"), ("third", "third"))
        for name in "ab"
    }
    assert [t.name for t in find_targets(model, "mlp", "unit")] == [
        "blocks.0.second.b",
        "blocks.1.second.b",
    ]


def sequence_loss(outputs, batch):
    logits = getattr(outputs, "logits", outputs)
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
    return losses.mean(1)


def one_by_one(model, batch, names, run):
    """name -> |W| * mean of |dL/dW| over the examples of a batch, in float64."""
    weights = {name: model.get_parameter(name) for name in names}
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    size = batch["input_ids"].shape[0]
    for i in range(size):
        example = {key: value[i : i + 1] for key, value in batch.items()}
        loss = sequence_loss(run(model, example), example).sum()
        for name, gradient in zip(
            names, torch.autograd.grad(loss, list(weights.values())), strict=True
        ):
            sums[name] += gradient.abs()
    return {name: sums[name] * weights[name].detach().abs() / size for name in names}


def test_torchs_own_encoder():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(VOCAB, 8)
            layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2)
            self.tags = nn.Linear(8, 5)

        def forward(self, input_ids):
            return self.tags(self.encoder(self.embed(input_ids)))

    model = Tagger().eval()
    generator = torch.Generator().manual_seed(1)
    batch = {
        "input_ids": torch.randint(0, VOCAB, (3, 6), generator=generator),
        "labels": torch.randint(0, 5, (3, 6), generator=generator),
    }
    # The output projection of nn.MultiheadAttention is never called as a module.
    scores = fastdean.score(
        model, [batch], target_modules="mlp", loss_fn=sequence_loss, progress=False
    )
    names = [f"encoder.layers.{i}.linear{j}.weight" for i in (0, 1) for j in (1, 2)]
    assert list(scores) == names
    expected = one_by_one(
        model.double(), batch, names, lambda model, example: model(example["input_ids"])
    )
    assert all(norm_error(scores[name], expected[name]) < 1e-5 for name in names)
    missed = scores.manifest["coverage"]["unscorable"]
    assert {name.rpartition("self_attn.")[2] for name in missed} == {
        "in_proj_weight",
        "out_proj.weight",
    }


@pytest.mark.parametrize("granularity", ["weight", "unit"])
@pytest.mark.parametrize("target_tokens", [7, 4])
def test_both_stacks_of_an_encoder_with_a_decoder(granularity, target_tokens):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    model = T5ForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(1)
    batch = {
        "input_ids": torch.randint(3, VOCAB, (3, 7), generator=generator),
        "decoder_input_ids": torch.randint(3, VOCAB, (3, target_tokens), generator=generator),
        "labels": torch.randint(3, VOCAB, (3, target_tokens), generator=generator),
    }
    scores = fastdean.score(
        model, [batch], granularity=granularity, loss_fn=sequence_loss, progress=False
    )
    kinds = ("wi", "wo") if granularity == "weight" else ("wo",)
    names = [
        f"{stack}.block.{i}.layer.{place}.DenseReluDense.{kind}.weight"
        for stack, place in (("encoder", 1), ("decoder", 2))
        for i in (0, 1)
        for kind in kinds
    ]
    assert sorted(scores) == sorted(names)
    if granularity == "weight":
        expected = one_by_one(
            model.double(),
            batch,
            names,
            lambda model, example: model(
                input_ids=example["input_ids"], decoder_input_ids=example["decoder_input_ids"]
            ),
        )
        assert all(norm_error(scores[name], expected[name]) < 1e-5 for name in names)
