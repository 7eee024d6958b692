"""A tiny random model of any class: its configuration shrunk by the names of its entries.

A rule makes entries of a kind small in every family; `EXCEPTIONS` holds what families need beside,
each with the reason. Of layers that differ, one of each kind is left.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.architectures.classes import Listed

VOCAB = 96
# Ids from here on are a model's own marks (an image begins, a tool is called): no text has them.
SPECIAL = 80
_FEWEST_LAYERS, _MOST_LAYERS = 2, 4

# The first that fits an entry's name says how large it may be; none is ever made larger.
_LIMITS = [
    (r"vocab_size|^vocab_file_size$|n_tokens$", VOCAB),
    (r"index_topk$|index_block_size$|keep_window_size$", 4),
    (r"hidden_size_per_layer_input$", 8),
    (r"byte_group_vocab$", VOCAB),
    (r"topk_group$|shared_experts$", 1),
    (r"n_group$|num_expert_group$", 2),
    (r"(per_tok|per_token|top_?k|moe_k|top_k_experts|zero_expert_num)$", 2),
    (r"(experts|num_experts)$", 6),
    (r"first_k_dense_replace$|num_dense_layers$|moe_layer_start_index$", 1),
    (r"nextn_predict_layers$", 0),
    (r"(num_key_heads)$", 2),
    # With heads of 8, the 64 features that an expansion by 2 gives.
    (r"^(n_)?mamba_(n_|num_)?heads$", 8),
    (r"(rope|nope)_head_dim$|^rotary_dim$", 4),
    (r"(head_dim|head_size|d_kv|kv_channels|d_head|dim_head)$", 8),
    (r"heads?$", 4),
    (r"rank$", 8),
    (r"^(num_|n_)?(encoder_|decoder_)?(hidden_)?(layers?|blocks)$|_(hidden_)?layers$|^depth$", 2),
    (r"position|n_ctx$|max_seq_len|model_max_length|max_sequence_length", 128),
    (r"(intermediate|ffn|inner|feed_?forward|d_ff|dff|mlp_dim|dim_ff|expert_dim|ff_dim)", 48),
    (r"window|chunk_size|chunk_length|block_size|local_attention$", 8),
    (r"(state_size|d_state|state_dim)$", 8),
    (r"^(d_embed|embedding_size)$", 16),
    (r"(hidden_size|d_model|n_embd|dim|embed_dim|hidden_dim|latent_size|width|proj_size)$", 32),
    (r"image_size$", 16),
    (r"patch_size$", 8),
    (r"groups$", 2),
]
_LIMITS = [(re.compile(pattern), limit) for pattern, limit in _LIMITS]
_MARK = re.compile(r"_(token_id|token_index|index)$|^(bos|eos|pad)_id$")
_LAYERS = re.compile(r"^(num_hidden_layers|n_layers?|num_layers)$")
_HEADS = re.compile(r"^(num_attention_heads|n_heads?|num_heads)$")
_KEY_HEADS = re.compile(r"(kv_heads|key_value_heads|kv_n_heads|n_head_kv)$")
_DROPPED = re.compile(r"drop", re.IGNORECASE)
# What some configurations leave open and their models need.
_OPEN = {"head_dim": 8, "vocab_size": VOCAB}
_FIRST_IDS = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 1}

# Kind/type -> what its configuration needs beside the rule, because the rule cannot know it.
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
_NO_INPUTS = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_SHARING = {
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    # A period and an offset place the layers that differ.
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    # Without it every layer is of one kind.
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    # Heads of 8 of the 64 features that an expansion by 2 gives.
    "mamba2": {"num_heads": 8},
    "falcon_h1": {"mamba_d_ssm": 64},
    # Later layers take keys and values from earlier ones of their kind.
    "gemma3n_text": _SHARING
    | {"activation_sparsity_pattern": [0.9] + [0.0] * 5, "intermediate_size": [48] * 6},
    "gemma4_text": _SHARING | {"global_head_dim": 8},
    # Sizes that have to fit each other.
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "hash_seed": 0,
    },
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    # Its block-sparse attention gives way to the full one in the first short text.
    "big_bird": {"attention_type": "original_full"},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "neomme": {"head_dim": 16},
    "gemma4": {"text_config": _SHARING | {"global_head_dim": 8}},
    "gemma4_unified": {"text_config": _SHARING | {"global_head_dim": 8}},
    "gemma4_unified_text": _SHARING | {"global_head_dim": 8},
    # Tokens that the text has.
    "esmc": {"vocab_size": VOCAB, "num_key_value_heads": 4},
    "nemotron": {"num_key_value_heads": 2},
    "dots1": {"n_routed_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 2}
    | {"first_k_dense_replace": 1},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"num_layers": 1, "num_key_value_heads": 4, "head_dim": 4},
    "doge": {"num_key_value_heads": 2},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    # The layers above patches are twice as wide as those of bytes, from two of which each comes.
    "blt": {
        "global_config": {"hidden_size": 64},
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
    },
    "dots3_note": {
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    },
    "gemma4_assistant": {"text_config": _NO_INPUTS},
    "gemma4_unified_assistant": {"text_config": _NO_INPUTS},
    "qwen4_exp_text": _INDEXER,
    "qwen4_exp": {"text_config": _INDEXER},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
    # Read, and in no field of its own.
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "funnel": {"block_sizes": [1, 2]},
    "squeezebert": {"embedding_size": 32},
    "mobilebert": {"intra_bottleneck_size": 16},
    "perceiver": {"d_latents": 32, "num_latents": 8, "num_self_attends_per_block": 2},
}


def tiny_config(listed: Listed) -> Any:
    """The shrunk configuration of a listed class."""
    exceptions = EXCEPTIONS.get(listed.model_type, {})
    try:
        config = listed.config_class()()
    except Exception:
        # What stands there by itself is refused by the class's own checks.
        config = listed.config_class()(**exceptions)
    config = _shrunk(config, exceptions)
    if listed.kind == "causal" and hasattr(config, "is_decoder"):
        # Masked by default, where a class is both.
        config.is_decoder = True
    if listed.kind == "causal" and hasattr(config, "causal"):
        config.causal = True
    return config


def tiny_model(listed: Listed, seed: int) -> nn.Module:
    """The model in fp32 and eval mode, every parameter random."""
    model_class, config = listed.model_class(), tiny_config(listed)
    if not isinstance(config, model_class.config_class):
        # A class for text alone takes its part of a configuration of text and pictures.
        config = config.get_text_config(decoder=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).float().eval()
        for parameter in model.parameters():
            _fill(parameter.data)
        return model


def _fill(value: torch.Tensor) -> None:
    """Random, also what is fresh at zero or one, or not initialised at all."""
    if not value.is_floating_point():
        return
    if value.dim() > 1:
        value.copy_(torch.randn_like(value) / value[0].numel() ** 0.5)
        return
    sound = value.isfinite() & (value.abs() < 10)
    value.copy_(torch.where(sound, value, 0.0))
    value.add_(torch.randn_like(value), alpha=0.1)


def _shrunk(config: Any, exceptions: Mapping[str, Any]) -> Any:
    """A new configuration of the same class."""
    values = {}
    # What a configuration works out of its fields it will work out again.
    names = [field.name for field in dataclasses.fields(config) if field.init]
    # Not by getattr, which some refuse for what differs from layer to layer.
    own = vars(config)
    entries = {name: own[name] for name in names if name[0] != "_" and name in own}
    kept = _kept_layers(entries)
    heads = next((entries[n] for n in entries if _HEADS.search(n)), None)
    marks = 0
    for name, value in entries.items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            below = exceptions.get(name, {})
            values[name] = _shrunk(value, below if isinstance(below, Mapping) else {})
        elif _MARK.search(name):
            marks += 1
            values[name] = _mark(name, value, marks)
        elif _KEY_HEADS.search(name) and type(value) is int:
            # As many as queries have, or fewer, as it was.
            values[name] = min(value, 4 if value == heads else 2)
        elif kept is not None and isinstance(value, (list, tuple)) and len(value) == kept[0]:
            values[name] = [_small(name, value[i]) for i in kept[1]]
        elif kept is not None and _LAYERS.search(name):
            values[name] = len(kept[1])
        else:
            values[name] = _small(name, value)
    # Two configurations are not compared: of some, entries must not be read.
    changed = (n for n, v in values.items() if hasattr(v, "to_dict") or v != entries[n])
    values = {name: values[name] for name in changed}
    for name, value in exceptions.items():
        if not (name in values and isinstance(value, Mapping) and hasattr(values[name], "to_dict")):
            values[name] = value
    return type(config)(**values)


def _kept_layers(entries: Mapping[str, Any]) -> tuple[int, list[int]] | None:
    """How many layers there were, and which of them stay: of each kind the first."""
    number = next((entries[n] for n in entries if _LAYERS.search(n)), None)
    if not isinstance(number, int) or number < _FEWEST_LAYERS:
        return None
    lists = [v for v in entries.values() if isinstance(v, (list, tuple)) and len(v) == number]
    first: dict[str, int] = {}
    for i in range(number):
        first.setdefault(repr([each[i] for each in lists]), i)
    kept = sorted(first.values())[:_MOST_LAYERS]
    others = [i for i in range(number) if i not in kept]
    return number, sorted([*kept, *others[: max(0, _FEWEST_LAYERS - len(kept))]])


def _mark(name: str, value: Any, number: int) -> Any:
    marked = value if not isinstance(value, int) else SPECIAL + number % (VOCAB - SPECIAL)
    return next((own for first, own in _FIRST_IDS.items() if name.startswith(first)), marked)


def _small(name: str, value: Any) -> Any:
    if isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
        return [_small(name, v) for v in value]
    if isinstance(value, float) and _DROPPED.search(name):
        return 0.0
    if isinstance(value, dict):
        return {key: _small_rope(key, each) for key, each in value.items()}
    if type(value) is not int:
        return _OPEN.get(name) if value is None else value
    return min(value, next((limit for kind, limit in _LIMITS if kind.search(name)), value))


def _small_rope(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _small_rope(name, each) for name, each in value.items()}
    # Sections of half a head's dimensions.
    return [2, 1, 1] if key == "mrope_section" else value
