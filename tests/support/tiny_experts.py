"""Tiny random mixtures of experts, whose experts are fused, by family."""

from __future__ import annotations

import copy

from oracle import weight_importance
from tiny_models import HEADS, HIDDEN, LAYERS, MAX_TOKENS, VOCAB, _build

EXPERTS, CHOSEN, UNITS = 5, 2, 24

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_TOKENS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_NUMBER = {"num_experts": EXPERTS, "num_experts_per_tok": CHOSEN}
_LOCAL = {"num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN}
_ROUTED = {
    "n_routed_experts": 6,
    "num_experts_per_tok": CHOSEN,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": UNITS,
}
_LATENT = {
    "num_key_value_heads": HEADS,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
_HYBRID = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}

# Family -> its class of causal models, and what its configuration needs beside the sizes.
FAMILIES = {
    "Mixtral": _LOCAL,
    "Qwen2Moe": _NUMBER | {"moe_intermediate_size": UNITS, "shared_expert_intermediate_size": 20},
    "Qwen3Moe": _NUMBER | {"moe_intermediate_size": UNITS, "head_dim": 8},
    "Qwen3Next": _NUMBER
    | _HYBRID
    | {"moe_intermediate_size": UNITS, "shared_expert_intermediate_size": 20},
    "GptOss": _LOCAL
    | {
        "head_dim": 8,
        "sliding_window": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "DeepseekV2": _ROUTED | _LATENT | {"topk_method": "greedy", "n_group": 1},
    "DeepseekV3": _ROUTED | _LATENT,
    "Glm4Moe": _ROUTED | {"head_dim": 8},
    "Llama4Text": _LOCAL
    | {"num_experts_per_tok": 1, "head_dim": 8, "intermediate_size_mlp": 48}
    | {"attention_chunk_size": 64},
    "MiniMax": _LOCAL | {"head_dim": 8, "block_size": 8},
    "Olmoe": _NUMBER,
    "GraniteMoe": _LOCAL,
    "GraniteMoeShared": _LOCAL | {"shared_intermediate_size": 20},
    "GraniteMoeHybrid": _LOCAL
    | {"shared_intermediate_size": 20, "layer_types": ["attention", "attention"]}
    | {"mamba_n_heads": 8, "mamba_d_head": 8},
    "Jamba": _NUMBER
    | {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 0,
        "expert_layer_period": 2,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "Phimoe": _LOCAL,
    "NemotronH": {
        "n_routed_experts": 6,
        "num_experts_per_tok": CHOSEN,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": UNITS,
        "moe_shared_expert_intermediate_size": 20,
        "layers_block_type": ["attention", "moe"],
        "head_dim": 8,
    },
    "LongcatFlash": {
        **_LATENT,
        "head_dim": 4,
        "num_layers": 1,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": CHOSEN,
        "expert_ffn_hidden_size": UNITS,
        "ffn_hidden_size": 40,
    },
}


def experts_model(family: str, seed: int = 0, **further):
    import transformers

    config = getattr(transformers, f"{family}Config")(**_SHAPE | FAMILIES[family] | further)
    return _build(transformers.AutoModelForCausalLM.from_config, config, seed)


def own_importance(model, examples, names):
    """`weight_importance` of the model's own experts, by the loop that every family has."""
    model = copy.deepcopy(model)
    # The grouped product of the default implementation has no float64 form.
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation_internal"):
            config._experts_implementation_internal = "eager"
    return weight_importance(model, examples, names)
