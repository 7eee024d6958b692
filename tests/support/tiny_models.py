"""Tiny random models of the families FastDEAN meets, built from configurations, never downloaded.

`MODELS` maps a readable name to a function `(seed=0) -> PreTrainedModel`, so that a test can write
`@pytest.mark.parametrize("name", MODELS)` and call `MODELS[name]()`. All are float32, on the CPU,
in eval mode, with 2 layers, hidden size 32, MLP size 64 and 96 tokens. `MAX_TOKENS` is the longest
input that each of them takes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

VOCAB = 96
HIDDEN = 32
INTERMEDIATE = 64
LAYERS = 2
HEADS = 4
MAX_TOKENS = 128

_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": MAX_TOKENS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _build(model_class, config, seed: int):
    """The model in eval mode; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).float().eval()
        # Fresh norms are all ones and fresh biases all zeros: a mistake in either would not show.
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def llama(seed: int = 0):
    """Grouped-query attention, gated MLP, head of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**_DECODER, num_key_value_heads=2, tie_word_embeddings=False)
    return _build(LlamaForCausalLM, config, seed)


def qwen2(seed: int = 0):
    """Llama's shape with biases on queries, keys and values, and a head tied to the embedding."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**_DECODER, num_key_value_heads=2, tie_word_embeddings=True)
    return _build(Qwen2ForCausalLM, config, seed)


def gpt2(seed: int = 0):
    """Conv1D layers, whose weights are stored transposed, and a tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=MAX_TOKENS,
        n_embd=HIDDEN,
        n_inner=INTERMEDIATE,
        n_layer=LAYERS,
        n_head=HEADS,
        bos_token_id=1,
        eos_token_id=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return _build(GPT2LMHeadModel, config, seed)


def gemma2(seed: int = 0):
    """Soft-capped attention scores and logits, sliding windows, a tied head."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        **_DECODER,
        num_key_value_heads=2,
        head_dim=HIDDEN // HEADS,
        query_pre_attn_scalar=HIDDEN // HEADS,
        sliding_window=16,
        final_logit_softcapping=5.0,
        attn_logit_softcapping=5.0,
        attn_implementation="eager",
    )
    return _build(Gemma2ForCausalLM, config, seed)


def cohere(seed: int = 0):
    """Parallel attention and MLP; logits scaled down after the head."""
    from transformers import CohereConfig, CohereForCausalLM

    config = CohereConfig(**_DECODER, num_key_value_heads=2, logit_scale=0.0625)
    return _build(CohereForCausalLM, config, seed)


def granite(seed: int = 0):
    """Llama's shape with multipliers on embeddings and residuals; logits divided after the head."""
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(
        **_DECODER,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        embedding_multiplier=4.0,
        residual_multiplier=0.5,
        attention_multiplier=0.25,
        logits_scaling=8.0,
    )
    return _build(GraniteForCausalLM, config, seed)


def bert(seed: int = 0):
    """A masked language model: no causal mask, absolute positions, tied decoder."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=MAX_TOKENS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )
    return _build(BertForMaskedLM, config, seed)


CAUSAL_MODELS: dict[str, Callable] = {
    "llama": llama,
    "qwen2": qwen2,
    "gpt2": gpt2,
    "gemma2": gemma2,
    "cohere": cohere,
    "granite": granite,
}
MASKED_MODELS: dict[str, Callable] = {"bert": bert}
MODELS: dict[str, Callable] = {**CAUSAL_MODELS, **MASKED_MODELS}
