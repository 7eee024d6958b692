"""Attention by segments: every packed example as if it were alone, on the model's own terms."""

from __future__ import annotations

import threading

import pytest
import torch
from interrupts import interrupt, moments
from tiny_experts import FAMILIES as MIXTURES
from tiny_models import HEADS, HIDDEN, INTERMEDIATE, LAYERS, MAX_TOKENS, VOCAB, _build

from fastdean.data import batching
from fastdean.data.examples import Example
from fastdean.models.attention import packed as attention
from fastdean.models.attention.packed import (
    NAME,
    NotExpressible,
    attention_by_segments,
    segment_attention,
)
from fastdean.models.attention.segment_products import Segments
from fastdean.models.exact_layout import exact_layout
from fastdean.models.forward import prepare_batches, target_log_likelihood

LENGTHS = (7, 11, 3, 9, 1)
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_TOKENS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What each family asks of its attention beyond causality.
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": 4},
    "Gemma2": {"head_dim": 16, "sliding_window": 4, "attn_logit_softcapping": 2.0},
    "Gemma3Text": {"head_dim": 16, "sliding_window": 4},
    "GptOss": {
        "head_dim": 8,
        "sliding_window": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "Llama4Text": {
        "attention_chunk_size": 4,
        "num_local_experts": 4,
        "head_dim": 8,
        "intermediate_size_mlp": 48,
    },
    "OPT": {"ffn_dim": INTERMEDIATE, "word_embed_proj_dim": HIDDEN},
    "Phi": {},
    "Starcoder2": {"sliding_window": 4},
}


def _family(name: str):
    import transformers

    config = getattr(transformers, f"{name}Config")(**_SHAPE | FAMILIES[name])
    return _build(transformers.AutoModelForCausalLM.from_config, config, 0)


def _segments(lengths=LENGTHS) -> torch.Tensor:
    ends = torch.tensor(lengths).cumsum(0)
    return torch.stack([ends - torch.tensor(lengths), ends], dim=1)


def _packed(lengths=LENGTHS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(3, VOCAB, (1, sum(lengths)), generator=generator),
        "position_ids": torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0),
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_a_packed_example_computes_what_it_computes_alone(name):
    model = _family(name)
    inputs, segments = _packed(), _segments()
    loss_weights = torch.linspace(-1, 1, VOCAB)

    def gradient(logits: torch.Tensor) -> torch.Tensor:
        embedding = model.get_input_embeddings().weight
        return torch.autograd.grad((logits * loss_weights).sum(), embedding)[0]

    alone = torch.cat([model(inputs["input_ids"][:, s:e]).logits[0] for s, e in segments.tolist()])
    with attention_by_segments(model, segments):
        packed = model(**inputs, use_cache=False).logits[0]
        packed_gradient = gradient(packed)
    assert (packed - alone).norm() < 1e-6 * alone.norm()
    expected = gradient(alone)
    assert (packed_gradient - expected).norm() < 2e-6 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads, kv_heads, width, value_width", [(4, 2, 8, 8), (3, 3, 5, 12)])
@pytest.mark.parametrize("lengths", [(1,), (5, 5), (63, 1, 17, 60), (2, 33, 31)], ids=str)
def test_against_the_dense_masked_softmax(lengths, heads, kv_heads, width, value_width, dtype):
    n = sum(lengths)
    torch.manual_seed(0)
    shapes = [(heads, width), (kv_heads, width), (kv_heads, value_width)]
    q, k, v = (torch.randn(1, h, n, d, dtype=dtype, requires_grad=True) for h, d in shapes)
    example = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = (example[:, None] == example) & torch.ones(n, n, dtype=torch.bool).tril()

    def dense(q, k, v):
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        scores = (q @ k.transpose(-1, -2) * width**-0.5).masked_fill(~allowed, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    longest = max(lengths)
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    mask = torch.zeros(len(lengths), 1, longest, longest, dtype=dtype)
    mask = mask.masked_fill(~causal, -torch.inf)
    with attention_by_segments(torch.nn.Identity(), _segments(lengths)):
        found, weights = segment_attention(None, q, k, v, mask)
    assert weights is None and found.shape == (1, n, heads, value_width)
    upstream = torch.randn(found.shape, dtype=dtype)
    gradients = torch.autograd.grad(found, (q, k, v), upstream)

    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = dense(*wide)
    expected_gradients = torch.autograd.grad(expected, wide, upstream.double())
    limit = 8 * torch.finfo(dtype).eps
    for ours, oracle in zip((found, *gradients), (expected, *expected_gradients), strict=True):
        assert (ours.double() - oracle).norm() <= limit * oracle.norm().clamp_min(1e-12) + limit


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("layout", ["by token", "by head", "sliced"])
def test_sinks_softcap_and_layouts_against_float64(softcap, layout):
    lengths, heads, kv_heads, width = (6, 1, 5), 6, 2, 4
    n = sum(lengths)
    torch.manual_seed(0)

    def leaf(h: int) -> torch.Tensor:
        if layout == "by head":
            return torch.randn(1, h, n, width, dtype=torch.float64, requires_grad=True)
        wide = torch.randn(1, n, h, width + (layout == "sliced"), dtype=torch.float64)
        return wide[..., :width].transpose(1, 2).requires_grad_()

    q, k, v = leaf(heads), leaf(kv_heads), leaf(kv_heads)
    sinks = torch.randn(heads, dtype=torch.float64, requires_grad=True)
    window = torch.ones(6, 6, dtype=torch.bool).tril().triu(-2)
    mask = torch.zeros(3, 1, 6, 6, dtype=torch.float64).masked_fill(~window, -torch.inf)

    def alone(start: int, end: int) -> torch.Tensor:
        own_k, own_v = (t[0, :, start:end].repeat_interleave(3, 0) for t in (k, v))
        scores = q[0, :, start:end] @ own_k.transpose(1, 2) * 0.3
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores + mask[0, 0, : end - start, : end - start]
        scores = torch.cat([scores, sinks.view(-1, 1, 1).expand(-1, end - start, 1)], dim=-1)
        return (scores.softmax(-1)[..., :-1] @ own_v).transpose(0, 1)

    segments = _segments(lengths)
    with attention_by_segments(torch.nn.Identity(), segments):
        found, _ = segment_attention(None, q, k, v, mask, scaling=0.3, softcap=softcap, s_aux=sinks)
    expected = torch.cat([alone(*bounds) for bounds in segments.tolist()]).unsqueeze(0)
    upstream = torch.randn(found.shape, dtype=torch.float64)
    inputs = (q, k, v, sinks)
    ours = torch.autograd.grad(found, inputs, upstream)
    oracle = torch.autograd.grad(expected, inputs, upstream)
    for mine, right in zip((found, *ours), (expected, *oracle), strict=True):
        assert (mine - right).norm() <= 1e-13 * right.norm()


def test_layers_that_are_run_again_in_the_backward_pass_attend_alike():
    """Activation checkpointing runs a layer's forward a second time, after the model's own."""
    from torch.utils.checkpoint import checkpoint

    import fastdean

    examples = [Example(torch.arange(3, n), torch.arange(3, n)) for n in (9, 14, 12)]
    model = _family("Llama")
    expected = fastdean.score(model, examples, progress=False)
    for layer in model.model.layers:
        run = layer.forward
        layer.forward = lambda *args, run=run, **kwargs: checkpoint(
            run, *args, use_reentrant=False, **kwargs
        )
    found = fastdean.score(model, examples, progress=False)
    assert found.manifest["batching"]["by_segments"]
    for name, entry in expected.entries.items():
        assert torch.equal(found.entries[name].sums, entry.sums)


def test_examples_of_like_length_share_a_product_and_no_other_do():
    segments = Segments.cut(_segments((10, 40, 9, 39, 8, 1)))
    assert segments.groups == ((1, 3), (0, 2, 4), (5,))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_models_own_attention_comes_back(error):
    model = _family("Llama")
    before = model.config._attn_implementation
    expected = model(**_packed()).logits
    with pytest.raises(error), attention_by_segments(model, _segments()):
        assert model.config._attn_implementation == NAME
        raise error
    assert model.config._attn_implementation == before
    assert torch.equal(model(**_packed()).logits, expected)


def test_an_interrupt_at_any_line_leaves_the_models_own_attention():
    model, files = _family("Llama"), {attention.__file__}

    def block() -> None:
        with attention_by_segments(model, _segments((2, 3))):
            pass

    block()
    for moment in moments(block, files):
        interrupt(block, files, moment)
        assert model.config._attn_implementation == "sdpa"
    with pytest.raises(NotExpressible, match="outside"):
        attention._announced()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_blocks_of_models_with_one_configuration_may_end_in_any_order(implementation):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**_SHAPE, attn_implementation=implementation)
    models = [_build(LlamaForCausalLM, config, seed) for seed in range(2)]
    assert models[0].config is models[1].config
    first, second = (attention_by_segments(model, _segments()) for model in models)
    for step in (first.__enter__, second.__enter__):
        step()
        assert config._attn_implementation == NAME
    first.__exit__(None, None, None)
    assert config._attn_implementation == NAME
    attention._announced()
    second.__exit__(None, None, None)
    assert config._attn_implementation == implementation
    # Nothing that a later block of the same lengths would take for its own.
    with pytest.raises(NotExpressible, match="outside"):
        attention._announced()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_another_threads_passes_keep_the_models_own_attention(implementation):
    model = _family("Llama")
    model.set_attn_implementation(implementation)
    ids = _packed()["input_ids"].view(1, -1).expand(2, -1)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    found = []

    def run() -> None:
        with torch.no_grad():
            found.append(model(ids, use_cache=False).logits)

    with attention_by_segments(model, _segments()):
        other = threading.Thread(target=run)
        other.start()
        other.join()
    assert torch.equal(found[0], expected)


def test_an_attention_that_somebody_registered_is_the_models_own(monkeypatch):
    """It may be another for longer texts than are tried: here it sees the last 16 tokens."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def of_the_last_16(module, query, key, value, attention_mask, **others):
        n = query.shape[2]
        allowed = torch.ones(n, n, dtype=torch.bool).tril().triu(-15)
        allowed = allowed if attention_mask is None else allowed & attention_mask
        mask = allowed.expand(query.shape[0], 1, n, n)
        return sdpa_attention_forward(module, query, key, value, mask, **others)

    monkeypatch.setitem(AttentionInterface._global_mapping, "windowed", of_the_last_16)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "windowed", sdpa_mask)
    model = _family("Llama")
    model.set_attn_implementation("windowed")
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, VOCAB, (n,), generator=generator) for n in (60, 50, 40)]
    found, _ = target_log_likelihood(model, [Example(ids, ids) for ids in texts], progress=False)
    for ids, sum_ in zip(texts, found.tolist(), strict=True):
        with torch.no_grad():
            logits = model(ids.unsqueeze(0), use_cache=False).logits[0, :-1].double()
        expected = -torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
        assert sum_ == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("Llama4Text", FAMILIES["Llama4Text"] | {"no_rope_layers": [0, 1], "floor_scale": 25}),
        ("Doge", {"keep_window_size": 24}),
    ],
)
def test_a_row_ends_where_its_length_begins_to_count(name, shape):
    """Llama 4 scales queries by their place in the row, Doge picks keys of the whole row."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**_SHAPE | shape)
    model = _build(transformers.AutoModelForCausalLM.from_config, config, 0)
    examples = [Example(torch.arange(3, n), torch.arange(3, n)) for n in (14, 15, 16, 40)]
    batches = prepare_batches(model, examples, tokens_per_batch=200)
    assert [batch.example_index for batch in batches] == [[0, 1], [2], [3]]
    found, _ = target_log_likelihood(model, examples, tokens_per_batch=200, progress=False)
    alone = [target_log_likelihood(model, [e], progress=False)[0][0] for e in examples]
    assert (found - torch.stack(alone)).abs().max() < 1e-5 * found.abs().max()


@pytest.mark.parametrize(
    "name, shape",
    [
        ("Doge", {"keep_window_size": 8}),
        (
            "DeepseekV32",
            MIXTURES["DeepseekV3"] | {"index_topk": 8, "index_n_heads": 2, "index_head_dim": 8},
        ),
    ],
)
def test_examples_longer_than_what_attention_picks_stand_alone(name, shape):
    """In a longer row, padding included, other keys of the same example may be picked."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**_SHAPE | shape)
    model = _build(transformers.AutoModelForCausalLM.from_config, config, 0)
    examples = [Example(ids, ids) for ids in (torch.arange(3, 3 + n) for n in (20, 5, 13, 9, 3))]
    layout = exact_layout(model, examples)
    assert layout.alone_above == 8
    batches = prepare_batches(model, examples, tokens_per_batch=200)
    alone = {0, 2, 3}
    assert all(not alone & set(b.example_index) or b.num_examples == 1 for b in batches)
    found, _ = target_log_likelihood(model, examples, tokens_per_batch=200, progress=False)
    each = [target_log_likelihood(model, [e], progress=False)[0][0] for e in examples]
    assert (found - torch.stack(each)).abs().max() < 1e-5 * found.abs().max()


def test_one_long_example_among_short_ones_does_not_let_their_mask_grow():
    lengths = [2] * 300 + [256] + [2] * 600
    texts = [torch.arange(n) for n in lengths]
    batches = batching.plan_batches(
        [Example(ids, ids) for ids in texts],
        shift=1,
        tokens_per_batch=2048,
        packed=True,
        by_segments=True,
    )
    assert sorted(i for batch in batches for i in batch.example_index) == list(range(901))
    for batch in batches:
        longest = max(lengths[i] for i in batch.example_index)
        assert batch.by_segments and batch.num_examples * longest**2 <= 2048**2


def test_a_pass_over_other_tokens_is_refused():
    model = _family("Llama")
    for inputs in ({"input_ids": torch.ones(2, 31, dtype=torch.int64)}, _packed((7, 11))):
        with (
            attention_by_segments(model, _segments()),
            pytest.raises(NotExpressible, match="other"),
        ):
            model(**inputs, use_cache=False)


def test_what_it_does_not_do_keeps_the_models_own_attention(monkeypatch):
    """Falcon makes its masks itself, at the price of packing."""
    from transformers import FalconConfig, FalconForCausalLM

    model = _build(FalconForCausalLM, FalconConfig(**_SHAPE), 0)
    examples = [Example(torch.arange(3, n), torch.arange(3, n)) for n in (9, 12, 15)]
    layout = exact_layout(model, examples)
    assert not layout.by_segments
    assert exact_layout(_family("Llama"), examples).by_segments
    monkeypatch.setattr(batching, "LONGEST_SEGMENT", 9)
    llama = _family("Llama")
    batches = prepare_batches(llama, examples, tokens_per_batch=100)
    assert [(batch.by_segments, batch.example_index) for batch in batches] == [
        (True, [0, 1]),
        (False, [2]),
    ]
    assert llama.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "asked, reason",
    [
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_what_it_does_not_do_is_refused_by_name(asked, reason):
    q = torch.zeros(1, 1, 2, 4)
    segments = _segments((2,))
    with (
        attention_by_segments(torch.nn.Identity(), segments),
        pytest.raises(NotExpressible, match=reason),
    ):
        segment_attention(None, q, q, q, torch.zeros(1, 1, 2, 2), **asked)
