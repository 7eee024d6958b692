"""What is measured of a model instead of believed: causality, packing, padding, positions."""

from __future__ import annotations

import pytest
import torch
import transformers
from oracle import norm_error, weight_importance
from tiny_data import batches, make_examples
from tiny_models import CAUSAL_MODELS, HIDDEN, VOCAB, bert, gpt2, llama

import fastdean
from fastdean.coupling.targets import survey
from fastdean.data.batching import plan_batches
from fastdean.data.examples import Example
from fastdean.evaluation import last_token_states, perplexity
from fastdean.models import probes
from fastdean.models.exact_layout import exact_layout
from fastdean.models.fitting import fitted
from fastdean.models.label_shift import label_shift
from fastdean.models.model_state import max_tokens
from fastdean.models.probes import numbers_from, padding_is_exact, sees_ahead, sees_back

EXAMPLES = make_examples(lengths=(4, 9, 7, 12, 5, 16, 11))
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def build(name, config, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, config)(**options)
        return getattr(transformers, name)(config).eval()


def bert_as(name, **options):
    return build(name, "BertConfig", **SIZES, max_position_embeddings=64, **options)


def xlm(causal):
    return build(
        "XLMWithLMHeadModel", "XLMConfig", vocab_size=VOCAB, emb_dim=HIDDEN, n_layers=2, n_heads=4,
        max_position_embeddings=64, causal=causal,
    )  # fmt: skip


def mamba():
    return build(
        "MambaForCausalLM", "MambaConfig", vocab_size=VOCAB, hidden_size=HIDDEN,
        num_hidden_layers=2,
    )  # fmt: skip


def mixtral():
    return build(
        "MixtralForCausalLM", "MixtralConfig", **SIZES, num_key_value_heads=2, num_local_experts=4,
        max_position_embeddings=64,
    )  # fmt: skip


def gpt_neo(positions=24):
    return build(
        "GPTNeoForCausalLM", "GPTNeoConfig", vocab_size=VOCAB, hidden_size=HIDDEN, num_layers=2,
        num_heads=4, attention_types=[[["global", "local"], 1]], intermediate_size=64,
        window_size=4, max_position_embeddings=positions,
    )  # fmt: skip


def assert_scored(model, shift=1, examples=EXAMPLES, **options):
    scores = fastdean.score(model, batches(examples, 4), progress=False, **options)
    expected = weight_importance(model, examples, list(scores), shift)
    for name, value in scores.items():
        assert norm_error(value, expected[name]) < 1e-5, name
    return scores


# Causality.

CAUSAL = {
    **CAUSAL_MODELS,
    "BERT as a decoder": lambda: bert_as("BertLMHeadModel", is_decoder=True),
    "XLM, causal": lambda: xlm(causal=True),
    "Mamba": mamba,
    "experts": mixtral,
    "GPT-Neo, local attention": gpt_neo,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CAUSAL)
def test_causal_models_predict_the_next_token(kind, dtype):
    model = CAUSAL[kind]().to(dtype)
    assert label_shift(model) == 1
    assert sees_ahead(model) is False and sees_back(model) is True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [bert, lambda: xlm(causal=False)], ids=["BERT", "XLM"])
def test_masked_models_predict_the_token_itself(make, dtype):
    model = make().to(dtype)
    assert label_shift(model) == 0 and sees_ahead(model) is True


def test_xlm_is_scored_as_what_it_is():
    assert_scored(xlm(causal=False), shift=0)


PRETENDING = {
    "BertLMHeadModel": lambda: bert_as("BertLMHeadModel"),
    "RobertaForCausalLM": lambda: build(
        "RobertaForCausalLM", "RobertaConfig", **SIZES, max_position_embeddings=64
    ),
    "XLNetLMHeadModel": lambda: build(
        "XLNetLMHeadModel",
        "XLNetConfig",
        vocab_size=VOCAB,
        d_model=HIDDEN,
        n_layer=2,
        n_head=4,
        d_inner=64,
    ),  # fmt: skip
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PRETENDING)
def test_bidirectional_models_of_a_causal_class_are_refused(name, dtype):
    model = PRETENDING[name]().to(dtype)
    text = f"must be causal to be read as .*, got {name}, whose logits depend on later tokens; set"
    with pytest.raises(ValueError, match=text):
        fastdean.score(model, batches(EXAMPLES[:1], 1), progress=False)
    with pytest.raises(ValueError, match=text):
        perplexity(model, batches(EXAMPLES, 2), progress=False)
    with pytest.raises(ValueError, match=text):
        label_shift(torch.nn.DataParallel(model).module)


class Random(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.dropout(x, 0.1, training=True)


class Counting(torch.nn.Module):
    """As a running mean that is not switched off."""

    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        self.passes += 1
        return x * self.passes


@pytest.mark.parametrize("layer", [Random, Counting])
@pytest.mark.parametrize("make", [llama, lambda: xlm(causal=True)], ids=["Llama", "XLM"])
def test_a_causal_model_that_does_not_repeat_itself_is_told_so(make, layer):
    """And is not taken for one that sees later tokens, or for a masked one."""
    model = make()
    head = model.get_output_embeddings()
    mixed = layer()
    head.register_forward_pre_hook(lambda _, args: (mixed(args[0]),))
    name = type(model).__name__
    text = f"same logits for the same tokens, got {name}, which does not compute the same twice"
    with pytest.raises(ValueError, match=text):
        fastdean.score(model, batches(EXAMPLES, 2), progress=False)
    with pytest.raises(ValueError, match=text):
        perplexity(model, batches(EXAMPLES, 2), progress=False)


def test_a_causal_model_of_a_masked_class_is_refused():
    class Forward(transformers.BertForMaskedLM):
        def forward(self, input_ids, attention_mask=None, **kwargs):
            length = input_ids.shape[1]
            causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
            mask = torch.zeros(1, 1, length, length).masked_fill(~causal, -1e9)
            return super().forward(input_ids, attention_mask=mask, **kwargs)

    model = bert()
    model.__class__ = Forward
    text = "both sides to be read as .*, got Forward, whose logits depend on earlier tokens only"
    with pytest.raises(ValueError, match=text):
        fastdean.score(model, batches(EXAMPLES, 2), progress=False)


def test_a_model_whose_attention_is_masked_out_stays_what_its_class_is():
    for make, shift in ((bert, 0), (llama, 1)):
        model = make()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "attention.output.dense" in name or "o_proj" in name:
                    weight.zero_()
        assert label_shift(model) == shift


def test_adapters_are_looked_through():
    class Adapted(torch.nn.Module):
        """PEFT's outside: the model lies within, and is called through it."""

        def __init__(self, model):
            super().__init__()
            self.inner = model

        def get_base_model(self):
            return self.inner

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    with pytest.raises(ValueError, match="got BertLMHeadModel, whose logits depend on later"):
        label_shift(Adapted(bert_as("BertLMHeadModel")))
    model = gpt2()
    assert label_shift(Adapted(model)) == 1
    typed = [Example(ids, labels, {"token_type_ids": ids % 2}) for ids, labels in EXAMPLES]
    found, expected = (fastdean.score(m, typed, progress=False) for m in (Adapted(model), model))
    assert found.manifest["data"] == expected.manifest["data"]
    for name in expected:
        assert torch.equal(found[name], expected[name])


def test_causality_is_measured_once_and_leaves_the_model_as_it_was():
    model, passes = gpt2().train(), []
    model.transformer.drop.p = 0.9
    handle = model.register_forward_hook(lambda *args: passes.append(1))
    assert label_shift(model) == label_shift(model) == 1
    handle.remove()
    assert len(passes) == 2 and model.training and model.transformer.h[0].training
    assert model.config.use_cache is True


def test_a_model_that_did_not_change_costs_one_trial_and_the_batches():
    model, ran = llama(), []
    model.register_forward_pre_hook(lambda *args: ran.append(1))

    def passes():
        ran.clear()
        scores = fastdean.score(model, [Example(*each) for each in EXAMPLES], progress=False)
        assert scores.manifest["batching"]["by_segments"] is True
        return len(ran)

    # Two of causality, two of positions, six of packed examples, one of an example by itself.
    assert passes() == 11 + 2
    assert passes() == 2


def test_what_a_score_asks_is_looked_up_once(monkeypatch):
    model, looked = llama(), []

    def counted(module, name):
        real = getattr(module, name)

        def noted(model):
            looked.append(name)
            return real(model)

        monkeypatch.setattr(module, name, noted)

    counted(probes, "_state")
    counted(survey, "decoder_layers")
    examples = [Example(*each) for each in EXAMPLES]
    expected = fastdean.score(model, examples, progress=False)
    looked.clear()
    again = fastdean.score(model, examples, progress=False)
    # Before the examples are read, which is the caller's code, and after.
    assert sorted(looked) == ["_state", "_state", "decoder_layers"]
    assert again.manifest["coverage"] == expected.manifest["coverage"]


def test_a_model_that_changes_after_a_failed_measurement_is_measured_again(monkeypatch):
    model = gpt2()

    def failing(*args):
        raise torch.OutOfMemoryError("as a GPU does")

    with monkeypatch.context() as patch:
        patch.setattr(probes, "attends_plainly", failing)
        with pytest.raises(torch.OutOfMemoryError):
            exact_layout(model, [Example(*each) for each in EXAMPLES])
    no_longer_causal(model)
    assert sees_ahead(model) is True


def no_longer_causal(model):
    for block in model.transformer.h:
        block.attn.is_causal = False


def of_another_configuration(model):
    model.config.is_causal = False


@pytest.mark.parametrize("change", [no_longer_causal, of_another_configuration])
def test_a_model_that_was_changed_is_measured_again(change):
    model = gpt2()
    assert label_shift(model) == 1
    change(model)
    with pytest.raises(ValueError, match="^model must be causal to be read as the causal"):
        fastdean.score(model, [Example(*EXAMPLES[0])], progress=False)


def test_weights_that_mix_tokens_by_now_are_measured_again():
    model = mamba()
    trained = {name: weight.clone() for name, weight in model.state_dict().items()}
    for layer in model.backbone.layers:
        torch.nn.init.zeros_(layer.mixer.out_proj.weight)
    examples = [Example(*each) for each in EXAMPLES]
    assert exact_layout(model, examples).packed
    model.load_state_dict(trained)
    assert not exact_layout(model, examples).packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_by_the_sizes_of_experts_keeps_examples_apart(dtype):
    """Some processors add up products of another size in another order; these here may not."""
    examples = [Example(*each) for each in EXAMPLES]
    step = torch.finfo(dtype).eps / 2

    def rounded(_, args, output):
        busy = int((args[0][..., 0] > 0).sum())
        return output + (busy % 3 - 1) * step * output

    mixture, plain = mixtral().to(dtype), gpt2().to(dtype)
    for layer in (*mixture.model.layers, *plain.transformer.h):
        layer.mlp.register_forward_hook(rounded)
    layout = exact_layout(mixture, examples)
    assert layout.packed and layout.by_segments and sees_ahead(mixture) is False
    layout = exact_layout(plain, examples)
    assert not (layout.packed or layout.by_segments)


def test_experts_that_a_recurrence_joins_are_not_kept_apart():
    model = mixtral()
    examples = [Example(*each) for each in EXAMPLES]
    assert exact_layout(model, examples).packed

    def recurring(_, args, output):
        return output + 1e-5 * args[0].cumsum(1)

    model.model.layers[0].mlp.register_forward_hook(recurring)
    layout = exact_layout(model, examples)
    assert not (layout.packed or layout.by_segments) and sees_ahead(model) is False


# Positions and padding.


def test_a_model_s_own_numbering_is_told_from_others():
    roberta = build("RobertaForMaskedLM", "RobertaConfig", **SIZES, max_position_embeddings=64)
    assert numbers_from(roberta, 2) and not numbers_from(roberta, 0)
    assert numbers_from(gpt2(), 0) and not numbers_from(gpt2(), 1)


def test_positions_as_a_roberta_numbers_them_itself():
    model = build("RobertaForMaskedLM", "RobertaConfig", **SIZES, max_position_embeddings=64)
    for start, shared in ((0, False), (2, True)):
        given = [
            (ids, labels, {"position_ids": torch.arange(len(ids)) + start})
            for ids, labels in EXAMPLES
        ]
        loader = [{"input_ids": ids, "labels": labels, **more} for ids, labels, more in given]
        scores = fastdean.score(model, loader, progress=False)
        expected = weight_importance(model, given, list(scores), 0)
        for name, value in scores.items():
            assert norm_error(value, expected[name]) < 1e-5, name
        examples = fitted(model, [Example(*each) for each in given])
        assert all(example.columns == {} for example in examples) is shared


def test_padding_is_measured_with_the_columns_that_are_padded():
    class ByTheRow(transformers.BertForMaskedLM):
        """Its token types count by their mean over the row, padding included."""

        def forward(self, input_ids, attention_mask=None, token_type_ids=None):
            found = super().forward(input_ids, attention_mask=attention_mask)
            if token_type_ids is not None:
                scale = 1 + (token_type_ids + 1).double().mean()
                found.logits = found.logits * (scale + 0.1 * token_type_ids.shape[1]).float()
            return found

    model = bert()
    model.__class__ = ByTheRow
    plain = [Example(*each) for each in EXAMPLES]
    typed = [Example(ids, labels, {"token_type_ids": ids % 2}) for ids, labels in EXAMPLES]
    assert padding_is_exact(model, plain) and not padding_is_exact(model, typed)
    scores = fastdean.score(model, typed, progress=False)
    assert scores.manifest["batching"]["padded"] is False
    given = [(e.input_ids, e.labels, e.columns) for e in typed]
    expected = weight_importance(model, given, list(scores), 0)
    for name, value in scores.items():
        assert norm_error(value, expected[name]) < 1e-5, name


@pytest.mark.parametrize(
    "make", [gpt_neo, lambda: gpt_neo(16), gpt2], ids=["GPT-Neo", "shorter than a probe", "GPT-2"]
)
def test_packed_rows_are_no_longer_than_the_model_s_positions(make):
    model = make()
    scores = assert_scored(model, tokens_per_batch=10_000)
    assert scores.manifest["batching"]["packed"] is True
    examples = [Example(*each) for each in 4 * EXAMPLES]
    layout = exact_layout(model, examples)
    planned = plan_batches(examples, shift=1, tokens_per_batch=10_000, **vars(layout))
    longest = max(batch.input_ids.shape[1] for batch in planned)
    assert 0.5 * max_tokens(model) < longest <= max_tokens(model)


# Configurations.


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_models_that_return_tuples(name):
    make = {"llama": llama, "gpt2": gpt2, "bert": bert}[name]
    model = make()
    model.config.return_dict = False
    scores = fastdean.score(model, batches(EXAMPLES, 4), progress=False)
    expected = fastdean.score(make(), batches(EXAMPLES, 4), progress=False)
    assert all(torch.equal(scores[name], expected[name]) for name in expected)
    assert model.config.return_dict is False
    examples = [Example(*each) for each in EXAMPLES]
    expected = last_token_states(make(), examples, progress=False)
    assert torch.equal(last_token_states(model, examples, progress=False), expected)
    if name != "bert":
        expected = perplexity(make(), examples, progress=False).value
        assert perplexity(model, examples, progress=False).value == expected


@pytest.mark.parametrize("bound", [-1, 0])
def test_configurations_that_set_no_bound(bound):
    model = llama()
    model.config.max_position_embeddings = bound
    assert max_tokens(model) is None
    assert_scored(model)
    assert perplexity(model, batches(EXAMPLES, 2), progress=False).value > 1


def test_dynamic_rotary_embeddings_without_an_original_length():
    model = build(
        "LlamaForCausalLM", "LlamaConfig", **SIZES, max_position_embeddings=16,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    )  # fmt: skip
    model.config.rope_parameters.pop("original_max_position_embeddings", None)
    assert assert_scored(model).manifest["batching"]["alone_above"] == 16
    model.config.max_position_embeddings = -1
    assert assert_scored(model).manifest["batching"]["alone_above"] is None


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[../third_party/gloo/transport/tcp/pair.cc:553] Connection closed by peer"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        torch.OutOfMemoryError("tried to allocate 2 GiB"),
    ],
    ids=["lost rank", "memory", "device memory"],
)
@pytest.mark.parametrize(
    "ask",
    [
        probes.sees_ahead,
        probes.sees_back,
        probes.repeats,
        lambda model: probes.numbers_from(model, 0),
        lambda model: probes.packing_is_exact(model, [Example(*each) for each in EXAMPLES]),
        lambda model: probes.segments_are_exact(model, [Example(*each) for each in EXAMPLES]),
        lambda model: padding_is_exact(model, [Example(*each) for each in EXAMPLES]),
    ],
    ids=["ahead", "back", "repeats", "numbers", "packing", "segments", "padding"],
)
def test_an_error_that_says_nothing_of_the_model_is_no_answer(ask, error):
    def fails(*_):
        raise error

    model = llama()
    handle = model.model.layers[1].register_forward_hook(fails)
    with pytest.raises(RuntimeError) as caught:
        ask(model)
    assert caught.value is error
    handle.remove()
    assert ask(model) is ask(llama())
