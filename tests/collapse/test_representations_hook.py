"""The hooks on a model's last representations: the right ones, of the right pass, and then gone."""

from __future__ import annotations

import pytest
import torch
from interrupts import interrupt, moments
from tiny_models import HIDDEN, MAX_TOKENS, VOCAB, bert, gpt2, llama
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastdean.collapse import Representations, representations

MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert}
IDS = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))


def opt():
    """A model whose head calls the decoder inside its base model, past the base model itself."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        ffn_dim=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
    )
    return OPTForCausalLM(config).eval()


class Adapted(nn.Module):
    """Around a model as PEFT is: the inner model's forward is called, and never its hooks."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def get_base_model(self):
        return self.inner

    def forward(self, *args, **kwargs):
        return self.inner.forward(*args, **kwargs)


class PromptTuned(Adapted):
    """Two learned positions stand before the tokens."""

    def forward(self, input_ids):
        embedded = self.inner.get_input_embeddings()(input_ids)
        prompt = embedded.new_zeros(len(input_ids), 2, embedded.shape[-1])
        return self.inner(inputs_embeds=torch.cat([prompt, embedded], 1))


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.mix = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, input_ids):
        return (self.mix(self.embed(input_ids)),)


class Bare(nn.Module):
    """The least that has a base model and a head, which it may bypass or run again."""

    def __init__(self, fused_head=False, recompute=False):
        super().__init__()
        self.base_model = Base()
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.fused_head, self.recompute = fused_head, recompute

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids):
        if self.recompute:
            (hidden,) = checkpoint(self.base_model, input_ids, use_reentrant=False)
        else:
            (hidden,) = self.base_model(input_ids)
        return hidden @ self.head.weight.T if self.fused_head else self.head(hidden)


def hooks_of(model):
    return [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]


@pytest.mark.parametrize("name", MODELS)
def test_base_is_what_the_base_model_returns(name):
    model = MODELS[name]()
    mask = torch.ones_like(IDS)
    mask[1, 4:] = 0
    with Representations(model) as last:
        model(input_ids=IDS, attention_mask=mask, labels=IDS)
    expected = model.base_model(input_ids=IDS, attention_mask=mask).last_hidden_state
    assert torch.equal(last.features, expected)
    assert last.input_ids is IDS and last.attention_mask is mask and last.labels is IDS


@pytest.mark.parametrize("name", MODELS)
def test_head_is_what_enters_the_output_embedding(name):
    model = MODELS[name]()
    with Representations(model, features="head") as last:
        logits = model(input_ids=IDS).logits
    assert torch.equal(model.get_output_embeddings()(last.features), logits)
    base = model.base_model(input_ids=IDS).last_hidden_state
    # Only a masked model has a transform of its own between the two.
    assert torch.equal(last.features, base) == (name != "bert")


@pytest.mark.parametrize("name", [*MODELS, "opt"])
@pytest.mark.parametrize("features", ["base", "head"])
def test_skipping_the_logits_changes_no_representation(name, features):
    model = opt() if name == "opt" else MODELS[name]()
    with Representations(model, features=features) as last:
        whole = model(input_ids=IDS).logits
        expected = last.features
    with Representations(model, features=features, skip_logits=True) as last:
        logits = model(input_ids=IDS).logits
    assert torch.equal(last.features, expected)
    assert logits.shape == (2, 1, VOCAB)
    assert torch.allclose(logits[:, 0], whole[:, 0], atol=1e-5)


def test_a_head_may_call_the_decoder_past_its_base_model():
    model = opt()
    with Representations(model) as last:
        model(input_ids=IDS)
    assert torch.equal(last.features, model.model(input_ids=IDS).last_hidden_state)


def test_tuples_are_read_too():
    model = llama()
    with Representations(model) as last:
        model(input_ids=IDS, return_dict=False)
    assert torch.equal(last.features, model.base_model(input_ids=IDS).last_hidden_state)


def test_arguments_are_read_by_position():
    model, mask = llama(), torch.ones_like(IDS)
    with Representations(model) as last:
        model(IDS, mask)
    assert last.input_ids is IDS and last.attention_mask is mask and last.labels is None


def test_the_graph_hangs_on_the_features():
    model = llama()
    with Representations(model) as last:
        loss = model(input_ids=IDS, labels=IDS).loss
        (loss + last.features.square().sum()).backward()
    with_term = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert not torch.equal(model.model.embed_tokens.weight.grad, with_term)


@pytest.mark.parametrize("recompute", [False, True])
def test_what_runs_again_in_the_backward_pass_is_not_looked_at(recompute):
    model = Bare(recompute=recompute)
    runs = []
    model.base_model.embed.register_forward_pre_hook(lambda *_: runs.append(1))
    with Representations(model) as last:
        loss = model(IDS).sum()
        before = last.features
        loss.backward()
        assert last.features is before
    assert len(runs) == 1 + recompute


def test_activation_checkpointing_leaves_the_features_of_the_forward_pass():
    model = llama().train()
    model.activation_checkpointing_enable()
    with Representations(model) as last:
        loss = model(input_ids=IDS, labels=IDS).loss
        before = last.features
        loss.backward()
        assert last.features is before
    assert torch.equal(before, llama().base_model(input_ids=IDS).last_hidden_state)


def test_each_pass_replaces_the_last_and_clear_forgets_it():
    model = llama()
    with Representations(model) as last:
        model(input_ids=IDS, labels=IDS)
        model(input_ids=IDS[:1])
        assert last.features.shape == (1, 7, HIDDEN) and last.labels is None
        last.clear()
        with pytest.raises(RuntimeError, match="got no forward pass"):
            _ = last.features


def test_no_hook_stays_behind_even_after_an_exception():
    model = llama()
    before = hooks_of(model)
    last = Representations(model, skip_logits=True)
    with pytest.raises(IndexError), last:
        assert len(hooks_of(model)) > len(before)
        model(input_ids=IDS + VOCAB)
    assert hooks_of(model) == before
    last.attach().attach().remove()
    assert hooks_of(model) == before


def test_a_pass_that_failed_leaves_nothing_of_the_pass_before():
    model = llama()
    with Representations(model) as last:
        model(input_ids=IDS)
        with pytest.raises(IndexError):
            model(input_ids=IDS + VOCAB)
        model.base_model(input_ids=IDS)
        with pytest.raises(RuntimeError, match="must call its base model as a module"):
            _ = last.features


@pytest.mark.parametrize("features", ["base", "head"])
def test_adapters_are_looked_through(features):
    inner = llama()
    with Representations(inner, features=features) as last:
        inner(input_ids=IDS)
    expected = last.features
    model = Adapted(inner)
    with Representations(model, features=features) as last:
        model(input_ids=IDS)
        assert torch.equal(last.features, expected)
        model(IDS)
        assert last.input_ids is IDS
    assert hooks_of(model) == []


# What torch's compiler hides from its users, pytest makes an error.
HIDDEN_WARNING = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not")


@pytest.fixture
def compiler():
    yield
    torch.compiler.reset()


@HIDDEN_WARNING
def test_a_model_compiled_before_its_first_run_is_read(compiler):
    model = Bare()
    compiled = torch.compile(model, backend="eager")
    with Representations(compiled) as last:
        compiled(IDS)
    assert torch.equal(last.features, model.base_model(IDS)[0])


@HIDDEN_WARNING
@pytest.mark.parametrize("how", ["torch.compile", "module.compile()"])
def test_a_model_compiled_and_run_is_refused_or_run_as_it_was(how, compiler):
    model = compiled = Bare()
    if how == "torch.compile":
        compiled = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    compiled(IDS)
    with Representations(compiled) as last:
        compiled(IDS)
        with pytest.raises(RuntimeError, match="compiled model fires no hooks added after its fir"):
            _ = last.features
        with torch.compiler.set_stance("force_eager"):
            compiled(IDS)
    assert torch.equal(last.features, model.base_model(IDS)[0])


def test_a_head_that_is_bypassed_can_be_read_at_the_base_only():
    model = Bare(fused_head=True)
    with Representations(model, features="head") as last:
        model(IDS)
        with pytest.raises(RuntimeError, match="output embedding as a module.*use features='base'"):
            _ = last.features
    with Representations(model) as last:
        model(IDS)
    assert last.features.shape == (2, 7, HIDDEN)


def test_prompt_tuning_is_refused():
    model = PromptTuned(llama())
    with Representations(model) as last:
        model(IDS)
        with pytest.raises(ValueError, match=r"each of its input_ids, \[2, 7\], got \[2, 9, 32\]"):
            _ = last.features


def test_passes_without_token_ids_are_refused():
    model = llama()
    with Representations(model) as last:
        model(inputs_embeds=model.get_input_embeddings()(IDS))
        with pytest.raises(ValueError, match="model must be called with input_ids, got none"):
            _ = last.features


def test_replicas_of_data_parallel_are_refused():
    model = llama()
    with Representations(model):
        replica = model._replicate_for_data_parallel()
        with pytest.raises(RuntimeError, match="got a replica of nn.DataParallel"):
            replica(input_ids=IDS)


def test_models_without_the_place_are_refused():
    with pytest.raises(ValueError, match="features must be one of base, head, got 'last'"):
        Representations(llama(), features="last")
    with pytest.raises(ValueError, match="a base model below its head, got LlamaModel"):
        Representations(llama().model)
    with pytest.raises(ValueError, match="an output embedding, got LlamaModel without one"):
        Representations(llama().model, features="head")


@pytest.mark.parametrize("features", ["base", "head"])
def test_an_interrupt_at_any_line_leaves_no_hook(features):
    model, files, used = Bare(), {representations.__file__}, []

    def read():
        last = Representations(model, features=features, skip_logits=True)
        used.append(last)
        with last:
            model(IDS)
            last.clear()

    found = moments(read, files)
    assert len(found) > 40
    for moment in found:
        interrupt(read, files, moment)
        used.clear()
        assert not hooks_of(model), moment
        assert not any(m._forward_hooks_with_kwargs for m in model.modules())
        assert not any(m._forward_hooks_always_called for m in model.modules())
    with Representations(model, features=features) as last:
        model(IDS)
    assert last.features.shape == (*IDS.shape, HIDDEN)


def test_hooks_go_with_the_last_user_of_what_they_read():
    model = llama()
    last = Representations(model).attach()
    assert hooks_of(model)
    del last
    assert not hooks_of(model)
    model(input_ids=IDS)
